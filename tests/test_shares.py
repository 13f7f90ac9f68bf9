"""Replicas with unequal shares of every microbatch: the averages are those of one device, exactly."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import workloads
from test_equality import plan_for

from weft.errors import PlanError
from weft.jobs.verify import Verification, verify_here
from weft.plan import VERSION, Plan
from weft.runtime.pool import Pool

PLANS = [
    ({"dp_replicate": 2}, (3, 1)),
    ({"dp_replicate": 3}, (2, 1, 1)),
    ({"dp_shard": 2}, (1, 3)),
    ({"dp_shard": 3}, (2, 1, 1)),
    ({"pp": 2, "dp_replicate": 2}, (3, 1)),
    ({"pp": 2, "dp_shard": 2}, (3, 1)),
    ({"dp_replicate": 2, "dp_shard": 2}, (4, 1, 2, 1)),
    ({"dp_replicate": 2, "tp": 2}, (1, 3)),
]
"""Degrees, and the shares of the replicas."""


def plan_of(**changes: Any) -> Plan:
    return Plan(**{"dp_replicate": 2, "stages": (("a",),), "batch_size": 8, "shares": (3, 1), **changes})


def shared(pool: Pool, build: Any, degrees: dict[str, int], shares: tuple[int, ...], **choices: Any) -> Verification:
    """Verify the plan with these degrees and shares, a few steps in float64."""
    plan = dataclasses.replace(plan_for(build(), degrees, **choices), shares=shares)
    assert plan.shares == shares
    result = pool.run(lambda: verify_here(build(), plan, steps=4, dtype="float64"), ranks=plan.devices)[0]
    assert isinstance(result, Verification)
    return result


def test_shares_are_kept_in_lowest_terms() -> None:
    assert plan_of(shares=(6, 2)).shares == (3, 1)
    assert plan_of(shares=[2, 2]).shares == ()
    assert plan_of(shares=()).portions == (1, 1)
    assert plan_of(shares=(6, 2)).samples_per_microbatch == 6
    assert plan_of(microbatches=2).samples_per_microbatch == 3


def test_shares_are_saved_and_told(tmp_path: Any) -> None:
    plan = plan_of()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.to_json()["shares"] == [3, 1]
    assert plan.describe() == "dp_replicate=2 shares=3,1"
    assert "samples of a microbatch by replica: 6,2" in plan.explain()
    many = plan_of(dp_replicate=32, shares=(2,) * 31 + (1,), batch_size=64)
    assert many.describe() == "dp_replicate=32 shares=1..2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shares": (3, 1, 1)}, r"for each of 2 replicas, got \[3, 1, 1\]; leave them empty"),
        ({"shares": (3, 0)}, "at least 1 for each"),
        ({"shares": (1.5, 1)}, "at least 1 for each"),
        (
            {"shares": (31, 1)},
            r"replica 1 of shares \[31, 1\] would get no sample of a microbatch of 8; raise",
        ),
        ({"microbatches": 4}, "no sample of a microbatch of 2"),
    ],
)
def test_shares_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_of(**changes)


def test_a_file_without_shares_is_of_another_version(tmp_path: Any) -> None:
    data = plan_of().to_json()
    with pytest.raises(PlanError, match="shares must be a list"):
        Plan.from_json({**data, "shares": "3,1"})
    del data["shares"]
    with pytest.raises(PlanError, match="'shares' is missing"):
        Plan.from_json(data)
    (tmp_path / "old.json").write_text(json.dumps({**data, "version": VERSION - 1}))
    with pytest.raises(PlanError, match="make the plan again"):
        Plan.load(tmp_path / "old.json")


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize(("degrees", "shares"), PLANS[:6], ids=str)
@pytest.mark.matrix
def test_an_uneven_last_batch(pool: Pool, degrees: dict[str, int], shares: tuple[int, ...], microbatches: int) -> None:
    # 21 samples in batches of 8: 8, 8 and 5
    result = shared(pool, lambda: workloads.llama_of(samples=21), degrees, shares, microbatches=microbatches)
    assert result.ok, result


@pytest.mark.parametrize(("degrees", "shares"), PLANS, ids=str)
@pytest.mark.matrix
def test_sum_and_count(pool: Pool, degrees: dict[str, int], shares: tuple[int, ...]) -> None:
    result = shared(pool, workloads.padded, degrees, shares)
    assert result.ok, result


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("degrees", "shares"), PLANS[:6], ids=str)
@pytest.mark.matrix
def test_statistics_over_the_batch(
    pool: Pool, degrees: dict[str, int], shares: tuple[int, ...], dropout: float
) -> None:
    # batches of 8 and 2: in the last one's microbatches of one sample, all replicas but one have stand-ins
    result = shared(pool, lambda: workloads.cnn(samples=10, dropout=dropout), degrees, shares, microbatches=2)
    assert result.ok, result


def test_buffers_and_lengths_that_vary(pool: Pool) -> None:
    for build in (workloads.averages, workloads.sentences, lambda: workloads.gpt2(dropout=0.2)):
        result = shared(pool, build, {"pp": 2, "dp_replicate": 2}, (3, 1), microbatches=2)
        assert result.ok, result


def test_the_test_can_fail(pool: Pool) -> None:
    """Replicas that count alike, whatever their samples, are seen."""
    plan = dataclasses.replace(plan_for(workloads.llama(), {"dp_replicate": 2}), shares=(3, 1))

    def job() -> Any:
        from weft.runtime.pipeline import Pipeline

        before = Pipeline._weigh
        Pipeline._weigh = lambda self, loss, count, samples: before(self, loss, count, self._batch.total // 2)
        try:
            return verify_here(workloads.llama(), plan, steps=1, dtype="float64")
        finally:
            Pipeline._weigh = before

    result = pool.run(job, ranks=2)[0]
    assert not result.ok
    assert result.gradient_error > 1e-4
