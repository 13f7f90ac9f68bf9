"""The loss and its gradients are those of the global batch, however it was cut."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import workloads
from test_equality import name_of, plan_for

from weft.jobs.verify import Verification, verify_here
from weft.runtime.pool import Pool

PLANS = [{"dp_replicate": 3}, {"dp_shard": 2}, {"pp": 2}, {"pp": 2, "dp_replicate": 2}, {"dp_replicate": 2, "tp": 2}]


def verified(pool: Pool, build: Any, degrees: dict[str, int], *, steps: int, **choices: Any) -> Verification:
    plan = plan_for(build(), degrees, **choices)
    result = pool.run(lambda: verify_here(build(), plan, steps=steps, dtype="float64"), ranks=plan.devices)[0]
    assert isinstance(result, Verification)
    return result


@pytest.mark.parametrize("degrees", PLANS, ids=name_of)
@pytest.mark.matrix
def test_sum_and_count_average_over_the_whole_batch(pool: Pool, degrees: dict[str, int]) -> None:
    result = verified(pool, workloads.padded, degrees, steps=3, microbatches=2)
    assert result.ok, result


@pytest.mark.parametrize("degrees", PLANS, ids=name_of)
@pytest.mark.matrix
def test_an_uneven_last_batch_counts_every_sample_once(pool: Pool, degrees: dict[str, int]) -> None:
    # 21 samples in batches of 8: 8, 8 and 5, which no plan here divides evenly; and on into the next epoch
    result = verified(pool, lambda: workloads.llama_of(samples=21), degrees, steps=4, microbatches=2)
    assert result.ok, result


@pytest.mark.parametrize("degrees", PLANS, ids=name_of)
@pytest.mark.matrix
def test_a_last_batch_smaller_than_the_replicas(pool: Pool, degrees: dict[str, int]) -> None:
    result = verified(pool, lambda: workloads.llama_of(samples=9), degrees, steps=3, microbatches=2)
    assert result.ok, result


def test_the_test_can_fail(pool: Pool) -> None:
    """A mean taken per microbatch instead of over the batch is seen."""

    def wrong() -> Any:
        right = workloads.padded()

        def loss(model: Any, batch: Any) -> Any:
            total, count = right.loss(model, batch)
            return total / count

        return dataclasses.replace(right, loss=loss)

    result = verified(pool, wrong, {"dp_replicate": 2}, steps=1, microbatches=2)
    assert not result.ok
    assert result.loss_error > 1e-4


@pytest.mark.long
def test_dropout_draws_the_same_masks_wherever_a_unit_lives(pool: Pool) -> None:
    for degrees in ({"pp": 2}, {"pp": 3}, {"pp": 2, "dp_replicate": 2}, {"dp_shard": 2}):
        result = verified(pool, lambda: workloads.gpt2(dropout=0.2), degrees, steps=2, microbatches=2)
        assert result.ok, (degrees, result)


@pytest.mark.long
def test_skips_shared_blocks_and_glue_parameters(pool: Pool) -> None:
    for degrees in ({"pp": 2}, {"pp": 4}, {"dp_shard": 2}, {"dp_replicate": 2}, {"pp": 4, "dp_shard": 2}):
        for schedule in ("gpipe", "1f1b"):
            result = verified(pool, workloads.skips, degrees, steps=3, microbatches=4, schedule=schedule)
            assert result.ok, (degrees, schedule, result)
