"""Ending: a stage's forward is over with its last call.

Every rank runs the user's forward, and what comes after its own last call is computed on fake tensors for nobody: a
loss on fake logits alone takes milliseconds of Python, for every microbatch on every stage but the last. So the first
stand-in after the last call ends the forward with an exception.

Code after it may still do something that a later forward looks at: set an attribute, change a buffer, append to a list.
So the first forward runs to its end, and what the modules, their classes and the loss hold is compared before and
after, a few objects deep; where anything changed, all forwards do. A change that only some later step makes is not
seen, nor one inside a container of more than LARGE.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

Function = Callable[[nn.Module, Any], Any]
NOTHING = Tensor()

DEEPEST, LARGE = 4, 1000
"""How many objects inside each other are looked at, and the largest container."""

OPAQUE = (Tensor, nn.Module, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)
"""What nothing is looked for in: modules have places of their own, and code keeps no state."""


class Done(BaseException):
    """No call of this stage is left. Not an Exception, so that a user's handler does not take it for an error."""


class Ending:
    """Whether and where the forwards of one function end early on one stage.

    Args:
        model: the user's model.
        written: the loss as the user wrote it, or what else is computed, which is looked at.
    """

    def __init__(self, model: nn.Module, written: Function) -> None:
        self._model, self._written = model, written
        self._early: bool | None = None
        self._held: list[tuple[Any, Any]] | None = None

    def of(self, function: Function) -> Function:
        """What is run in the function's place: it gives NOTHING where it ended with the stage's last call."""

        def ended(model: nn.Module, batch: Any) -> Any:
            self._held = None
            try:
                return function(model, batch)
            except Done:
                return NOTHING
            finally:
                if self._held is not None:
                    self._early = _same(self._held, self._holdings())
                    self._held = None

        return ended

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
        """What forwards could leave something in, each value with what tells whether it was changed in place."""
        function: Any = self._written
        places: list[Mapping[str, Any]] = []
        while isinstance(function, partial):
            places, function = [*places, function.keywords], function.func
        places += [vars(each) for each in (function, getattr(function, "__self__", None)) if hasattr(each, "__dict__")]
        places.append(getattr(function, "__globals__", {}))
        cells = [cell for cell in getattr(function, "__closure__", None) or () if cell != CellType()]
        places.append({str(i): cell.cell_contents for i, cell in enumerate(cells)})
        modules = list(self._model.modules())
        places += [vars(each) for each in dict.fromkeys(map(type, modules))]
        for module in modules:
            places += [vars(module), module._buffers]
        found: list[tuple[Any, Any]] = []
        for place in places:
            for value in place.values():
                _follow(value, found, DEEPEST, set())
        return found


def _follow(value: Any, found: list[tuple[Any, Any]], depth: int, above: set[int]) -> None:
    """Note a value and what is inside it: in containers that are not large, and in objects of the user's."""
    length = len(value) if isinstance(value, dict | list | tuple | set | frozenset | deque) else 0
    found.append((value, value._version if isinstance(value, Tensor) else length))
    if length > LARGE or depth == 0 or id(value) in above or isinstance(value, OPAQUE):
        return
    inside: list[Any] = []
    if isinstance(value, dict):
        inside = list(value.values())
    elif isinstance(value, list | tuple | deque):
        inside = list(value)
    elif isinstance(value, set | frozenset):
        inside = sorted(value, key=id)
    elif hasattr(value, "__dict__"):
        inside = list(vars(value).values())
    found.append((len(inside), None))
    for each in inside:
        _follow(each, found, depth - 1, above | {id(value)})


def _same(before: list[tuple[Any, Any]], after: list[tuple[Any, Any]]) -> bool:
    def is_same(old: Any, new: Any) -> bool:
        return old is new or (type(old) is type(new) and isinstance(old, int | float | str) and old == new)

    return len(before) == len(after) and all(
        is_same(old, new) and mark == now for (old, mark), (new, now) in zip(before, after, strict=True)
    )
