"""Kinds: recorded calls that stand for later ones like them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec

from weft.capture.alone import Outcome
from weft.capture.blocks import Likeness, likeness
from weft.capture.border import alike
from weft.capture.retracing import Track


@dataclass(slots=True)
class Kind:
    """A call that was run.

    Attributes:
        unit, module: whose call it was.
        state: torch's modes it ran in.
        given: forms of its arguments, objects as they are; ``arguments``: with copies of objects as they were.
        spec: how the arguments are put together.
        track: what it did.
        python_draws: whether it drew from Python's or NumPy's generator.
        looks: whether it looked at values.
        replayable: whether it depends on nothing but its arguments, module and state.
    """

    unit: str
    module: nn.Module
    state: tuple[Any, ...]
    given: Sequence[Any]
    arguments: Sequence[Any]
    spec: TreeSpec
    track: Track
    python_draws: bool
    looks: bool
    replayable: bool

    @property
    def outcome(self) -> Outcome:
        """What it did."""
        return self.track.outcome

    def likeness(
        self, unit: str, module: nn.Module, state: tuple[Any, ...], leaves: Sequence[Any], spec: TreeSpec
    ) -> Likeness:
        """How much a call of another unit is like this one."""
        if type(self.module) is not type(module) or not self.replayable or self.state != state:
            return Likeness.DIFFERENT
        with torch._C.DisableTorchFunction():  # to look at tensors here is nothing the user's code does
            if self.spec != spec or not alike(self.given, leaves):
                return Likeness.DIFFERENT
            return likeness(self.module, module, self.unit, unit)
