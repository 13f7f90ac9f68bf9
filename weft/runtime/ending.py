"""Ending: a stage's forward is over with its last call.

Every rank runs the user's forward, and what comes after its own last call is computed on fake tensors for nobody: a
loss on fake logits alone takes milliseconds of Python, for every microbatch on every stage but the last. So the first
stand-in after the last call ends the forward with an exception.

Code after it may still do something that a later forward looks at: set an attribute, change a buffer, append to a list.
So the first forward runs to its end, and what the modules and the loss hold is compared before and after; where
anything changed, all forwards do. A change that only some later step makes is not seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from types import CellType
from typing import Any

from torch import Tensor, nn

from weft.workload import Loss

UserLoss = Callable[[nn.Module, Any], Loss]
NO_LOSS = Tensor()


class Done(BaseException):
    """No call of this stage is left. Not an Exception, so that a user's handler does not take it for an error."""


class Ending:
    """Whether and where the forwards of one stage end early.

    Args:
        model: the user's model.
        loss: the loss that is run.
        written: the loss as the user wrote it, which is looked at.
    """

    def __init__(self, model: nn.Module, loss: UserLoss, written: UserLoss) -> None:
        self._model, self._loss, self._written = model, loss, written
        self._early: bool | None = None
        self._held: list[tuple[Any, Any]] | None = None

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        """The user's loss, or NO_LOSS where it ended with the stage's last call."""
        self._held = None
        try:
            return self._loss(model, batch)
        except Done:
            return NO_LOSS
        finally:
            if self._held is not None:
                self._early = _same(self._held, self._holdings())
                self._held = None

    def reach(self) -> None:
        """A call of a later stage begins.

        Raises:
            Done: the forward ends here.
        """
        if self._early is None:
            if self._held is None:
                self._held = self._holdings()
        elif self._early:
            raise Done

    def _holdings(self) -> list[tuple[Any, Any]]:
        """What forwards could leave something in, each with what tells whether it was changed in place."""
        function: Any = self._written
        places: list[dict[str, Any]] = []
        while isinstance(function, partial):
            places, function = [*places, function.keywords], function.func
        places += [vars(each) for each in (function, getattr(function, "__self__", None)) if hasattr(each, "__dict__")]
        places.append(getattr(function, "__globals__", {}))
        for module in self._model.modules():
            places += [vars(module), module._buffers]
        cells = [cell for cell in getattr(function, "__closure__", None) or () if cell != CellType()]
        found = [value for place in places for value in place.values()] + [cell.cell_contents for cell in cells]
        return [(value, _mark(value)) for value in found]


def _mark(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return value._version
    return len(value) if isinstance(value, list | dict | set | deque) else None


def _same(before: list[tuple[Any, Any]], after: list[tuple[Any, Any]]) -> bool:
    def is_same(old: Any, new: Any) -> bool:
        return old is new or (type(old) is type(new) and isinstance(old, int | float | str) and old == new)

    return len(before) == len(after) and all(
        is_same(old, new) and mark == now for (old, mark), (new, now) in zip(before, after, strict=True)
    )
