"""Losses: what ``loss(model, batch)`` may return."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from weft.errors import LossError


def loss_parts(result: Any) -> list[Tensor]:
    """The tensors of a loss: the mean, or the sum and (if it is a tensor) the count.

    Raises:
        LossError: it is neither a scalar nor ``(sum, count)``.
    """
    parts = list(result) if isinstance(result, tuple) and len(result) == 2 else [result]
    total, last = parts[0], parts[-1]
    mean = isinstance(total, Tensor) and total.numel() == 1 and total.is_floating_point()
    if not mean or not (isinstance(last, (int, float)) or (isinstance(last, Tensor) and last.numel() == 1)):
        raise LossError(f"loss(model, batch) must return a scalar or (sum, count), got {_describe(result)}")
    return [part for part in parts if isinstance(part, Tensor)]


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(map(_describe, value))}"
    return f"a {type(value).__name__}"
