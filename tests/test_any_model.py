"""What real models do, pipelined: equal to one device, on real processes."""

from __future__ import annotations

import math
from typing import Any

import any_models
import pytest
import torch

import weft
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
@pytest.mark.matrix
def test_a_pipeline_equals_one_device(pool: Pool, name: str, pp: int) -> None:
    result = verified(pool, name, {"pp": pp}, steps=4)
    assert result.loss_error <= 1e-10
    assert result.gradient_error <= 1e-10, result.worst_gradient
    assert result.parameter_error <= 1e-10, result.worst_parameter


ODD = ["reversible", "written", "latents"]


@pytest.mark.parametrize("degrees", [{"dp_replicate": 2}, {"dp_shard": 2}, {"pp": 2, "dp_replicate": 2}], ids=str)
@pytest.mark.parametrize("name", ["layer drop", "checked layer drop", "remade", "routed", "direct", *ODD])
@pytest.mark.matrix
def test_with_replicas(pool: Pool, name: str, degrees: dict[str, int]) -> None:
    result = verified(pool, name, degrees)
    assert result.loss_error <= 1e-10
    assert result.gradient_error <= 1e-10, result.worst_gradient


def test_lengths_that_vary_from_step_to_step(pool: Pool) -> None:
    workload = any_models.lengths()
    plan = make_plan(capture(workload), Cluster.local(devices=2), pp=2, microbatches=2)

    def job() -> Any:
        engine = weft.parallelize(any_models.lengths(), plan)
        generator = torch.Generator().manual_seed(0)
        batches = [torch.randint(32, (8, 4 + i % 5), generator=generator) for i in range(10)]
        losses = [float(engine.step({"x": x, "y": x})) for x in batches]
        return losses, len(engine.recordings._kept), batches

    losses, kept, batches = pool.run(job, ranks=2)[0]
    assert kept == 5
    torch.manual_seed(workload.seed)
    model = workload.model()
    optimizer = workload.optimizer(model.parameters())
    for loss, x in zip(losses, batches, strict=True):
        optimizer.zero_grad()
        expected = workload.loss(model, {"x": x, "y": x})
        expected.backward()
        optimizer.step()
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
