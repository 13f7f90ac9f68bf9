"""Predict: offline inference over a data set. Every sample's prediction is written once and in order, as it is made.

The batches are those of the workload's ``batch_size``, in the order of its data, under every plan; only whole batches
are kept (``inference.results``). So a run that was interrupted goes on with a batch it would have come to anyway, also
under another plan.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from weft.checkpoint.folder import candidates
from weft.cluster import Cluster
from weft.engines import parallelize
from weft.errors import InputError
from weft.inference import results
from weft.inference.columns import Kind
from weft.inference.formats import format_of
from weft.plan import Plan
from weft.planner import plan
from weft.runtime import memory
from weft.runtime.launch import launch
from weft.runtime.predictor import predict_of
from weft.runtime.worker import join
from weft.target import Target
from weft.workload import Workload

T = TypeVar("T")


class Watcher(Protocol):
    """Tells people what happens. Lives on rank 0."""

    def planned(self, plan: Plan) -> None:
        """The plan that will run."""

    def resumed(self, done: int, samples: int) -> None:
        """So many samples were predicted by an earlier run."""

    def progress(self, done: int, samples: int) -> None:
        """So many samples are predicted."""

    def publishing(self, output: str) -> None:
        """All are; the file is being made of its parts."""

    def close(self) -> None:
        """It is over."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to predict and where to; the same on every rank.

    Attributes:
        plan: what to run.
        output: file of the predictions, ``.parquet`` or ``.npy``.
        checkpoint: folder of weights that training saved; None: the workload's initial ones.
        limit: predict the first so many samples; None: all.
        resume: go on with an earlier run's file, if there is one.
        overwrite: begin anew, whatever is there.
        memory_bytes: limit of each device, or of one after the other; empty: none.
    """

    plan: Plan
    output: str
    checkpoint: str | None = None
    limit: int | None = None
    resume: bool = False
    overwrite: bool = False
    memory_bytes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit must be at least 1, got {self.limit}")

    @property
    def weights(self) -> str | None:
        """The checkpoint to load. Raises CheckpointError if the folder has none."""
        if self.checkpoint is None:
            return None
        return str(candidates(Path(self.checkpoint).resolve())[0])


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a run predicted: ``samples`` in all, of which this run did those from ``first_sample``, in ``seconds``.
    ``columns`` are empty where nothing was left to do."""

    output: str
    samples: int
    first_sample: int
    seconds: float
    samples_per_s: float | None
    columns: dict[str, Kind]
    measured_peak_bytes: list[int]
    plan: Plan

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        columns = {name: kind._asdict() for name, kind in self.columns.items()}
        return {**asdict(self), "columns": columns, "plan": self.plan.to_json()}


def run(target: Target, order: Order, watcher: Watcher) -> Prediction:
    """Predict on local devices; the watcher lives in the process of rank 0.

    Raises:
        InputError: what was asked for cannot be.
        WorkerError: a process died. What it had written stays, to go on from.
    """
    order = replace(order, checkpoint=order.weights)  # the newest now, whatever is saved meanwhile
    output, samples = Path(order.output), samples_of(target.load(), order)
    identity = {**identity_of(target, order), "samples": samples}
    form = format_of(output)
    results.check(output, samples, identity, form, resume=order.resume, overwrite=order.overwrite)
    result = launch(predict_here, target, order, watcher, devices=order.plan.devices, memory=order.memory_bytes)[0]
    assert isinstance(result, Prediction)
    return result


def predict_here(target: Target, order: Order, watcher: Watcher) -> Prediction:
    """Predict inside a launched job; every rank calls it. Columns are known on rank 0."""
    device = join()
    with memory.uncounted():  # the libraries and the data it brings are no memory of the plan
        workload = target.load()
    samples, size = samples_of(workload, order), workload.batch_size
    with contextlib.ExitStack() as stack:
        identity = identity_of(target, order)
        how = {"resume": order.resume, "overwrite": order.overwrite}
        opening = results.opened(Path(order.output), samples, identity, **how)
        sink = on_first(lambda: stack.enter_context(opening))
        begin, finished = told(sink.done, sink.finished) if sink else told()
        if sink:
            watcher.planned(order.plan)
            if begin:
                watcher.resumed(begin, samples)
        used = memory.of(device)
        if not finished:
            engine = parallelize(workload, order.plan, purpose="inference")
            if order.weights is not None:
                engine.load(order.weights)
        start = time.perf_counter()
        batches = [range(first, min(first + size, samples)) for first in range(begin, samples, size)]
        for numbers, predictions in zip(batches, engine.predictions(batches) if batches else (), strict=False):
            assert sink is not None  # of all ranks, rank 0 is given predictions
            sink.add(predictions, len(numbers))
            watcher.progress(sink.done, samples)
        peaks = [0] * dist.get_world_size()
        dist.all_gather_object(peaks, used.peak())
        if sink and not sink.finished:  # the others need not wait for it
            watcher.publishing(order.output)
            sink.publish()
        seconds = time.perf_counter() - start
        if sink:
            watcher.close()
        return Prediction(
            output=order.output,
            samples=samples,
            first_sample=begin,
            seconds=seconds,
            samples_per_s=(samples - begin) / seconds if samples > begin else None,
            columns=(sink.kinds if sink else None) or {},
            measured_peak_bytes=peaks,
            plan=order.plan,
        )


def on_first(make: Callable[[], T]) -> T | None:
    """What rank 0 makes, there; None on the others. All ranks call it, and all raise the InputError it raises."""
    made: T | None = None
    failed: list[InputError | None] = [None]
    if dist.get_rank() == 0:
        try:
            made = make()
        except InputError as error:  # all ranks must raise it, or they would wait for rank 0
            failed = [error]
    dist.broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        raise failed[0]
    return made


def told(done: int = 0, finished: bool = False) -> tuple[int, bool]:
    """What rank 0 knows, on every rank: samples done before, and whether the file is there."""
    known = [done, finished]
    dist.broadcast_object_list(known, src=0)
    return int(known[0]), bool(known[1])


def samples_of(workload: Workload, order: Order) -> int:
    """How many samples are predicted."""
    return min(len(workload.data), order.limit or len(workload.data))


def identity_of(target: Target, order: Order) -> dict[str, Any]:
    """What the predictions depend on, as far as a command line says it. How the model is divided is no part of it."""
    return {
        "target": str(target),
        "arguments": dict(target.arguments),
        "checkpoint": order.weights,
        "precision": order.plan.precision,
    }


def plan_for(workload: Workload, cluster: Cluster, constraints: Mapping[str, Any]) -> Plan:
    """The fastest plan for a workload's predictions.

    Raises:
        InputError: the workload does not say what to predict.
        PlanError: what is fixed cannot be.
        MemoryLimitError: nothing fits; the message says the least that would do.
    """
    predict_of(workload)
    return plan(workload, cluster, purpose="inference", **constraints)
