"""InferenceEngine: a plan running a model that is not trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from weft.inference.steps import next_token
from weft.plan import Plan
from weft.runtime import checkpoint, part
from weft.runtime.ending import Function
from weft.runtime.forwards import Forwards
from weft.runtime.grid import Grid
from weft.runtime.inferring import Inferring
from weft.runtime.placement import Placement
from weft.runtime.routes import Routes
from weft.runtime.worker import describe_stage, join
from weft.workload import Workload, no_loss

if TYPE_CHECKING:
    from weft.inference.generation import Generation


class InferenceEngine:
    """One rank of a plan that predicts or generates. Made by ``parallelize(workload, plan, purpose="inference")``.

    Nothing is kept for training: no gradients, no optimizer.

    Attributes:
        plan: the plan.
        grid: the ranks, seen from this one.
        model: the user's model in evaluation mode; what other ranks hold is absent from it.
    """

    def __init__(self, workload: Workload, plan: Plan) -> None:
        join()
        self.workload, self.plan = workload, plan
        self.grid = Grid.make(plan)
        describe_stage(self.grid.stage)
        first = Forwards.recordings_of(forward_of(workload), workload, plan)
        recording = first.longest(workload.sample_batch(plan.samples_per_microbatch))
        units = list(recording.units)
        stage_of = Routes.find(recording, plan).stage_of
        self.part = part.build(first.hand_over(), units, recording, stage_of, plan, self.grid)
        self.model: nn.Module = self.part.model
        placement = Placement(self.model, units, stage=self.grid.stage, mode=self.part.mode, device=self.grid.device)
        forwards = partial(
            Forwards,
            workload=workload,
            plan=plan,
            grid=self.grid,
            placement=placement,
            whole=self.part.whole,
            units=units,
            trained=False,
        )
        self.inferring = Inferring(self.model, workload, plan, self.grid, forwards)

    def predict(self, batch: Any) -> Any:
        """What the workload predicts for a batch: see ``Predictor.predict``. All ranks call it with the same batch."""
        return self.inferring.predict(batch)

    def predictions(self, batches: Iterable[Sequence[int]]) -> Iterator[Any]:
        """What it predicts for one batch of samples after the other, given on rank 0: see ``Predictor.predictions``.
        All ranks call it with the same batches."""
        return self.inferring.predictions(batches)

    def generate(self, input_ids: Any, **settings: Any) -> Generation:
        """Tokens after each of some prompts: see ``Generator.generate``. All ranks call it with the same prompts."""
        return self.inferring.generate(input_ids, **settings)

    def load(self, directory: str | Path) -> None:
        """Take the parameters and buffers of the newest checkpoint in ``directory`` (or of the one it is).

        Raises:
            CheckpointError: there is none, or it is of another model.
        """
        checkpoint.load_model(checkpoint.open_newest(Path(directory)), self.part)


def forward_of(workload: Workload) -> Function:
    """What tells which calls a workload's inference makes: its prediction, else its loss, else its next token."""
    if workload.predict is not None:
        return workload.predict
    return next_token if workload.loss is no_loss else workload.loss
