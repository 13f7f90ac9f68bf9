"""Loss: what a user's loss gave, in one form."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from weft.errors import LossError


def split_loss(loss: Any) -> tuple[Tensor, Tensor | int | float | None]:
    """A user's loss as ``(mean, None)`` or ``(sum, count)``.

    Raises:
        LossError: it is neither a scalar nor a pair of a scalar and a count.
    """
    value, count = loss if isinstance(loss, tuple) and len(loss) == 2 else (loss, None)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise LossError(f"loss(model, batch) must return a scalar tensor (a mean) or (sum, count); got {got}")
    if isinstance(count, Tensor) and count.numel() != 1:
        raise LossError(f"the count of (sum, count) must be one number; got a tensor of shape {tuple(count.shape)}")
    if count is not None and not isinstance(count, Tensor | int | float):
        raise LossError(f"the count of (sum, count) must be one number; got a {type(count).__name__}")
    return value, count
