"""Loss scale: keeps float16 gradients above the smallest number float16 has.

The loss is multiplied by a number before the backward, and the gradients are divided by it after the reduction. Too
large a number makes some gradient infinite: that step is left out on every rank and the number halved; after
INTERVAL steps without, it is doubled (Micikevicius et al. 2018, "Mixed precision training"; the numbers are those of
``torch.amp.GradScaler``).
"""

from __future__ import annotations

import math
from typing import Any

from weft.errors import CheckpointError
from weft.plain import is_whole, shown

INITIAL = 2.0**16
GROWTH = 2.0
BACKOFF = 0.5
INTERVAL = 2000


class LossScale:
    """The number, and what is known of the step being done. The same on every rank.

    Attributes:
        value: what losses are multiplied by, and reduced gradients divided by.
        clean: steps since it was last changed.
        finite: whether the last gradients that were looked at were finite on all ranks.
    """

    def __init__(self) -> None:
        self.value = INITIAL
        self.clean = 0
        self.finite = True

    def settle(self, finite: bool) -> None:
        """Take note of whether all ranks' gradients are finite, and change the factor for the next step."""
        self.finite = finite
        if not self.finite:
            self.value, self.clean = self.value * BACKOFF, 0
        elif self.clean + 1 == INTERVAL:
            self.value, self.clean = self.value * GROWTH, 0
        else:
            self.clean += 1

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"value": self.value, "clean": self.clean}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what ``state`` gave.

        Raises:
            CheckpointError: it gave no such thing.
        """
        value = state.get("value")
        if not (isinstance(value, float) and 0 < value < math.inf and is_whole(state.get("clean"))):
            raise CheckpointError(
                f"the checkpoint's loss scale is {shown(state)}, where a number above 0 and one of steps should be; go "
                "on from another checkpoint"
            )
        self.value, self.clean = value, state["clean"]
