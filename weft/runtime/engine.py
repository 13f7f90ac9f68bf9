"""Engine: a plan running. The only thing a training loop touches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from weft.containers import opened
from weft.errors import InputError, PlanError
from weft.plan import Plan
from weft.precision import in_precision
from weft.runtime import agreement, checkpoint, part, replicas, totals
from weft.runtime.batches import Batch, Sampler, divide
from weft.runtime.buffers import Buffers
from weft.runtime.ending import Ending
from weft.runtime.failure import named
from weft.runtime.forwards import Forwards
from weft.runtime.gather import gather
from weft.runtime.grid import Grid
from weft.runtime.inferring import Inferring
from weft.runtime.logbook import Logbook
from weft.runtime.nonfinite import Judge, NonFinite, looks, warn_of_first
from weft.runtime.optimizer import make_optimizer, make_scheduler, restored
from weft.runtime.pipeline import Pipeline
from weft.runtime.placement import Placement
from weft.runtime.recordings import Recordings
from weft.runtime.routes import Routes
from weft.runtime.saver import Saver
from weft.runtime.scaling import LossScale
from weft.runtime.stopwatch import Stopwatch
from weft.runtime.worker import TIMEOUT_S, describe_stage, join
from weft.workload import Workload, no_loss

if TYPE_CHECKING:
    from weft.inference.generation import Generation


LOOP = "after it, in the training loop"
"""What a rank does that is not in a step."""
SKIPPED = "engine.skipped"
"""What the number of steps that were left out is called among a checkpoint's values."""


class Engine:
    """One rank of a plan that trains. Made by ``parallelize``.

    Attributes:
        plan: the plan.
        grid: the ranks, seen from this one.
        recordings: of its loss.
        model: the user's model; what other ranks hold is absent from it.
        optimizer: the user's optimizer over what this rank holds.
        scheduler: the user's learning-rate scheduler, or None; it steps with every step.
        step_count: steps done.
        logbook: what this rank is doing, for others to read.
        stopwatch: what steps go to besides computing, while it is on.
        gradient_norm: global L2 norm of the last step's gradients before clipping; None where it was not needed.
        loss_scale: what float16 needs; None in other precisions. A step whose gradients overflow (``loss_scale.finite``
            is False) changes no parameter.
        nonfinite: what becomes of a step whose loss or gradient is NaN or infinite. ``"ignore"``: it is taken, as in
            PyTorch. ``"skip"``: it is left out, with a warning; parameters, buffers, optimizer and scheduler stay as
            they are, and training goes on with the next batch. ``"stop"``: ``step`` raises, and all of them stay as
            they are. The last two wait for the device once in every step.
        skipped: steps that were left out, overflows of float16 among them.
    """

    nonfinite: NonFinite = "ignore"

    def __init__(self, workload: Workload, plan: Plan) -> None:
        if plan.batch_size != workload.batch_size:
            raise PlanError(
                f"the plan is for batches of {plan.batch_size} samples but the workload's are of "
                f"{workload.batch_size}; make the plan again, or set the workload's batch_size"
            )
        join()
        self.logbook = Logbook.here()
        agreement.on_plan(plan, self.logbook)
        written = workload.loss
        workload = in_precision(workload, plan.precision)
        self.workload, self.plan = workload, plan
        self.grid = Grid.make(plan)
        describe_stage(self.grid.stage)
        self.logbook.introduce(stage=self.grid.stage, pipeline=self.grid.pipeline)
        self.step_count = self.skipped = 0
        self.stopwatch = Stopwatch(self.grid.device, inside=max(plan.tp, plan.dp_shard) > 1)
        self.gradient_norm: Tensor | None = None
        self._sampler, self._saver = Sampler(workload), Saver()
        self._agreed = False
        self._timeout: timedelta | None = None
        self.recordings = Recordings(workload)
        self._first = self.recordings.longest(workload.sample_batch(plan.samples_per_microbatch))
        agreement.on_model(self.recordings.fake.model, self._first, self.logbook)
        units = list(self._first.units)
        stage_of = Routes.find(self._first, plan).stage_of
        fake = self.recordings.hand_over()
        parameters = dict(fake.model.named_parameters())
        self.logbook.note("making the parameters")
        self.part = part.build(fake, units, self._first, stage_of, plan, self.grid)
        parameters |= {h.name: h.parameter for h in self.part.held}
        self.model = self.part.model
        self.optimizer = make_optimizer(workload, parameters.items())
        self.scheduler = make_scheduler(workload, self.optimizer)
        if unknown := sorted(set(plan.recompute) - set(units)):
            raise PlanError(f"the plan recomputes {unknown[0]!r}, which is no unit of this model; make the plan again")
        here = {call.unit for call, s in zip(self._first.calls, stage_of, strict=True) if s == self.grid.stage}
        names, watch = self.part.buffer_names, self.recordings.watch
        self._buffers = Buffers(self.model, names, watch, self._first, stage_of, plan, self.grid)
        ending = Ending(self.model, written) if plan.pp > 1 else None
        if ending is not None:
            workload = replace(workload, loss=ending.of(workload.loss))
        if self.part.whole is not None:
            workload = replace(workload, loss=self.part.whole.of(workload.loss))
        placement = Placement(
            self.model,
            units,
            stage=self.grid.stage,
            mode=self.part.mode,
            device=self.grid.device,
            recompute=plan.recompute,
            compiled=here if plan.compile else (),
            logbook=self.logbook,
        )
        self._pipeline = Pipeline(
            workload,
            plan,
            self.grid,
            placement=placement,
            data_parallel=self.part.data_parallel,
            buffers=self._buffers,
            record=self.recordings.of,
            stopwatch=self.stopwatch,
            logbook=self.logbook,
            ending=ending,
        )
        self.loss_scale = LossScale() if plan.precision == "fp16" else None
        self._judge = Judge(self._pipeline, self.part.held, self.grid, self.loss_scale)
        plain = replace(self.workload, loss=no_loss)
        forwards = partial(
            Forwards,
            workload=plain,
            plan=plan,
            grid=self.grid,
            placement=placement,
            whole=self.part.whole,
            units=units,
            trained=True,
        )
        self.inferring = Inferring(self.model, plain, plan, self.grid, forwards)

    def batches(self, epochs: int | None = 1) -> Iterator[Batch]:
        """This rank's part of every batch from where training stands to the end of the epoch (``epochs=None``: for
        ever).

        The samples and their order are those of a single device: they depend on the workload's seed alone.
        """
        per_epoch = self._sampler.steps_per_epoch
        step = self.step_count
        last = None if epochs is None else (step // per_epoch + epochs) * per_epoch
        while last is None or step < last:
            yield self._sampler.load(step, self.grid.replica, self.plan.portions, self.plan.microbatches)
            step += 1

    @named
    def step(self, batch: Any, *, gradient_norm: bool = False) -> Tensor:
        """One optimizer step.

        Args:
            batch: what ``batches`` gave, or a whole global batch (the same on every rank), which is divided here.
            gradient_norm: compute the norm even if nothing is clipped.

        Returns:
            The mean loss over the global batch, a float64 scalar, the same on every rank.

        Raises:
            BatchError: a batch whose tensors do not share a dimension of samples.
            LossError: the loss is neither a scalar nor ``(sum, count)``.
            DisagreementError: the ranks' first batches differ in more than their samples.
            StuckError: another rank was waited for too long, and nobody above this process would say so.
            NonFiniteError: with ``nonfinite="stop"``, on every rank: loss or gradients are not finite.
            InputError: there is no such ``nonfinite``.
        """
        self.logbook.begin_step(self.step_count)
        watched = looks(self.nonfinite)
        if not isinstance(batch, Batch):
            batch = divide(
                opened(batch),
                replica=self.grid.replica,
                shares=self.plan.portions,
                microbatches=self.plan.microbatches,
            )
        if not self._agreed:
            agreement.on_batch(batch, self.grid.replica, self.logbook)
        self.optimizer.zero_grad(set_to_none=True)
        first = self.step_count == 0 and not watched
        kept = self._pipeline.buffers.kept() if watched else {}
        self._pipeline.scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        sums = self._pipeline.run(batch, self.step_count, check=first)
        if first:
            warn_of_first(sums.unfinite, self._first.calls, self.grid.device)
        self.logbook.note("summing gradients of what several ranks hold", waiting=True)
        with self.stopwatch.time("waiting"):
            totals.sum_copies(self.part.held)
        self.logbook.note("agreeing on the loss and the norm of the gradients", waiting=True)
        with self.stopwatch.time("optimizer"):
            agreed = totals.agree(
                sums,
                self.part.held,
                self.grid,
                adds_loss=self.grid.stage == self.plan.pp - 1 and self.grid.index("tp") == 0,
                max_norm=self.workload.max_grad_norm,
                want_norm=gradient_norm or watched,
                scale=self.loss_scale,
                stopwatch=self.stopwatch,
            )
            self.logbook.note("in the optimizer")
            self.gradient_norm = agreed.norm
            if self._judge.takes(agreed, batch, self.step_count, self.nonfinite, kept):
                self._saver.settle()
                self.optimizer.step()
                if self.scheduler is not None:
                    self.scheduler.step()
            else:
                self.skipped += 1
        self.step_count += 1
        if not self._agreed:
            self._agreed = True
            self._limit_waiting()
        self.logbook.note(LOOP)
        return agreed.loss

    def check_replicas(self) -> None:
        """Compare the parameters and buffers that several ranks hold, by a checksum of their bits: see ``replicas`` for
        what that finds. All ranks call it.

        Raises:
            ReplicaError: on every rank: some are no longer equal.
        """
        replicas.check(self.part, self.grid, self.step_count)

    def limit_waiting(self, timeout_s: float) -> None:
        """From the second step of this process on, a rank waits so many seconds for another one, and then fails. The
        first may take longer, on some ranks more than on others: it records and compiles. All ranks call this."""
        if timeout_s <= 0:
            raise InputError(f"the timeout must be above 0 s, got {timeout_s:g}; leave it out for {TIMEOUT_S:g} s")
        self._timeout = timedelta(seconds=timeout_s)
        if self._agreed:
            self._limit_waiting()

    def predict(self, batch: Any) -> Any:
        """What the workload predicts for a batch, with the parameters as they are now, in evaluation mode: see
        ``Predictor.predict``. All ranks call it with the same batch."""
        return self.inferring.predict(batch)

    def predictions(self, batches: Iterable[Sequence[int]]) -> Iterator[Any]:
        """What it predicts for one batch of samples after the other, given on rank 0: see ``Predictor.predictions``.
        All ranks call it with the same batches."""
        return self.inferring.predictions(batches)

    def generate(self, input_ids: Any, **settings: Any) -> Generation:
        """Tokens after each of some prompts, with the parameters as they are now: see ``Generator.generate``. All
        ranks call it with the same prompts."""
        return self.inferring.generate(input_ids, **settings)

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch, the partial last one included."""
        return self._sampler.steps_per_epoch

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers as one device has them: whole, on the CPU, under single-device names.

        All ranks call it; rank 0 gets the tensors, the others an empty dict (as PyTorch's full state dicts do).
        """
        mine = {h.name: h.parameter.detach() for h in self.part.held} | self.part.buffers
        return gather(mine, self.part.divisions, self.grid)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the last step, averaged and clipped, gathered as ``state_dict`` does."""
        mine = {h.name: h.parameter.grad for h in self.part.held if h.parameter.grad is not None}
        return gather(mine, self.part.divisions, self.grid)

    def save(self, directory: str | Path, *, keep: int | None = None, wait: bool = True) -> Path:
        """Write a checkpoint into ``directory/step-N``; all ranks call it. The folder appears when it is complete.

        Args:
            directory: of checkpoints, the same for all ranks.
            keep: how many of its checkpoints up to this one stay, this one included; None: all.
            wait: until it is written. False goes on with training beside a thread, for which the next ``save``, or
                ``finish_saving``, waits, and the next step's optimizer until it has copies: until then nothing else may
                change parameters. Under a limit of memory it waits all the same.

        Returns:
            its folder.

        Raises:
            SaveError: it, or the one on its way before it, could not be written. Earlier ones are as they were.
            CheckpointError: the optimizer keeps what no checkpoint can hold.
        """
        scale = self.loss_scale.state() if self.loss_scale else None
        index = checkpoint.index_of(self.step_count, self.plan, self.part, self.optimizer, self.scheduler, scale)
        index.values.update({SKIPPED: self.skipped, **self._sampler.facts})
        pieces = checkpoint.pieces_of(self.part, self.optimizer)
        self.logbook.note("saving a checkpoint", waiting=True)
        path = self._saver.save(Path(directory), pieces, index, keep=keep, wait=wait)
        self.logbook.note(LOOP)
        return path

    def finish_saving(self) -> None:
        """Wait until the checkpoint on its way is written, if there is one.

        Raises:
            SaveError: it could not be.
        """
        self._saver.wait()

    def load(self, directory: str | Path) -> None:
        """Continue from the newest checkpoint in ``directory`` (that of the highest step; or from the one it is),
        whatever plan wrote it; all ranks call it. One that is damaged is passed over with a warning.

        Raises:
            CheckpointError: there is none, or it is of another model.
        """
        self.logbook.note("loading a checkpoint")
        self._saver.settle()
        found = checkpoint.open_newest(Path(directory))
        checkpoint.load_model(found, self.part)
        checkpoint.load_optimizer(found, self.part, self.optimizer)
        self.step_count = found.index.step
        self.skipped = skipped if type(skipped := found.index.values.get(SKIPPED)) is int else 0
        self._sampler.compare(found.index.values)
        if self.loss_scale is not None and found.index.loss_scale is not None:
            self.loss_scale.restore(found.index.loss_scale)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(restored(self.scheduler.state_dict(), found.index.scheduler))

    def _limit_waiting(self) -> None:
        """Give all that training waits for its timeout."""
        if self._timeout is not None:
            groups = [self._buffers.group, *(group for held in self.part.held for group in held.groups)]
            self.grid.limit_waiting(self._timeout, [group for group in groups if group is not None])
            self._pipeline.timeout = self._timeout if self.grid.device.type == "cpu" else None
            self.logbook.introduce(
                stage=self.grid.stage, pipeline=self.grid.pipeline, timeout_s=self._timeout.total_seconds()
            )
