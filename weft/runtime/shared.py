"""Shared: what the last stage of every replica has computed, given to every rank of the job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_structure, tree_unflatten

from weft.runtime.grid import Grid


def share(mine: Any, grid: Grid) -> list[Any]:
    """What every replica has, in the order of the replicas, on every rank; all ranks call it.

    Args:
        mine: on the last stage, this replica's: tensors in any nesting, and plain values. Not looked at elsewhere.
        grid: the ranks.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    if world == 1:
        return [mine]
    last = tellers(grid)
    every: list[Any] = [None] * world
    dist.all_gather_object(every, tree_map(form_of, mine) if rank in last else None)
    found = []
    for root in last:
        values = tree_leaves(mine) if rank == root else tree_leaves(every[root])
        for index, value in enumerate(values):
            if isinstance(value, Form):
                value = torch.empty(value.shape, dtype=value.dtype, device=grid.device)
            if isinstance(value, Tensor):
                values[index] = value.detach().to(grid.device).contiguous()
                dist.broadcast(values[index], src=root)
        found.append(tree_unflatten(values, tree_structure(every[root])))
    return found


def tellers(grid: Grid) -> list[int]:
    """The rank of each replica that tells what it has: of the last stage, whose ranks have tp innermost, the first."""
    replicas = grid.degree("dp_replicate") * grid.degree("dp_shard")
    ranks: list[int] = grid.mesh.mesh[-1].reshape(replicas, -1)[:, 0].tolist()
    return ranks


@dataclass(frozen=True)
class Form:
    """What stands for a tensor until it comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def form_of(leaf: Any) -> Any:
    """What tells a leaf's form, or a plain value itself."""
    return Form(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf
