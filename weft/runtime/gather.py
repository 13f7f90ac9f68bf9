"""Gather: pieces on many ranks to whole tensors on rank 0, one tensor at a time."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from weft.runtime.grid import Grid


def gather(mine: Mapping[str, Tensor], grid: Grid) -> dict[str, Tensor]:
    """Whole tensors by name, on the CPU of rank 0; the other ranks get an empty dict. All ranks call it.

    Args:
        mine: this rank's tensors or shards (DTensor). Ranks of one stage have the same names in the same order; a name
            that several stages have is taken from the first.
        grid: the ranks.
    """
    described: dict[str, tuple[tuple[int, ...], torch.dtype]] = {n: (tuple(t.shape), t.dtype) for n, t in mine.items()}
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (grid.stage, described))
    whole: dict[str, Tensor] = {}
    for stage in range(grid.degree("pp")):
        sender = next(rank for rank, (s, _) in enumerate(every) if s == stage)
        for name, (shape, dtype) in every[sender][1].items():
            if grid.stage == stage:
                tensor = full(mine[name])
            if sender == 0:
                if dist.get_rank() == 0:
                    whole[name] = tensor.detach().cpu().clone()
            elif dist.get_rank() == sender:
                dist.send(tensor.detach().contiguous(), 0)
            elif dist.get_rank() == 0:
                buffer = torch.empty(shape, dtype=dtype, device=grid.device)
                dist.recv(buffer, sender)
                whole.setdefault(name, buffer.cpu())
    return whole


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor; all ranks of its mesh call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    logger = logging.getLogger("torch.distributed.tensor._redistribute")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that two dimensions take two collectives, which is as it must be here
    try:
        return tensor.full_tensor()
    finally:
        logger.setLevel(level)
