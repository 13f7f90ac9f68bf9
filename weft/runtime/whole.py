"""Whole: the user's loss as the module that ``fully_shard`` takes for its root.

Whatever the loss calls (the model, twice, or parts of it alone), the root is entered once for each microbatch. So what
no unit gathers is gathered before the loss begins, and the hooks of the root always run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from weft.workload import Loss


class Whole(nn.Module):
    """The model, entered by way of the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], Loss]) -> Loss:
        """Compute the loss. What it is computed of comes with ``compute``, so that no hook looks into the batch."""
        return compute()

    def of(self, loss: Callable[[nn.Module, Any], Loss]) -> Callable[[nn.Module, Any], Loss]:
        """The loss, entered through this module."""

        def entered(model: nn.Module, batch: Any) -> Loss:
            result: Loss = self(lambda: loss(model, batch))
            return result

        return entered
