"""Every plan gives the single device's loss, gradients and parameters, in float64, on real processes."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
from families import FAMILIES

from weft.capture import Profile, capture
from weft.cluster import Cluster
from weft.jobs.verify import verify_here
from weft.plan import Plan
from weft.planner import make_plan
from weft.runtime.pool import Pool

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


def plan_for(workload: Any, degrees: dict[str, int], profile: Profile | None = None, **choices: Any) -> Plan:
    profile = profile or capture(workload)
    devices = math.prod(degrees.values())
    return make_plan(profile, Cluster.local(devices=devices), **degrees, **choices)


@functools.cache
def profile_of(family: str) -> Profile:
    return capture(FAMILIES[family]())


def name_of(degrees: dict[str, int]) -> str:
    return "-".join(f"{name}{degree}" for name, degree in degrees.items())


@pytest.mark.parametrize("degrees", DEGREES, ids=name_of)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.matrix
def test_equals_one_device(pool: Pool, family: str, degrees: dict[str, int]) -> None:
    build = FAMILIES[family]
    plan = plan_for(build(), degrees, profile_of(family), microbatches=2)

    def job() -> Any:
        return verify_here(build(), plan, steps=3, dtype="float64")

    result = pool.run(job, ranks=plan.devices)[0]
    assert result.loss_error <= 1e-10
    assert result.gradient_error <= 1e-10, result.worst_gradient
    assert result.parameter_error <= 1e-10, result.worst_parameter
    assert result.ok


@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize("degrees", [{"dp_shard": 2}, {"pp": 2, "dp_shard": 2}, {"tp": 2, "dp_shard": 2}], ids=name_of)
@pytest.mark.parametrize("family", ["tied_decoder", "batchnorm_cnn", "experts"])
@pytest.mark.matrix
def test_stages_of_the_sharded_optimizer_equal_one_device(
    pool: Pool, family: str, degrees: dict[str, int], zero: int
) -> None:
    build = FAMILIES[family]
    plan = plan_for(build(), degrees, profile_of(family), microbatches=3, zero=zero)

    def job() -> Any:
        return verify_here(build(), plan, steps=3, dtype="float64")

    result = pool.run(job, ranks=plan.devices)[0]
    assert max(result.loss_error, result.gradient_error, result.parameter_error) <= 1e-10, result.worst_gradient
