"""Division: how one rank's piece of a tensor sits in the whole.

Tensor parallelism divides one dimension. It may consist of several stretches (queries, keys and values in one matrix):
each is cut by itself, in chunks as ``torch.chunk`` makes them, and a rank keeps its chunk of every stretch, one after
the other. Such a piece is no contiguous range of the whole, which is why it is a plain tensor with this beside it:

    whole    q q q q k k v v        parts (4, 2, 2), two ranks
    rank 0   q q     k   v
    rank 1       q q   k   v
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Division:
    """The division of a tensor over the ranks of a group, seen from one of them.

    Attributes:
        dim: the divided dimension.
        parts: lengths of the stretches it consists of.
        index: this rank's place in the group.
        degree: ranks in the group.
    """

    dim: int
    parts: tuple[int, ...]
    index: int
    degree: int

    def stretches(self, index: int | None = None) -> list[tuple[int, int]]:
        """Start and end, in the whole, of what a rank (None: this one) keeps of every stretch."""
        index = self.index if index is None else index
        result, start = [], 0
        for length in self.parts:
            chunk = -(-length // self.degree)
            result.append((start + min(index * chunk, length), start + min((index + 1) * chunk, length)))
            start += length
        return result

    def length(self, index: int | None = None) -> int:
        """Length of a rank's piece (None: this one's)."""
        return sum(end - start for start, end in self.stretches(index))

    def along(self, dim: int) -> Division:
        """The same division of another dimension: of the output a divided weight makes."""
        return Division(dim, self.parts, self.index, self.degree)

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's piece of a whole tensor; a view where it is one range."""
        pieces = [whole.narrow(self.dim, start, end - start) for start, end in self.stretches()]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole tensor of every rank's piece, in order of the ranks."""
        lengths = [[end - start for start, end in self.stretches(rank)] for rank in range(self.degree)]
        split = [torch.split(piece, sizes, self.dim) for piece, sizes in zip(pieces, lengths, strict=True)]
        parts = range(len(self.parts))
        return torch.cat([split[rank][part] for part in parts for rank in range(self.degree)], self.dim)

    def whole(self, piece: Sequence[int]) -> torch.Size:
        """Shape of the whole tensor a piece of this shape belongs to."""
        shape = list(piece)
        shape[self.dim] = sum(self.parts)
        return torch.Size(shape)
