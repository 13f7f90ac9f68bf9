"""Pieces: what a rank has of a tensor, as ``torch.distributed.checkpoint`` stores it: boxes of the whole tensor.

A piece that several stretches were cut from (``division``), or that fully_shard cut once more, is no single box. The
boxes go under the whole tensor's name and shape, so that any plan can read them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Shard

from weft.runtime.division import Division


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
    if not isinstance(tensor, DTensor):
        return tensor, 0, 0
    for i, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            chunk = -(-tensor.shape[placement.dim] // tensor.device_mesh.size(i))
            return tensor.to_local(), placement.dim, chunk * tensor.device_mesh.get_local_rank(i)
    return tensor.to_local(), 0, 0


def _box(values: Tensor, offsets: dict[int, int]) -> Box:
    return Box(torch.Size(offsets.get(dim, 0) for dim in range(values.dim())), values)


class Pieces(Tensor):
    """A whole tensor by shape, of which this rank has some boxes: what the checkpoint's protocol asks for."""

    boxes: list[Box]

    @staticmethod
    def __new__(cls, tensor: Tensor, division: Division | None) -> Pieces:
        """Of what a rank has (a tensor or fully_shard's DTensor) and how tensor parallelism divides it."""
        size = division.whole(tensor.shape) if division else tensor.shape
        made: Pieces = Tensor._make_wrapper_subclass(cls, size, dtype=tensor.dtype, device=tensor.device)
        made.boxes = boxes(tensor.detach(), division)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # torch's own is no classmethod to mypy
        """There is nothing to compute with."""
        raise NotImplementedError(f"{func} of a tensor's pieces")

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, box.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(box.offsets, box.values.shape),
                    properties=TensorProperties.create_from_tensor(box.values),
                    size=self.size(),
                ),
            )
            for box in self.boxes
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(box.offsets, box.values.shape) for box in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(box.values for box in self.boxes if box.offsets == index.offset)
