"""Whether two modules run the same operations: what lets one repeated block stand for all.

Two modules are alike if their trees of submodules have the same classes, the same plain attributes, parameters and
buffers of the same shape, dtype and ``requires_grad``, and the same mode and hooks. Attributes compare by value if
they are plain data or functions, and by identity otherwise: in doubt modules differ, and the second is recorded too.

A block may know its own number (``layer_idx``). A whole number that is the block's position in both is told apart
from a true difference, but it may steer the block's code, so that is for the recorder to check by running the
forward.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
import types
from collections.abc import Iterable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn


class Likeness(Enum):
    """How alike two modules are."""

    SAME = enum.auto()
    SAME_BUT_NUMBERED = enum.auto()
    DIFFERENT = enum.auto()


PLAIN = (int, float, complex, bool, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size, Enum)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def likeness(a: nn.Module, b: nn.Module, name_a: str, name_b: str) -> Likeness:
    """Compare two modules, which stand in the model under these names."""
    compare = _Comparison(a, b, _position(name_a), _position(name_b))
    if not compare.modules(a, b):
        return Likeness.DIFFERENT
    return Likeness.SAME_BUT_NUMBERED if compare.numbered else Likeness.SAME


def same_value(a: Any, b: Any) -> bool:
    """Whether two arguments that are no tensors are equal as far as can be told."""
    return _Comparison(None, None, None, None).values(a, b)


def _position(name: str) -> int | None:
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return int(numbers[-1]) if numbers else None


class _Comparison:
    def __init__(
        self, a: nn.Module | None, b: nn.Module | None, position_a: int | None, position_b: int | None
    ) -> None:
        self.pair = (a, b)
        self.positions = (position_a, position_b)
        self.numbered = False
        self.seen: set[tuple[int, int]] = set()

    def modules(self, a: nn.Module, b: nn.Module) -> bool:
        if type(a) is not type(b):
            return False
        if (id(a), id(b)) in self.seen:
            return True
        self.seen.add((id(a), id(b)))
        vars_a, vars_b = vars(a), vars(b)
        # The recorder's own override of the two forwards is no difference.
        skip = {"forward"} if self.pair == (a, b) else set()
        keys = [k for k in vars_a if k not in skip]
        return keys == [k for k in vars_b if k not in skip] and self.items(keys, vars_a, vars_b)

    def items(self, keys: Iterable[Any], a: dict[Any, Any], b: dict[Any, Any]) -> bool:
        """Compare what two dicts have under some keys: mostly the very same."""
        return all(a[k] is b[k] or self.values(a[k], b[k]) for k in keys)

    def values(self, a: Any, b: Any) -> bool:
        if a is b:
            return True
        if type(a) is not type(b):
            return False
        if isinstance(a, Tensor):
            return _form(a) == _form(b)
        if isinstance(a, PLAIN):
            if a == b:
                return True
            if type(a) is int and (a, b) == self.positions:
                self.numbered = True
                return True
            return False
        if isinstance(a, nn.Module):
            return self.modules(a, b)
        if isinstance(a, dict):
            return list(a) == list(b) and self.items(a, a, b)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(self.values, a, b))
        if isinstance(a, (set, frozenset)):
            return bool(a == b)
        if isinstance(a, FUNCTIONS):
            return self.functions(a, b)
        if isinstance(a, functools.partial):
            return self.values((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
        if dataclasses.is_dataclass(a):
            return all(self.values(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
        return False

    def functions(self, a: Any, b: Any) -> bool:
        """Functions are equal if identical, methods if both are bound to alike modules."""
        if isinstance(a, types.MethodType):
            return a.__func__ is b.__func__ and self.values(a.__self__, b.__self__)
        return False


def _form(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.stride(), t.dtype, t.device, t.requires_grad
