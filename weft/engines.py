"""Engines: which one runs a workload under a plan, in each process of a job."""

from __future__ import annotations

from typing import Literal, overload

from weft.errors import InputError
from weft.inference.engine import InferenceEngine
from weft.plan import Plan
from weft.runtime.engine import Engine
from weft.workload import Workload


@overload
def parallelize(workload: Workload, plan: Plan) -> Engine: ...
@overload
def parallelize(workload: Workload, plan: Plan, *, purpose: Literal["training"]) -> Engine: ...
@overload
def parallelize(workload: Workload, plan: Plan, *, purpose: Literal["inference"]) -> InferenceEngine: ...
def parallelize(workload: Workload, plan: Plan, *, purpose: str = "training") -> Engine | InferenceEngine:
    """Run a workload under a plan. Called in every process of a launched job; one process is a job of one.

    Args:
        workload: what to compute.
        plan: how.
        purpose: ``"training"``, or ``"inference"``: nothing is kept for training, and the engine only predicts and
            generates. An engine that trains does so too.

    Raises:
        PlanError: the plan is not for this workload, model or number of processes.
        ModelError: the model cannot be run on fake tensors, or cannot be divided as the plan says.
        InputError: no such purpose.
    """
    if purpose not in ("training", "inference"):
        raise InputError(f"purpose {purpose!r} is unknown; choose 'training' or 'inference'")
    return Engine(workload, plan) if purpose == "training" else InferenceEngine(workload, plan)
