"""What real models do, pipelined: equal to one device, on real processes."""

from __future__ import annotations

import math
from typing import Any

import any_models
import pytest

from weft.capture import capture
from weft.cluster import Cluster
from weft.jobs.verify import verify_here
from weft.planner import make_plan
from weft.runtime.pool import Pool


def verified(pool: Pool, name: str, degrees: dict[str, int], steps: int = 3) -> Any:
    workload = any_models.workload(name)
    plan = make_plan(capture(workload), Cluster.local(devices=math.prod(degrees.values())), **degrees, microbatches=2)

    def job() -> Any:
        return verify_here(any_models.workload(name), plan, steps=steps, dtype="float64")

    return pool.run(job, ranks=plan.devices)[0]


@pytest.mark.parametrize("pp", [2, 3])
@pytest.mark.parametrize("name", any_models.MODELS)
def test_a_pipeline_equals_one_device(pool: Pool, name: str, pp: int) -> None:
    result = verified(pool, name, {"pp": pp}, steps=4)
    assert result.loss_error <= 1e-10
    assert result.gradient_error <= 1e-10, result.worst_gradient
    assert result.parameter_error <= 1e-10, result.worst_parameter
