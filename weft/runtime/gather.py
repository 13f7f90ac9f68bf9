"""Gather: pieces on many ranks to whole tensors on rank 0, one tensor at a time.

fully_shard's cut is undone first, then tensor parallelism's, which came before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weft.runtime.crossing import all_gather
from weft.runtime.division import Division
from weft.runtime.dtensor import is_dtensor
from weft.runtime.grid import Grid


def gather(mine: Mapping[str, Tensor], divisions: Mapping[str, Division], grid: Grid) -> dict[str, Tensor]:
    """Whole tensors by name, on the CPU of rank 0; the other ranks get an empty dict. All ranks call it.

    Args:
        mine: this rank's tensors or shards. Ranks of one stage have the same names in the same order; a name that
            several stages have is taken from the first.
        divisions: by name, of those that tensor parallelism divides.
        grid: the ranks.
    """
    described: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, tensor in mine.items():
        shape = divisions[name].whole(tensor.shape) if name in divisions else tensor.shape
        described[name] = (tuple(shape), tensor.dtype)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (grid.stage, described))
    whole: dict[str, Tensor] = {}
    for stage in range(grid.degree("pp")):
        sender = next(rank for rank, (s, _) in enumerate(every) if s == stage)
        for name, (shape, dtype) in every[sender][1].items():
            if grid.stage == stage:
                tensor = full(mine[name], divisions.get(name), grid)
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


def full(tensor: Tensor, division: Division | None, grid: Grid) -> Tensor:
    """The whole of a tensor; all ranks of its stage call it."""
    piece = tensor.full_tensor() if is_dtensor(tensor) else tensor
    if division is None:
        return piece
    return all_gather(piece.detach(), division, grid.group("tp").group_name)
