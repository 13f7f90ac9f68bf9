"""Every plan gives the single device's loss, gradients and parameters, in float64, on real processes."""

from __future__ import annotations

import math
from typing import Any

import pytest
from families import FAMILIES

from weft.capture import capture
from weft.cluster import Cluster
from weft.jobs.verify import verify_here
from weft.plan import Plan
from weft.planner import make_plan
from weft.runtime.pool import Pool

IN_FLOAT32 = ("experts",)
"""Families with a kernel that has no float64: grouped matrix products."""

DEGREES = [
    {"pp": 2},
    {"pp": 3},
    {"pp": 4},
    {"tp": 2},
    {"dp_replicate": 2},
    {"dp_replicate": 4},
    {"dp_shard": 2},
    {"dp_shard": 4},
    {"pp": 2, "dp_shard": 2},
    {"pp": 2, "tp": 2},
    {"dp_replicate": 2, "dp_shard": 2},
    {"pp": 2, "tp": 2, "dp_shard": 2},
]


def plan_for(workload: Any, degrees: dict[str, int], **choices: Any) -> Plan:
    profile = capture(workload)
    devices = math.prod(degrees.values())
    return make_plan(profile, Cluster.local(devices=devices), **degrees, **choices)


def name_of(degrees: dict[str, int]) -> str:
    return "-".join(f"{name}{degree}" for name, degree in degrees.items())


@pytest.mark.parametrize("degrees", DEGREES, ids=name_of)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_one_device(pool: Pool, family: str, degrees: dict[str, int]) -> None:
    build = FAMILIES[family]
    dtype, tolerance = ("float32", 1e-5) if family in IN_FLOAT32 else ("float64", 1e-10)
    plan = plan_for(build(), degrees, microbatches=2)

    def job() -> Any:
        return verify_here(build(), plan, steps=3, dtype=dtype)

    result = pool.run(job, ranks=plan.devices)[0]
    assert result.loss_error <= tolerance
    assert result.gradient_error <= tolerance, result.worst_gradient
    assert result.parameter_error <= tolerance, result.worst_parameter
    assert result.ok
