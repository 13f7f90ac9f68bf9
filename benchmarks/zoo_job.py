"""What the worker processes of ``zoo.py`` do: plan an architecture, and run a plan against one device.

``prepare`` and ``check`` are called in every process of a run; the model is built where it runs. A process that exceeds
its time is ended by its own alarm, whatever it hangs in.
"""

from __future__ import annotations

import contextlib
import math
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import zoo_models
from torch import Tensor

import weft
from weft.capture import Profile, capture
from weft.capture.initial import build_fake
from weft.capture.profile import LOSS
from weft.cluster import Cluster
from weft.engines import parallelize
from weft.errors import WeftError
from weft.jobs.reference import ReferenceStep, SingleDevice, in_dtype
from weft.jobs.verify import relative_error
from weft.plan import Plan
from weft.planner import make_plan
from weft.runtime.totals import local

TOLERANCES = {"float32": 1e-4, "float64": 1e-7}
"""Relative per norm. Where float32 differs by more, float64 tells rounding from a mistake: a bias before a
normalisation has a gradient that is zero but for it."""
MICROBATCHES = 2
LARGEST_SHARE = 1.3
"""Of what an even division leaves on a process, on the largest one: 0.65 of the parameters where there are two."""
_references: dict[tuple[Any, ...], ReferenceStep] = {}


@dataclass(frozen=True)
class Case:
    """One architecture: its name and the index of the recipe that makes it small."""

    name: str
    recipe: int | None = None

    def build(self) -> tuple[weft.Workload, int | None]:
        """Its workload, and the recipe that was taken."""
        warnings.filterwarnings("ignore")
        factory = zoo_models.models()[self.name]
        if isinstance(factory, zoo_models.Architecture):
            return factory.build(self.recipe)
        workload = factory()
        if self.recipe is None:
            zoo_models.try_once(workload)
        return workload, 0


@dataclass(frozen=True)
class Prepared:
    """An architecture that runs on one process.

    Attributes:
        recipe: that makes it small.
        plans: by name of the kind; the reason where there is none.
        reads: parameters each call reads, by name of the call.
        sizes: elements of parameters, by name.
    """

    recipe: int | None
    plans: dict[str, Plan | str]
    reads: dict[str, frozenset[str]]
    sizes: dict[str, int]


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """End this process if it is still busy then, whatever it hangs in."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def prepare(case: Case, kinds: dict[str, dict[str, int]], seconds: int) -> Prepared | str:
    """Find a recipe, capture, and plan every kind; in one process.

    Returns:
        a line where the architecture does not run on one process.
    """
    with limited(seconds):
        try:
            workload, recipe = case.build()
        except Exception as error:  # a model of any kind: whatever it raises is why it does not run on one process
            return zoo_models.message(error)
        try:
            profile = capture(workload)
        except Exception as error:  # what is measured here: a failure of ours is a result
            return Prepared(recipe, dict.fromkeys(kinds, f"capture: {line(error)}"), {}, {})
        plans = {kind: _plan(profile, degrees) for kind, degrees in kinds.items()}
        reads = {call.name: frozenset(call.parameters) for call in profile.calls}
        model = build_fake(workload.model, workload.seed).model
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        return Prepared(recipe, plans, reads, sizes)


def _plan(profile: Profile, degrees: dict[str, int]) -> Plan | str:
    try:
        return make_plan(
            profile, Cluster.local(devices=math.prod(degrees.values())), microbatches=MICROBATCHES, **degrees
        )
    except Exception as error:  # what is measured here: a failure of ours is a result
        return f"plan: {line(error)}"


def line(error: BaseException) -> str:
    """One line that says what went wrong; the type too where the error is not one of weft's own."""
    text = " ".join(str(error).split())
    return text if isinstance(error, WeftError) else f"{type(error).__name__}: {text}"


def check(case: Case, plan: Plan, prepared: Prepared, dtype: str, seconds: int) -> tuple[str, str]:
    """One step under a plan against one device, in every process of a run.

    Returns:
        on rank 0 why the step is not one device's, and why the plan did not divide the model; "" where all is well.
    """
    with limited(seconds):
        engine = parallelize(_in_dtype(case, dtype), plan)
        loss = float(engine.step(next(engine.batches(epochs=None))))
        gradients = engine.gradients()
        held = {entry.name: local(entry.parameter).numel() for entry in engine.part.held}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (engine.grid.stage, held))
        if dist.get_rank():
            return "", ""
        expected = _reference(case, plan, dtype, engine.grid.device)
        return _unequal(loss, gradients, expected, TOLERANCES[dtype]), not_divided(plan, prepared, everyone)


def _in_dtype(case: Case, dtype: str) -> weft.Workload:
    workload, _ = case.build()
    return workload if dtype == "float32" else in_dtype(workload, getattr(torch, dtype))


def _reference(case: Case, plan: Plan, dtype: str, device: torch.device) -> ReferenceStep:
    """The single device's step; kept for the next plan that cuts the batch alike."""
    key = (case, plan.replicas, plan.microbatches, dtype)
    if key not in _references:
        if any(other[0] != case for other in _references):
            _references.clear()
        _references[key] = next(SingleDevice(_in_dtype(case, dtype), device, plan=plan).steps(1))
    return _references[key]


def _unequal(loss: float, gradients: dict[str, Tensor], expected: ReferenceStep, tolerance: float) -> str:
    """Why a step is not the single device's, "" where it is."""
    error = abs(loss - expected.loss) / max(abs(expected.loss), 1e-30)
    if not error <= tolerance:
        return f"loss differs by {error:.1e} of it"
    error, where = relative_error(gradients, expected.gradients)
    if error == float("inf"):
        return f"gradient of {where} is {'missing' if where in expected.gradients else 'not one of the single device'}"
    return "" if error <= tolerance else f"gradient of {where} differs by {error:.1e} of its norm"


def not_divided(plan: Plan, prepared: Prepared, everyone: list[tuple[int, dict[str, int]]]) -> str:
    """Why a plan did not really divide the model, "" where it did.

    Args:
        plan, prepared: what ran.
        everyone: by rank the stage, and the elements held of each parameter.
    """
    total = sum(prepared.sizes.values())
    if plan.pp > 1:
        reads = [frozenset().union(*(prepared.reads[call] for call in calls)) for calls in plan.stages]
        reads[-1] |= prepared.reads[LOSS]
        unread = frozenset(prepared.sizes) - frozenset().union(*reads)
        for stage, held in everyone:
            foreign = sorted(set(held) - reads[stage] - (unread if stage == 0 else frozenset()))
            if foreign:
                return f"stage {stage} holds {foreign[0]}, which none of its calls reads"
            if set(held) == set(prepared.sizes):
                return f"stage {stage} holds every parameter"
    copies = plan.tp * plan.dp_shard
    if plan.pp > 1:  # what all hold, of what they would hold without
        whole = sum(sum(prepared.sizes[name] for name in held) for _, held in everyone)
        share = sum(sum(held.values()) for _, held in everyone) / whole
    else:
        share = max(sum(held.values()) for _, held in everyone) / total
    return f"the largest process holds {share:.0%} of the parameters" if share > LARGEST_SHARE / copies else ""
