"""Verify: a plan against one device: loss, gradients and updated parameters, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weft.errors import InputError
from weft.jobs.reference import SingleDevice, in_dtype
from weft.plan import Plan
from weft.runtime.engine import parallelize
from weft.runtime.launch import launch
from weft.runtime.totals import local
from weft.target import Target
from weft.workload import Workload

TOLERANCES = {"float64": 1e-10, "float32": 1e-5}
"""Largest relative error that counts as equal: sums over devices are made in another order, nothing else may differ."""

FLOOR = 1e-6
"""A tensor's norm counts as at least this share of the norm of all of them together: some gradients are zero but for
rounding (the bias of attention keys), and rounding over rounding says nothing."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How far a plan was from one device.

    Attributes:
        ok: every error is within the tolerance.
        steps: optimizer steps compared.
        dtype: of parameters and arithmetic.
        tolerance: what counts as equal.
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


def relative_error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest ``|ours - theirs| / |theirs|`` over tensors in L2 norm, and the name of the tensor.

    A tensor that one side has and the other has not is an infinite error.
    """
    if missing := sorted(set(ours) ^ set(theirs)):
        return float("inf"), missing[0]
    norms = {name: float(tensor.double().norm()) for name, tensor in theirs.items()}
    floor = FLOOR * sum(norm**2 for norm in norms.values()) ** 0.5
    worst, where = 0.0, ""
    for name, tensor in theirs.items():
        distance = float((ours[name].double() - tensor.double().cpu()).norm())
        error = distance / max(norms[name], floor) if distance else 0.0
        if not error <= worst:  # a NaN is worse than anything
            worst, where = error, name
    return worst, where


def verify_here(workload: Workload, plan: Plan, *, steps: int, dtype: str) -> Verification | None:
    """Verify inside a launched job; every rank calls it, rank 0 gets the result."""
    if dtype not in TOLERANCES:
        raise InputError(f"dtype must be one of {', '.join(TOLERANCES)}, got {dtype!r}")
    workload = in_dtype(workload, getattr(torch, dtype))
    engine = parallelize(workload, plan)
    held = sum(local(entry.parameter).nbytes for entry in engine.part.held)
    held_by_rank: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(held_by_rank, held)
    first = dist.get_rank() == 0
    reference = SingleDevice(workload, engine.grid.device, plan=plan) if first else None
    expected = reference.steps(steps) if reference else None
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
            found = relative_error(gradients, step.gradients)
            worst_gradient = found if not found[0] <= worst_gradient[0] else worst_gradient
    state = engine.state_dict()
    if reference is None:
        return None
    theirs = {n: t.detach() for n, t in reference.model.named_parameters()} | dict(reference.model.named_buffers())
    worst_parameter = relative_error(state, theirs)
    tolerance = TOLERANCES[dtype]
    errors = (loss_error, worst_gradient[0], worst_parameter[0])
    return Verification(
        ok=all(error <= tolerance for error in errors),
        steps=steps,
        dtype=dtype,
        tolerance=tolerance,
        loss_error=loss_error,
        gradient_error=worst_gradient[0],
        parameter_error=worst_parameter[0],
        worst_gradient=worst_gradient[1],
        worst_parameter=worst_parameter[1],
        parameter_bytes=held_by_rank,
        losses=losses,
    )


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
        dtype: ``"float64"`` (errors up to 1e-10 are rounding) or ``"float32"`` (1e-5).

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
