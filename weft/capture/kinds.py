"""Kinds: recorded calls that stand for later ones like them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils._pytree import TreeSpec

from weft.capture.blocks import Likeness, likeness
from weft.capture.border import alike
from weft.capture.frames import RawOp
from weft.capture.recording import Cost


@dataclass(slots=True)
class Kind:
    """A call that was run.

    Attributes:
        unit, module: whose call it was.
        state: torch's modes it ran in.
        given: forms of its arguments, objects as they are; ``arguments``: with copies of objects as they were.
        spec: how the arguments are put together.
        out_leaves, out_spec: its outputs, and how they are put together.
        cost: what it does.
        changes: which of its tensor arguments it writes to.
        reach: for each tensor it returns, the tensor arguments its gradient goes on to.
        replayable: whether it depends on nothing but its arguments, module and state.
    """

    unit: str
    module: nn.Module
    state: tuple[Any, ...]
    given: Sequence[Any]
    arguments: Sequence[Any]
    spec: TreeSpec
    out_leaves: tuple[Any, ...]
    out_spec: TreeSpec
    cost: Cost
    changes: frozenset[int]
    reach: tuple[frozenset[int], ...]
    replayable: bool

    def likeness(
        self, unit: str, module: nn.Module, state: tuple[Any, ...], leaves: Sequence[Any], spec: TreeSpec
    ) -> Likeness:
        """How much a call of another unit is like this one."""
        if not self.replayable or self.state != state or self.spec != spec or not alike(self.given, leaves):
            return Likeness.DIFFERENT
        return likeness(self.module, module, self.unit, unit)

    def runs(self, operations: Sequence[RawOp]) -> bool:
        """Whether its forward is these operations."""
        return [op.form for op in self.cost.forward] == [op.form for op in operations]
