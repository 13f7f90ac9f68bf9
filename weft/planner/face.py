"""``weft.plan``: from a workload, as the user wrote it, to a plan that explains itself."""

from __future__ import annotations

from typing import Unpack

from weft.capture import Profile, capture
from weft.cluster.topology import Cluster
from weft.plan import Plan
from weft.planner.objectives import choose
from weft.planner.space import Constraints, Keywords
from weft.workload import Workload


def plan(
    workload: Workload | Profile,
    cluster: Cluster,
    *,
    objective: str | None = None,
    price: float | None = None,
    **keywords: Unpack[Keywords],
) -> Plan:
    """The plan that is best at an objective: the fastest that fits, if none is named.

    Args:
        workload: what to compute, or its profile.
        cluster: on what; all its devices are used, but for objective ``"cost"``.
        objective: ``"time"``; ``"memory"``: the fastest of those whose fullest device needs least; ``"cost"``: the
            fastest on as many of the devices as make a sample cheapest.
        price: of one device for an hour, in any currency.
        keywords: degrees (``pp=2``, ``tp=1``), ``microbatches``, ``schedule`` and ``recompute`` (``"none"``,
            ``"selective"``, ``"full"``) to keep; what is left out is searched. ``precision`` (``"float32"`` where it is
            left out, ``"bf16"``, ``"fp16"``) and ``compile`` (``False``) are as told.

    Returns:
        A plan whose ``explain()`` tells why.

    Raises:
        ModelError: the model cannot be run on fake tensors.
        PlanError: what is fixed cannot be.
        MemoryLimitError: nothing fits; the message says the least that would do.
    """
    profile = workload
    if isinstance(profile, Workload):
        precision = Constraints.parse(keywords).precision
        profile = capture(profile, precision or "float32")
    return choose(profile, cluster, objective=objective, price=price, **keywords).plan
