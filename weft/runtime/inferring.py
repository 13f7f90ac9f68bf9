"""Inferring: what an engine's model gives with no backward, predictions and tokens, for either kind of engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn

from weft.plan import Plan
from weft.runtime.ending import Function
from weft.runtime.forwards import Forwards
from weft.runtime.grid import Grid
from weft.runtime.predictor import Predictor, predict_of
from weft.workload import Workload

if TYPE_CHECKING:
    from weft.inference.generation import Generation, Generator


class Inferring:
    """One rank of a job that infers. What is needed for it is made when it is first asked for.

    Args:
        model: the user's.
        workload, plan, grid: of the job.
        forwards: makes what computes a function of the model.
    """

    def __init__(
        self, model: nn.Module, workload: Workload, plan: Plan, grid: Grid, forwards: Callable[[Function], Forwards]
    ) -> None:
        self.model, self.workload, self.plan, self.grid = model, workload, plan, grid
        self._forwards = forwards

    def predict(self, batch: Any) -> Any:
        """What the workload predicts for a batch, the same on every rank: see ``Predictor.predict``."""
        return self.predictor.predict(batch)

    def predictions(self, batches: Iterable[Sequence[int]]) -> Iterator[Any]:
        """What it predicts for one batch of samples after the other, on rank 0: see ``Predictor.predictions``."""
        return self.predictor.predictions(batches)

    def generate(self, input_ids: Any, **settings: Any) -> Generation:
        """Tokens after each of some prompts: see ``Generator.generate``."""
        return self.generator.generate(input_ids, **settings)

    @cached_property
    def predictor(self) -> Predictor:
        """What predicts with the model."""
        return Predictor(self._forwards(predict_of(self.workload)), self.workload, self.plan, self.grid)

    @cached_property
    def generator(self) -> Generator:
        """What generates with the model."""
        from weft.inference.generation import Generator  # needs transformers

        return Generator(self.model, self.plan, self.grid, self._forwards)
