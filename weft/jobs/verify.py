"""Verify: a plan against one device: loss, gradients and updated parameters, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from weft.engines import parallelize
from weft.errors import InputError
from weft.jobs.noise import Noise
from weft.jobs.reference import FLOOR, SingleDevice, in_dtype, relative_error
from weft.plan import Plan
from weft.precision import DTYPES
from weft.runtime.dtensor import local
from weft.runtime.launch import launch
from weft.target import Target
from weft.workload import Workload

TOLERANCES = {"float64": 1e-10, "float32": 1e-5}
"""Largest relative error that counts as equal: sums over devices are made in another order, nothing else may differ. In
a lower precision it is measured (``noise``)."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How far a plan was from one device.

    Attributes:
        ok: every error is within the tolerance.
        steps: optimizer steps compared.
        dtype: of parameters and arithmetic, or the lower precision of the operations.
        tolerance: what counts as equal, of gradients where it is measured.
        loss_error, gradient_error, parameter_error: largest relative errors; the last two per tensor norm, over all
            steps.
        worst_gradient, worst_parameter: names of the tensors they were seen in.
        parameter_bytes: bytes of parameters each rank held.
        losses: of the plan.
    """

    ok: bool
    steps: int
    dtype: str
    tolerance: float
    loss_error: float
    gradient_error: float
    parameter_error: float
    worst_gradient: str
    worst_parameter: str
    parameter_bytes: list[int]
    losses: list[float]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def verify_here(workload: Workload, plan: Plan, *, steps: int, dtype: str) -> Verification | None:
    """Verify inside a launched job; every rank calls it, rank 0 gets the result."""
    workload, plan = _in(workload, plan, dtype)
    engine = parallelize(workload, plan)
    held = sum(local(entry.parameter).nbytes for entry in engine.part.held)
    held_by_rank: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(held_by_rank, held)
    first = dist.get_rank() == 0
    device, recordings = engine.grid.device, engine.recordings
    reference = SingleDevice(workload, device, plan=plan, recordings=recordings) if first else None
    expected = reference.steps(steps) if reference else None
    noise = Noise(workload, engine.grid.device, plan) if first and plan.precision != "float32" else None
    floor = noise.floor if noise else FLOOR.get(dtype, 0.0)  # of use on rank 0 alone
    losses: list[float] = []
    loss_error, worst_gradient = 0.0, (0.0, "")
    batches = engine.batches(epochs=None)
    for _ in range(steps):
        losses.append(float(engine.step(next(batches))))
        gradients = engine.gradients()
        if expected:
            step = next(expected)
            error = abs(losses[-1] - step.loss) / max(abs(step.loss), 1e-300)
            loss_error = error if not error <= loss_error else loss_error
            taken = engine.loss_scale is None or engine.loss_scale.finite
            found = relative_error(gradients, step.gradients, floor) if taken else (0.0, "")
            if taken != step.taken:
                found = (float("inf"), "a step that only one of them took")
            worst_gradient = found if not found[0] <= worst_gradient[0] else worst_gradient
            if noise:
                noise.step(step)
    state = engine.state_dict()
    if reference is None:
        return None
    worst_parameter = relative_error(state, reference.state(), floor)
    tolerances = noise.tolerances(reference) if noise else (TOLERANCES[dtype],) * 3
    errors = (loss_error, worst_gradient[0], worst_parameter[0])
    return Verification(
        ok=all(error <= tolerance for error, tolerance in zip(errors, tolerances, strict=True)),
        steps=steps,
        dtype=dtype,
        tolerance=tolerances[1],
        loss_error=loss_error,
        gradient_error=worst_gradient[0],
        parameter_error=worst_parameter[0],
        worst_gradient=worst_gradient[1],
        worst_parameter=worst_parameter[1],
        parameter_bytes=held_by_rank,
        losses=losses,
    )


def _in(workload: Workload, plan: Plan, dtype: str) -> tuple[Workload, Plan]:
    """What is compared: the plan's own lower precision, or all of it in one dtype, which shows the division alone: in
    float64 the plan is not compiled either, since rounding is changed to float64 underneath the model.

    Raises:
        InputError: an unknown dtype, or a lower precision that is not the plan's.
    """
    if dtype in TOLERANCES:
        compiled = plan.compile and dtype == "float32"
        return in_dtype(workload, getattr(torch, dtype)), replace(plan, precision="float32", compile=compiled)
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join((*TOLERANCES, *DTYPES))}, got {dtype!r}")
    if plan.precision != dtype:
        raise InputError(
            f"dtype {dtype} needs a plan in {dtype}, and this one is in {plan.precision}; plan with --precision {dtype}"
        )
    return workload, plan


def run(target: Target, plan: Plan, *, steps: int, dtype: str) -> Verification:
    """Verify a TARGET on local devices.

    Raises:
        InputError: what was asked for cannot be.
        WorkerError: a process died.
    """
    return launched(target.load, plan, steps, dtype)


def verify(workload: Workload, plan: Plan, *, steps: int = 3, dtype: str = "float64") -> Verification:
    """Verify on local devices that a plan gives what one device gives.

    Args:
        workload: it crosses to the processes with its functions.
        plan: the plan; as many processes as it has devices are started.
        steps: optimizer steps to compare.
        dtype: ``"float64"`` (errors up to 1e-10 are rounding) or ``"float32"`` (1e-5), whatever the plan's precision
            is; or its lower precision: errors up to twice one device's own distance from float32 are rounding.

    Raises:
        InputError: what was asked for cannot be.
        WorkerError: a process died.
    """
    return launched(lambda: workload, plan, steps, dtype)


def launched(load: Callable[[], Workload], plan: Plan, steps: int, dtype: str) -> Verification:
    """Verify in processes of its own, each of which loads the workload."""
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")

    def here() -> Verification | None:
        return verify_here(load(), plan, steps=steps, dtype=dtype)

    result = launch(here, devices=plan.devices)[0]
    assert isinstance(result, Verification)
    return result
