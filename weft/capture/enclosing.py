"""Enclosing: units that are called inside an autograd function of the model's.

Its backward runs the parts of these units itself (reversible layers do), so none of them can be elsewhere, or be
gathered when it is called. They are placed as a whole, with the module around the function.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType

import torch
from torch import nn

from weft.errors import ModelError

FUNCTION, CHECKPOINT, MODULE = (
    (sys.modules[name].__file__, call)
    for name, call in (
        ("torch.autograd.function", "apply"),
        ("torch.utils.checkpoint", "checkpoint"),
        ("torch.nn.modules.module", "_call_impl"),
    )
)


class EnclosedError(ModelError):
    """A unit is called inside an autograd function that the module ``around`` calls."""

    def __init__(self, around: str) -> None:
        super().__init__(around)
        self.around = around


def check_enclosed(model: nn.Module) -> None:
    """Raise EnclosedError if this is called inside an autograd function that some part of the model calls."""
    if torch.is_grad_enabled():
        return
    frame: FrameType | None = sys._getframe()
    inside = False
    while frame is not None:
        place = frame.f_code.co_filename, frame.f_code.co_name
        if place == CHECKPOINT:  # it runs the forward again, by itself
            return
        inside |= place == FUNCTION
        if inside and place == MODULE:
            module = frame.f_locals["self"]
            name = next((name for name, m in model.named_modules() if m is module), "")
            if name:
                raise EnclosedError(name)
            return
        frame = frame.f_back


def enclosed(units: Sequence[str], around: str) -> list[str]:
    """The units, with those inside a module as one."""
    result: list[str] = []
    for unit in units:
        name = around if unit.startswith(f"{around}.") else unit
        if name not in result:
            result.append(name)
    return result
