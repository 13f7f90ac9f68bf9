"""Crossing: how values pass between what every rank repeats and what tensor parallelism divides.

              forward                            backward
    enter     as it is                           gradients are summed: each rank's is its share's
    leave     shares' results are summed         as it is
    gather    pieces are joined along a          this rank's piece
              dimension

Each is the other's transpose, so a unit whose divided stretch lies between an enter and a leave (or gather) has the
single device's gradients. The collectives are PyTorch's functional ones: they can be compiled, run on fake tensors, and
be kept or repeated by selective recomputing like any other operation.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from weft.runtime.division import Division


def all_reduce(tensor: Tensor, group: str) -> Tensor:
    """The sum over the group of this name, as a new tensor."""
    ops = torch.ops._c10d_functional
    return cast(Tensor, ops.wait_tensor(ops.all_reduce(tensor.contiguous(), "sum", group)))


def all_gather(piece: Tensor, division: Division, group: str) -> Tensor:
    """The whole tensor of every rank's piece; pieces may differ in length, and be empty."""
    ops, degree = torch.ops._c10d_functional, division.degree
    longest = max(division.length(rank) for rank in range(degree))
    ahead = piece.movedim(division.dim, 0)
    if missing := longest - len(ahead):
        ahead = F.pad(ahead, [0, 0] * (ahead.dim() - 1) + [0, missing])
    joined = ops.wait_tensor(ops.all_gather_into_tensor(ahead.contiguous(), degree, group))
    pieces = [joined.narrow(0, rank * longest, division.length(rank)) for rank in range(degree)]
    return division.join([p.movedim(0, division.dim) for p in pieces])


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: str, crossing: Crossing | None) -> Tensor:
        ctx.group, ctx.crossing = group, crossing
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.crossing is not None:
            ctx.crossing.forget(ctx)
        return all_reduce(gradient, ctx.group), None, None


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: str) -> Tensor:
        return all_reduce(tensor, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, piece: Tensor, division: Division, group: str) -> Tensor:
        ctx.division = division
        return all_gather(piece, division, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.division.cut(gradient).contiguous(), None, None


@dataclass(frozen=True)
class _Entered:
    """A value that has entered, for those that follow: its version tells writes in between."""

    tensor: weakref.ref[Tensor]
    version: int
    entered: Tensor


class Crossing:
    """The crossings of one model over one group of ranks.

    An input that several projections share (query, key, value) enters once, so that its gradient is summed over the
    ranks once. What has entered is remembered until something else enters after a result has left, or until its
    backward: a rule that depends on the calls alone, and so gives every rank the same collectives.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group.group_name
        self._known: list[_Entered] = []
        self._closed = False

    def enter(self, tensor: Tensor) -> Tensor:
        """A whole value, for divided work. Values without a gradient are given back."""
        if not (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor
        if torch.compiler.is_compiling():
            return cast(Tensor, _Enter.apply(tensor, self.group, None))  # type: ignore[no-untyped-call]  # torch's
        for known in self._known:
            if known.tensor() is tensor and known.version == tensor._version:
                return known.entered
        if self._closed:
            self._known, self._closed = [], False
        entered = cast(Tensor, _Enter.apply(tensor, self.group, self))  # type: ignore[no-untyped-call]  # torch's
        self._known.append(_Entered(weakref.ref(tensor), tensor._version, entered))
        return entered

    def forget(self, node: Any) -> None:
        """Let go of what an autograd node has made."""
        self._known = [known for known in self._known if known.entered.grad_fn is not node]

    def leave(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's partial result."""
        self._close()
        return cast(Tensor, _Leave.apply(tensor, self.group))  # type: ignore[no-untyped-call]  # torch's

    def gather(self, piece: Tensor, division: Division) -> Tensor:
        """The whole value of every rank's piece."""
        self._close()
        return cast(Tensor, _Gather.apply(piece, division, self.group))  # type: ignore[no-untyped-call]  # torch's

    def _close(self) -> None:
        if not torch.compiler.is_compiling():
            self._closed = True
