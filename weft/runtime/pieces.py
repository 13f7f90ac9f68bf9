"""Pieces: what a rank has of a tensor, as boxes of the whole tensor.

A piece that several stretches were cut from (``division``), or that fully_shard cut once more, is no single box. The
boxes go under the whole tensor's name and shape, so that any plan can read them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from weft.runtime.division import Division
from weft.runtime.dtensor import cuts, is_dtensor


class Box(NamedTuple):
    """A box of a whole tensor: where it begins, and its values, which share memory with the rank's tensor."""

    offsets: torch.Size
    values: Tensor


def boxes(tensor: Tensor, division: Division | None) -> list[Box]:
    """The boxes a rank's tensor consists of; none if it is empty.

    Args:
        tensor: what the rank has: a tensor, or fully_shard's DTensor of it.
        division: how tensor parallelism divides it.
    """
    local, dim, first = _shard(tensor)
    if not local.numel():
        return []
    if division is None:
        return [_box(local, {dim: first})]
    result, at = [], 0  # ``at``: where a stretch begins in the piece before fully_shard cut it
    for start, end in division.stretches():
        length = end - start
        if division.dim != dim:
            if length:
                result.append(_box(local.narrow(division.dim, at, length), {dim: first, division.dim: start}))
        else:
            low, high = max(at, first), min(at + length, first + local.shape[dim])
            if low < high:
                result.append(_box(local.narrow(dim, low - first, high - low), {dim: start + low - at}))
        at += length
    return result


def _shard(tensor: Tensor) -> tuple[Tensor, int, int]:
    """This rank's shard of a tensor, the dimension fully_shard cut, and where the shard begins along it."""
    if not is_dtensor(tensor):
        return tensor, 0, 0
    for i, dim in cuts(tensor).items():
        chunk = -(-tensor.shape[dim] // tensor.device_mesh.size(i))
        return tensor.to_local(), dim, chunk * tensor.device_mesh.get_local_rank(i)
    return tensor.to_local(), 0, 0


def _box(values: Tensor, offsets: dict[int, int]) -> Box:
    return Box(torch.Size(offsets.get(dim, 0) for dim in range(values.dim())), values)
