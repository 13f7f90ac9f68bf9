"""Compare: the same model from the same weights under one device, data, model and hybrid parallelism, really trained,
side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from weft.capture import capture
from weft.capture.profile import Profile
from weft.cluster import Cluster, measure
from weft.engines import parallelize
from weft.errors import InputError
from weft.estimate import Estimate, Measurement
from weft.jobs.reference import SingleDevice
from weft.plan import Plan
from weft.planner import Choice, Keywords, estimate, make_plan, search
from weft.precision import dtypes_of
from weft.quantity import format_bytes, format_seconds
from weft.runtime import memory
from weft.runtime.meter import Meter
from weft.runtime.pool import Pool
from weft.runtime.stopwatch import Stopwatch
from weft.runtime.worker import join
from weft.target import Target

WARM_UP = 1
"""Steps that are trained and not timed: buffers and connections are made."""

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many pieces of work are done and how many there are."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One strategy. Bytes and samples are as in Measurement; ``reason`` says why a strategy was not run."""

    strategy: str
    degrees: dict[str, int]
    microbatches: int | None = None
    predicted_step_s: float | None = None
    measured_step_s: float | None = None
    samples_per_s: float | None = None
    predicted_peak_bytes: float | None = None
    measured_peak_bytes: int | None = None
    bytes_sent_per_step: float | None = None
    idle_share: float | None = None
    losses: list[float] | None = None
    loss_deviation: float | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What ``compare`` found.

    Attributes:
        chosen: the degrees of the plan weft chose.
        rows: a strategy each.
        sentence: which is best here and what bound the others.
        step_time_error: mean absolute error of the predicted step times, as a share.
        plan: the plan weft chose.
    """

    chosen: str
    rows: list[Row]
    sentence: str
    step_time_error: float
    plan: Plan

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "plan": self.plan.to_json(), "rows": [asdict(row) for row in self.rows]}


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A row before it is run."""

    name: str
    plan: Plan | None
    predicted: Estimate | None
    reason: str | None = None


def run(
    target: Target,
    *,
    devices: int,
    memory_bytes: Sequence[int],
    steps: int,
    on_progress: Progress,
    fixed: Keywords | None = None,
) -> Comparison:
    """Measure this machine, plan, and train every strategy for ``steps`` timed steps on ``devices`` local devices.

    Args:
        target: what to train.
        devices: local devices to use.
        memory_bytes: limit of each, or of one after the other; empty: all there is.
        steps: timed steps of every strategy.
        on_progress: told what is being done.
        fixed: ``precision``, ``recompute`` and ``compile`` of every strategy's plan.

    Raises:
        InputError: the target cannot be compared on these devices.
        WorkerError: a process died.
    """
    if devices < 2:
        raise InputError(f"compare needs at least 2 devices, got {devices}; use --devices 4")
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    workload = target.load()
    fixed = fixed or {}
    precision = fixed.get("precision") or "float32"
    with Pool(devices, memory=memory_bytes) as pool:
        total = 9
        on_progress("measuring this machine", 0, total)
        cluster = pool.run(measure_here, memory_bytes, dtypes_of(precision))[0]
        on_progress("capturing the model", 1, total)
        profile = capture(workload, precision)
        choice, strategies = plan_all(profile, cluster, devices, fixed)
        rows: list[Row] = []
        seen: dict[str, tuple[Measurement, list[float]]] = {}
        for number, strategy in enumerate(strategies):
            on_progress(f"training: {strategy.name}", 2 + number, total)
            rows.append(run_strategy(pool, target, strategy, steps, rows, seen))
        on_progress("done", total, total)
    timed = [row for row in rows if row.measured_step_s and row.predicted_step_s]
    errors = [abs(row.predicted_step_s / row.measured_step_s - 1) for row in timed]  # type: ignore[operator]  # filtered above
    return Comparison(
        chosen=choice.plan.describe(),
        rows=rows,
        sentence=conclude(rows),
        step_time_error=sum(errors) / len(errors) if errors else 0.0,
        plan=choice.plan,
    )


def plan_all(profile: Profile, cluster: Cluster, devices: int, fixed: Keywords) -> tuple[Choice, list[Strategy]]:
    """The plan of every strategy, and weft's choice. One device is plain PyTorch: nothing is recomputed or compiled."""
    first = cluster.with_devices(1)
    alone = make_plan(profile, first)
    predicted = estimate(profile, first, alone)
    fits = max(predicted.peak_memory_bytes) <= first.memory_bytes
    reason = None if fits else needs(predicted, first)
    strategies = [Strategy(name="one device", plan=alone, predicted=predicted, reason=reason)]
    for name, dimension in (
        ("data", "dp_replicate"),
        ("sharded data", "dp_shard"),
        ("pipeline", "pp"),
        ("tensor", "tp"),
    ):
        strategies.append(searched(name, profile, cluster, [{**ONE, dimension: devices}], fixed))
    strategies.append(searched("hybrid", profile, cluster, hybrids(devices), fixed))
    choice = search(profile, cluster, **fixed)
    strategies.append(Strategy(name="chosen", plan=choice.plan, predicted=choice.estimate))
    return choice, strategies


ONE = {"pp": 1, "dp_replicate": 1, "dp_shard": 1, "tp": 1}


def hybrids(devices: int) -> list[dict[str, int]]:
    """Degrees with model parallelism inside and data parallelism outside."""
    splits = [(inner, devices // inner) for inner in range(2, devices) if devices % inner == 0]
    return [
        {**ONE, model: inner, data: outer}
        for inner, outer in splits
        for model in ("pp", "tp")
        for data in ("dp_replicate", "dp_shard")
    ]


def searched(name: str, profile: Profile, cluster: Cluster, choices: list[dict[str, int]], fixed: Keywords) -> Strategy:
    """The fastest plan with one of these degrees, or why there is none."""
    found, reasons = [], []
    for degrees in choices:
        try:
            found.append(search(profile, cluster, **cast(Keywords, {**degrees, **fixed})))
        except InputError as error:
            reasons.append(str(error))
    if not found:
        return Strategy(
            name=name, plan=None, predicted=None, reason=reasons[0] if reasons else "needs at least 4 devices"
        )
    best = min(found, key=lambda choice: choice.estimate.step_time_s)
    return Strategy(name=name, plan=best.plan, predicted=best.estimate)


def needs(predicted: Estimate, cluster: Cluster) -> str:
    """Why a plan does not fit."""
    return f"needs {format_bytes(max(predicted.peak_memory_bytes))} of {format_bytes(cluster.memory_bytes)}"


def run_strategy(
    pool: Pool,
    target: Target,
    strategy: Strategy,
    steps: int,
    rows: list[Row],
    seen: dict[str, tuple[Measurement, list[float]]],
) -> Row:
    """Train one strategy, unless it cannot be run or has been already."""
    plan, predicted = strategy.plan, strategy.predicted
    if plan is None or predicted is None or strategy.reason is not None:
        degrees = plan.degrees if plan else {}
        return Row(strategy=strategy.name, degrees=degrees, reason=strategy.reason)
    key = json.dumps(plan.to_json())
    if key not in seen:
        job = train_alone if plan.devices == 1 else train_plan
        seen[key] = pool.run(job, target, plan, steps, ranks=plan.devices)[0]
    measurement, losses = seen[key]
    alone = rows[0].losses if rows else losses
    return Row(
        strategy=strategy.name,
        degrees=plan.degrees,
        microbatches=plan.microbatches,
        predicted_step_s=predicted.step_time_s,
        measured_step_s=measurement.step_time_s,
        samples_per_s=measurement.samples_per_s,
        predicted_peak_bytes=max(predicted.peak_memory_bytes),
        measured_peak_bytes=max(measurement.peak_memory_bytes),
        bytes_sent_per_step=measurement.bytes_sent,
        idle_share=measurement.idle_share,
        losses=losses,
        loss_deviation=None if alone is None else max(abs(a - b) for a, b in zip(losses, alone, strict=True)),
    )


def measure_here(memory_bytes: Sequence[int], dtypes: tuple[str, ...]) -> Cluster:
    """Measure inside a job; every rank gets the cluster."""
    join()
    return measure(memory_bytes=memory_bytes, dtypes=dtypes)


def train_plan(target: Target, plan: Plan, steps: int) -> tuple[Measurement, list[float]]:
    """Train under a plan inside a job."""
    device = join()
    with memory.uncounted():  # what it imports is no memory of the plan
        workload = target.load()
    used = memory.of(device)
    engine = parallelize(workload, plan)
    meter = Meter(device, used, batch_size=plan.batch_size, stopwatch=engine.stopwatch)
    batches = engine.batches(epochs=None)
    return measure_steps(meter, steps, lambda: float(engine.step(next(batches))))


def train_alone(target: Target, plan: Plan, steps: int) -> tuple[Measurement, list[float]]:
    """Train on one device in plain PyTorch inside a job of one."""
    device = join()
    with memory.uncounted():
        workload = target.load()
    used = memory.of(device)
    single = SingleDevice(workload, device, plan=plan)
    meter = Meter(device, used, batch_size=plan.batch_size, stopwatch=Stopwatch(device))
    results = single.steps(WARM_UP + steps)
    return measure_steps(meter, steps, lambda: next(results).loss)


def measure_steps(meter: Meter, steps: int, step: Callable[[], float]) -> tuple[Measurement, list[float]]:
    """Train the warm-up and then the timed steps; every rank gets the measurement and all losses."""
    losses = [step() for _ in range(WARM_UP)]
    for _ in range(steps):
        meter.start()
        losses.append(step())
        meter.stop()
    return meter.measurement(), losses


def conclude(rows: list[Row]) -> str:
    """Which plan is best here, and what bound the others."""
    timed = [row for row in rows if row.measured_step_s is not None and row.strategy != "chosen"]
    chosen = next(row for row in rows if row.strategy == "chosen")
    assert timed
    assert chosen.measured_step_s is not None
    best = min([*timed, chosen], key=seconds)  # the first of equals: the strategy's own name
    parts = [f"Best here: {label(best)}, {format_seconds(seconds(best))} per step"]
    if best.degrees == chosen.degrees:
        parts.append("it is the plan weft chose")
    else:
        parts.append(f"weft chose {degrees_of(chosen)}, {format_seconds(seconds(chosen))}")
    bounds = [
        f"{row.strategy}: {bound(row, best)}"
        for row in rows
        if row.degrees != best.degrees and row.strategy != "chosen"
    ]
    return "; ".join(parts) + ". What bound the others: " + "; ".join(bounds) + "."


def seconds(row: Row) -> float:
    """Measured step time."""
    assert row.measured_step_s is not None
    return row.measured_step_s


def label(row: Row) -> str:
    """A strategy with its degrees."""
    return f"{row.strategy} ({degrees})" if (degrees := degrees_of(row)) else row.strategy


def degrees_of(row: Row) -> str:
    """The degrees above one."""
    return " ".join(f"{name}={degree}" for name, degree in row.degrees.items() if degree > 1)


def bound(row: Row, best: Row) -> str:
    """What kept a strategy from being the best, in a few words."""
    if row.reason is not None:
        return row.reason
    slower = f"{seconds(row) / seconds(best):.2f} times the step"
    if math.prod(row.degrees.values()) == 1:
        return f"{slower}, one device does all the work"
    idle, sent = row.idle_share or 0.0, row.bytes_sent_per_step or 0.0
    if idle > 0.25:
        return f"{slower}, devices sat idle {idle:.0%} of the time"
    return f"{slower}, each device sent {format_bytes(sent)} per step"
