"""Ranks that were given different things: one error that says what differs, on all of them, and soon."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import workloads
from test_equality import plan_for
from torch import nn

import weft
from weft.errors import DisagreementError
from weft.runtime.pool import Pool

SOON_S = 10


def perceptron(hidden: int, layers: int = 4) -> weft.Workload:
    def model() -> nn.Module:
        inner = [nn.Sequential(nn.Linear(12, hidden), nn.ReLU(), nn.Linear(hidden, 12)) for _ in range(layers)]
        return nn.Sequential(*inner, nn.Linear(12, 1))

    return weft.Workload(
        model=model,
        loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        data=workloads.Points(64, 12),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=8,
    )


def all_raise(pool: Pool, ranks: int, job: Callable[..., Any], *args: Any) -> str:
    """The message of an error that every rank raises, soon."""

    def caught() -> tuple[str, float]:
        before = time.monotonic()
        try:
            job(*args)
        except DisagreementError as error:
            return str(error), time.monotonic() - before
        raise AssertionError("nothing was raised")

    messages, times = zip(*pool.run(caught, ranks=ranks), strict=True)
    assert set(messages) == {messages[0]}
    assert max(times) < SOON_S
    assert isinstance(messages[0], str)
    return messages[0]


def rank() -> int:
    return int(os.environ["RANK"])


def test_different_plans(pool: Pool) -> None:
    plan = plan_for(perceptron(24), {"pp": 2, "dp_replicate": 2}, microbatches=2)
    other = dataclasses.replace(plan, microbatches=4)
    degrees = plan_for(perceptron(24), {"pp": 4}, microbatches=2)

    def job(different: weft.Plan) -> None:
        weft.parallelize(perceptron(24), different if rank() == 2 else plan)

    message = all_raise(pool, 4, job, other)
    assert message.startswith("rank 2's plan differs from rank 0's: microbatches is 4 on rank 2 and 2 on rank 0; ")
    message = all_raise(pool, 4, job, degrees)
    assert message.startswith("rank 2's plan differs from rank 0's: pp is 4 on rank 2 and 2 on rank 0; ")


def test_different_models(pool: Pool) -> None:
    plan = plan_for(perceptron(24), {"pp": 2}, microbatches=2)

    def job(hidden: int, layers: int) -> None:
        weft.parallelize(perceptron(hidden, layers) if rank() == 1 else perceptron(24), plan)

    message = all_raise(pool, 2, job, 32, 4)
    expected = "0.0.weight is float32 (32, 12) on rank 1 and float32 (24, 12) on rank 0"
    assert message.startswith(f"rank 1's model differs from rank 0's: {expected}; ")
    message = all_raise(pool, 2, job, 24, 3)
    assert message.startswith("rank 1's model differs from rank 0's: ")


def test_a_model_that_is_called_differently(pool: Pool) -> None:
    plan = plan_for(perceptron(24), {"pp": 2}, microbatches=2)

    def job() -> None:
        workload = perceptron(24)
        if rank() == 1:
            workload = dataclasses.replace(
                workload, loss=lambda model, batch: F.mse_loss(model[4](model[:3](batch[0])), batch[1])
            )
        weft.parallelize(workload, plan)

    assert all_raise(pool, 2, job).startswith("rank 1's forward differs from rank 0's: call ")


def test_different_batches(pool: Pool) -> None:
    plan = plan_for(perceptron(24), {"pp": 2, "dp_replicate": 2}, microbatches=2)

    def job(samples: int, dtype: torch.dtype, features: int, odd: tuple[int, ...]) -> None:
        engine = weft.parallelize(perceptron(24), plan)
        different = torch.ones(samples, features), torch.ones(samples, 1, dtype=dtype)
        engine.step(different if rank() in odd else (torch.ones(8, 12), torch.ones(8, 1)))

    assert "batch differs from rank 0's: samples in all is 6 on rank 1 and 8 on rank 0" in all_raise(
        pool, 4, job, 6, torch.float32, 12, (1, 3)
    )
    assert "rank 3's batch differs from rank 0's: batch[1] is torch.float64 of 2 dimensions on rank 3" in all_raise(
        pool, 4, job, 8, torch.float64, 12, (3,)
    )
    message = all_raise(pool, 4, job, 8, torch.float32, 13, (3,))
    expected = "batch[0] of microbatch 0 is float32 (2, 13) on rank 3 and float32 (2, 12) on rank 1"
    assert message.startswith(f"rank 3's part of the batch differs from rank 1's: {expected}; ")


def test_replicas_may_see_other_shapes(pool: Pool) -> None:
    plan = plan_for(perceptron(24), {"dp_replicate": 2}, shares=(3, 1))

    def job() -> list[float]:
        engine = weft.parallelize(perceptron(24), plan)
        return [float(engine.step(batch)) for batch in engine.batches()]

    one, other = pool.run(job, ranks=2)
    assert one == other
    assert len(one) == 8


def test_comparing_is_done_once(pool: Pool) -> None:
    plan = plan_for(perceptron(24), {"dp_replicate": 2})

    def job() -> int:
        engine = weft.parallelize(perceptron(24), plan)
        calls = 0
        gather = dist.all_gather

        def counted(*args: Any, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            return gather(*args, **settings)

        dist.all_gather = counted
        try:
            for _, batch in zip(range(3), engine.batches(), strict=False):
                engine.step(batch)
        finally:
            dist.all_gather = gather
        return calls

    assert pool.run(job, ranks=2) == [1, 1]
