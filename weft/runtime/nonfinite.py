"""NonFinite: what becomes of a step whose loss or gradients are NaN or infinite.

All ranks know it from the one all-reduce that every step makes anyway (``totals``): the norm of the gradients, in
which any number that is not finite shows. So they decide alike. Looking the answer up makes the host wait for the
device, which nothing else in a step does; therefore only where a policy asks for it. The step that is found so has
changed nothing but buffers, which are put back, and is run once more to name where it began (``origin``).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from weft.capture.recorder import RecordedCall
from weft.errors import InputError, NonFiniteError
from weft.runtime import totals
from weft.runtime.batches import Batch
from weft.runtime.dtensor import local
from weft.runtime.grid import Grid
from weft.runtime.origin import Finder, Origin
from weft.runtime.pipeline import Pipeline
from weft.runtime.scaling import LossScale
from weft.runtime.totals import Agreed, Held

NonFinite = Literal["ignore", "skip", "stop"]


def looks(policy: str) -> bool:
    """Whether each step's numbers are looked at.

    Raises:
        InputError: there is no such policy.
    """
    if policy not in get_args(NonFinite):
        raise InputError(f"nonfinite must be one of {', '.join(get_args(NonFinite))}, got {policy!r}")
    return policy != "ignore"


class Judge:
    """Says of every step whether it is taken.

    Args:
        pipeline: what runs steps.
        held: this rank's parameters.
        grid: the ranks.
        scale: what float16 needs.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        held: list[Held],
        grid: Grid,
        scale: LossScale | None,
    ) -> None:
        self._pipeline, self._held, self._grid, self._scale = pipeline, held, grid, scale

    def takes(self, agreed: Agreed, batch: Batch, step: int, policy: NonFinite, kept: Mapping[str, Tensor]) -> bool:
        """Whether a step changes anything; the same on every rank. One that was looked at and is not taken leaves
        buffers as they were, and no gradients.

        Args:
            agreed: what all ranks know of it.
            batch: this replica's part of its batch.
            step: its number.
            policy: what is asked for.
            kept: buffers as they were before it.

        Raises:
            NonFiniteError: it is not taken, and training is to stop there.
        """
        overflows = self._scale is not None and not self._scale.finite
        if policy == "ignore" or bool(agreed.finite):
            return not overflows
        if overflows and self._pipeline.scale > 1 and bool(agreed.loss.isfinite()):
            return False  # float16 does that now and then, and the smaller scale of the next step helps
        found = self._origin(batch, step, kept)
        what = found.describe() if found is not None else _of_the_whole(agreed)
        if policy == "stop":
            raise NonFiniteError(
                f"step {step + 1}: {what}; nothing was changed. Look at the samples and the learning rate, or leave "
                "such steps out with --nonfinite skip (engine.nonfinite = 'skip')",
                step=step + 1,
                unit="" if found is None else found.unit,
                what=what if found is None else found.what,
            )
        if dist.get_rank() == 0:
            warnings.warn(f"step {step + 1} was left out: {what}", RuntimeWarning, stacklevel=3)
        return False

    def _origin(self, batch: Batch, step: int, kept: Mapping[str, Tensor]) -> Origin | None:
        """Run a step again to see where its first number that is not finite appears."""
        finder, buffers = Finder(self._grid.replica), self._pipeline.buffers
        buffers.restore(kept)
        self._forget()
        self._pipeline.run(batch, step, finder=finder)
        totals.sum_copies(self._held)
        gradients = {held.name: held.parameter.grad for held in self._held}
        finder.after_sums({name: local(g) for name, g in gradients.items() if g is not None})
        self._forget()
        buffers.restore(kept)
        return finder.first()

    def _forget(self) -> None:
        for held in self._held:
            held.parameter.grad = None


def _of_the_whole(agreed: Agreed) -> str:
    """What is wrong with a step of which each part is finite."""
    if bool(agreed.loss.isfinite()):
        return "the norm of the gradients overflows"
    return "the mean loss is NaN or infinity, though no microbatch's is: their sum overflows, or their counts add to 0"


def warn_of_first(unfinite: int | None, calls: Sequence[RecordedCall], device: torch.device) -> None:
    """Warn if the first step met a value that is not finite, naming the first call on any rank that gave one; all
    ranks call it.

    Args:
        unfinite: its number on this rank, if there is one.
        calls: of the forward.
        device: of this rank.
    """
    number = torch.tensor(len(calls) if unfinite is None else unfinite, device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MIN)
    if int(number) < len(calls) and dist.get_rank() == 0:
        warnings.warn(
            f"step 0: {calls[int(number)].name} returned NaN or infinity, the first to do so; check its inputs, "
            "initial weights and the loss",
            RuntimeWarning,
            stacklevel=3,
        )
