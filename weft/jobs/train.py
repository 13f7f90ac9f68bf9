"""Train: plan if there is no plan, run it, and tell what happens."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from weft.cluster import Cluster
from weft.engines import parallelize
from weft.errors import InputError
from weft.estimate import Difference, Estimate, Measurement, differences
from weft.jobs import saves
from weft.jobs.planned import Wanted, make_plan
from weft.jobs.saves import Saves
from weft.plan import Plan
from weft.runtime import memory, worker
from weft.runtime.engine import Engine
from weft.runtime.launch import launch_again
from weft.runtime.logbook import Logbook
from weft.runtime.meeting import Nodes
from weft.runtime.meter import Meter
from weft.runtime.nonfinite import NonFinite, looks
from weft.runtime.restarts import Death, Restarts
from weft.runtime.worker import join
from weft.target import Target

KEPT = 3
"""Checkpoints of a folder that stay, where nothing else is asked for."""

TIMEOUT_S = 120.0
"""Seconds that ranks wait for one another once training runs, where nothing else is asked for."""

LONGEST_S = 1e6
"""The longest that they may wait."""

SETTLE_STEPS = 6
"""Steps after which prediction and measurement are compared; the first warms up and does not count."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """What is logged once per interval. Rates are over the interval; memory is the peak so far, per rank, in bytes.
    ``learning_rates``: of the next step, those that differ; empty where no scheduler moves them."""

    step: int
    steps: int
    loss: float
    gradient_norm: float
    samples_per_s: float
    samples_per_s_per_device: float
    memory_bytes: list[int]
    left_s: float
    learning_rates: tuple[float, ...] = ()


class Watcher(Protocol):
    """Tells people what happens. Lives on rank 0."""

    def say(self, text: str) -> None:
        """Something worth knowing."""

    def planned(self, plan: Plan, estimate: Estimate | None) -> None:
        """The plan that will run."""

    def step(self, step: int, steps: int, loss: float | None) -> None:
        """A step is done; its loss is known at the ends of intervals."""

    def line(self, line: Line) -> None:
        """An interval is over."""

    def compared(self, estimate: Estimate, measurement: Measurement) -> None:
        """What was predicted and what was seen."""

    def close(self) -> None:
        """Training is over."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to train and how to watch it; the same on every rank.

    Attributes:
        steps: train up to this step, counted from the start of training; None: to the end of the first epoch.
        plan: what to run; None plans here, keeping ``constraints``.
        cluster: what to plan for; None measures these devices.
        memory_bytes: limit of each device, or of one after the other; empty: none.
        checkpoint: folder to save into; None does not.
        checkpoint_every: save every N steps too; None only at the end.
        keep: how many checkpoints of the folder stay.
        resume: continue from the newest checkpoint of the folder.
        restarts: how often processes are started again after they died.
        device_check: a command that fails for a device that is lost, whose number is in WEFT_DEVICE.
        nodes: machines of the job.
        log_every: steps per logged line.
        timeout_s: seconds a rank waits for another once training runs, or a start stands still, before the job fails.
        nonfinite: what becomes of a step whose numbers are not finite, as ``Engine.nonfinite``. Nobody watches a long
            run, so what PyTorch does (train on with weights that are NaN) is not what it does unasked.
        check_replicas: compare copies every so many steps, and before a checkpoint is written; 0: never.
    """

    steps: int | None = None
    plan: Plan | None = None
    cluster: Cluster | None = None
    constraints: Mapping[str, Any]
    memory_bytes: tuple[int, ...] = ()
    checkpoint: str | None = None
    checkpoint_every: int | None = None
    keep: int = KEPT
    resume: bool = False
    restarts: int = 0
    device_check: str | None = None
    nodes: Nodes = field(default_factory=Nodes)
    log_every: int = 10
    timeout_s: float = TIMEOUT_S
    nonfinite: NonFinite = "stop"
    check_replicas: int = 100

    def __post_init__(self) -> None:
        looks(self.nonfinite)
        if self.check_replicas < 0:
            raise InputError(f"check_replicas must be a number of steps, or 0 for never, got {self.check_replicas}")
        for name in ("steps", "checkpoint_every", "keep", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if not 0 < self.timeout_s <= LONGEST_S:
            raise InputError(
                f"--timeout must be above 0 s and at most {LONGEST_S:g} s, got {self.timeout_s:g}; leave it out for "
                f"{TIMEOUT_S:g} s"
            )
        if self.checkpoint is None and (self.resume or self.checkpoint_every):
            raise InputError("--resume and --checkpoint-every need a folder: add --checkpoint DIR")
        if not self.restarts and (self.device_check or self.nodes.least < self.nodes.most):
            raise InputError("devices and nodes that come and go start training again: add --restarts N")
        if self.restarts and not self.checkpoint_every:
            raise InputError("--restarts goes on from checkpoints: add --checkpoint DIR --checkpoint-every N")


@dataclass(frozen=True, kw_only=True)
class Training:
    """What training did. ``losses`` are those of this run's steps since processes were last started, None where one is
    not finite; ``first_step`` is where it began then, ``deaths`` why they were started again; ``skipped`` counts the
    steps since the start of training that were left out, their numbers not being finite; ``differences`` are the terms
    of the estimate that were off."""

    first_step: int
    steps: int
    losses: list[float | None]
    skipped: int
    deaths: list[Death] = field(default_factory=list, kw_only=True)
    samples_per_s: float | None
    measured_step_s: float | None
    measured_peak_bytes: list[int]
    plan: Plan
    estimate: Estimate | None
    measurement: Measurement | None
    differences: list[Difference]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **{k: v for k, v in asdict(self).items() if k not in ("plan", "estimate", "measurement")},
            "plan": self.plan.to_json(),
            "estimate": self.estimate.to_json() if self.estimate else None,
            "measurement": self.measurement.to_json() if self.measurement else None,
        }


def run(target: Target, order: Order, watcher: Watcher, *, devices: int) -> Training:
    """Train on local devices; the watcher lives in the process of rank 0.

    Raises:
        InputError: what was asked for cannot be.
        WorkerError: a process died.
    """
    saves.check_place(order.checkpoint, order.resume)
    restarts = Restarts(order.restarts, order.device_check, watcher.say, timeout_s=order.timeout_s)
    found = launch_again(
        train_here,
        target,
        order,
        watcher,
        restarts=restarts,
        nodes=order.nodes,
        devices=devices,
        memory=order.memory_bytes,
        # Measuring, planning and recording take one rank longer than another: until training runs, ranks are patient.
        timeout_s=max(worker.TIMEOUT_S, order.timeout_s),
    )
    result = replace(found[0], deaths=restarts.deaths)
    assert isinstance(result, Training)
    return result


def train_here(target: Target, order: Order, watcher: Watcher) -> Training:
    """Train inside a launched job; every rank calls it and gets the result.

    It may be called again after processes died: then it goes on from the newest checkpoint, with a plan for the devices
    that there are now.
    """
    device = join()
    Logbook.here().note("loading the workload")
    with memory.uncounted():  # the libraries and the data it brings are no memory of the plan
        workload = target.load()
    first = dist.get_rank() == 0
    wanted = Wanted(
        plan=order.plan,
        cluster=order.cluster,
        constraints=order.constraints,
        memory_bytes=order.memory_bytes,
        goes_on=Path(order.checkpoint) if order.restarts and order.checkpoint is not None else None,
    )
    memory.import_late()  # by all at once: rank 0 needs it to plan, and the others would do it after that
    planned = make_plan(target, wanted, watcher.say)
    plan, predicted = planned.plan, planned.estimate
    if first:
        for what, reason in planned.refused:
            watcher.say(f"left out: {what} {reason}")
        watcher.planned(plan, predicted)
    used = memory.of(device)  # after measuring and planning, which are no part of training
    engine = parallelize(workload, plan)
    engine.nonfinite = order.nonfinite
    checkpoints = Saves(engine, order.checkpoint, every=order.checkpoint_every, keep=order.keep, say=watcher.say)
    if order.restarts or order.resume:
        with heard(watcher):
            checkpoints.resume(required=not order.restarts)
    engine.limit_waiting(order.timeout_s)
    begin = engine.step_count
    end = order.steps if order.steps is not None else engine.steps_per_epoch
    if end < begin or (end == begin and not order.restarts):  # one that died when all was done has nothing left to do
        raise InputError(f"the checkpoint is of step {begin} and training goes to step {end}; raise --steps")
    meter = Meter(device, used, batch_size=plan.batch_size, stopwatch=engine.stopwatch)
    losses: list[Any] = []
    interval, told = time.perf_counter(), begin
    with checkpoints.finished():
        for step, batch in zip(range(begin + 1, end + 1), engine.batches(epochs=None), strict=False):
            logged = step % order.log_every == 0 or step == end
            warm = step > begin + 1
            if warm:
                meter.start()
            with heard(watcher):
                losses.append(engine.step(batch, gradient_norm=logged))
            if warm:
                meter.stop()
            if logged:
                line = log_line(engine, meter, losses[-1], step, end, step - told, time.perf_counter() - interval)
                interval, told = time.perf_counter(), step
            if first:
                watcher.step(step, end, float(losses[-1]) if logged else None)
                if logged:
                    watcher.line(line)
            if step == begin + SETTLE_STEPS and predicted is not None and step < end:
                seen = meter.measurement()
                if first:
                    watcher.compared(predicted, seen)
            if order.check_replicas and (step % order.check_replicas == 0 or checkpoints.due(step, end)):
                engine.check_replicas()
            checkpoints.after(step)
    checkpoints.last()
    measurement = meter.measurement() if meter.steps else None
    if first:
        if predicted and measurement:
            watcher.compared(predicted, measurement)
        watcher.close()
    return Training(
        first_step=begin,
        steps=end,
        losses=[value if math.isfinite(value := float(loss)) else None for loss in losses],
        skipped=engine.skipped,
        samples_per_s=measurement.samples_per_s if measurement else None,
        measured_step_s=measurement.step_time_s if measurement else None,
        measured_peak_bytes=measurement.peak_memory_bytes if measurement else everyones_peak(used),
        plan=plan,
        estimate=predicted,
        measurement=measurement,
        differences=differences(predicted, measurement) if predicted and measurement else [],
    )


@contextlib.contextmanager
def heard(watcher: Watcher) -> Iterator[None]:
    """Tell people of what is warned of inside."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        watcher.say(f"warning: {warning.message}")


def log_line(engine: Engine, meter: Meter, loss: Any, step: int, steps: int, done: int, elapsed_s: float) -> Line:
    """The line of an interval of ``done`` steps; all ranks call it."""
    rate = done * engine.plan.batch_size / elapsed_s
    assert engine.gradient_norm is not None
    return Line(
        step=step,
        steps=steps,
        loss=float(loss),
        gradient_norm=float(engine.gradient_norm),
        samples_per_s=rate,
        samples_per_s_per_device=rate / engine.plan.devices,
        memory_bytes=everyones_peak(meter.memory),
        left_s=(steps - step) * elapsed_s / done,
        learning_rates=learning_rates(engine),
    )


def learning_rates(engine: Engine) -> tuple[float, ...]:
    """The learning rates of the parameter groups, where a scheduler moves them."""
    if engine.scheduler is None:
        return ()
    return tuple(dict.fromkeys(float(rate) for rate in engine.scheduler.get_last_lr()))


def everyones_peak(used: memory.Memory) -> list[int]:
    """Peak bytes of every rank; all ranks call it."""
    peaks = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, used.peak())
    return peaks
