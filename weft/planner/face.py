"""``weft.plan``: from a workload, as the user wrote it, to a plan that explains itself."""

from __future__ import annotations

from typing import Unpack

from weft.capture import Profile, capture, capture_inference
from weft.capture.inference import Tokens
from weft.capture.profile import Generation
from weft.cluster.topology import Cluster
from weft.errors import PlanError
from weft.plan import Plan
from weft.planner.inference import choose_inference
from weft.planner.objectives import choose
from weft.planner.space import Constraints, Keywords
from weft.workload import Workload

PURPOSES = ("training", "inference")


def plan(
    workload: Workload | Profile | Generation,
    cluster: Cluster,
    *,
    purpose: str = "training",
    objective: str | None = None,
    price: float | None = None,
    prompt: int | None = None,
    new_tokens: int | None = None,
    batch: int | None = None,
    **keywords: Unpack[Keywords],
) -> Plan:
    """The plan that is best at an objective: the fastest that fits, if none is named.

    Args:
        workload: what to compute, or its profile.
        cluster: on what; all its devices are used, but for objective ``"cost"``.
        purpose: ``"training"``, or ``"inference"``: to predict, or to generate tokens with a model of transformers.
        objective: ``"time"``; ``"memory"``: the fastest of those whose fullest device needs least; ``"cost"``: the
            fastest on as many of the devices as make a sample cheapest. For inference there are ``"throughput"``
            instead of time, and ``"latency"``: the least time from token to token.
        price: of one device for an hour, in any currency.
        prompt, new_tokens: of each sequence, to plan for generating; None: what is usual (512 and 128, or as many as
            the model takes). Where both are None, a workload that says what to predict is planned for predicting.
        batch: sequences, or samples, at once in inference; None: the workload's batch size.
        keywords: degrees (``pp=2``, ``tp=1``), ``microbatches``, ``schedule`` and ``recompute`` (``"none"``,
            ``"selective"``, ``"full"``) to keep; what is left out is searched. ``precision`` (``"float32"`` where it is
            left out, ``"bf16"``, ``"fp16"``) and ``compile`` (``False``) are as told.

    Returns:
        A plan whose ``explain()`` tells why.

    Raises:
        ModelError: the model cannot be run on fake tensors.
        InputError: inference of a workload that neither predicts nor generates.
        PlanError: what is fixed cannot be.
        MemoryLimitError: nothing fits; the message says the least that would do.
    """
    precision = Constraints.parse(keywords).precision or "float32"
    profile = workload
    if is_inference(purpose, prompt=prompt, new_tokens=new_tokens, batch=batch):
        if isinstance(profile, Workload):
            tokens = Tokens.asked(prompt, new_tokens)
            profile = capture_inference(profile, precision, tokens=tokens, batch_size=batch)
        return choose_inference(profile, cluster, objective=objective, price=price, **keywords).plan
    if isinstance(profile, Generation):
        raise PlanError("a Generation is no training step; add purpose='inference'")
    if isinstance(profile, Workload):
        profile = capture(profile, precision)
    return choose(profile, cluster, objective=objective, price=price, **keywords).plan


def is_inference(purpose: str, **asked: int | None) -> bool:
    """Whether a purpose is inference; ``asked``: what is of inference alone.

    Raises:
        PlanError: it is none of PURPOSES, or something is asked that it does not have.
    """
    if purpose not in PURPOSES:
        raise PlanError(f"purpose {purpose!r} is unknown; choose from {', '.join(PURPOSES)}")
    for name, value in asked.items():
        if value is not None and purpose != "inference":
            raise PlanError(f"{name}={value} is of a plan for inference; ask for that purpose, or leave it out")
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise PlanError(f"{name} must be a whole number of at least 1, got {value!r}")
    return purpose == "inference"
