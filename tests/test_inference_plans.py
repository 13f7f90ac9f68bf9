"""What benchmarks/inference_plans.py makes of what it measures."""

from __future__ import annotations

import pytest
from inference_plans import CASES, choices, errors
from inference_rows import Request, Row, Scenario, Turn, typical
from inference_scenarios import (
    SCENARIOS,
    SITS_OUT,
    contenders,
    distinct,
    distinct_index,
)

from weft.estimate import INFERENCE_MEMORY_TERMS, INFERENCE_TIME_TERMS, InferenceEstimate
from weft.plan import Plan

REQUEST = Request(4, 16, 11)


def plan(groups: int = 1, **degrees: int) -> Plan:
    stages = tuple((f"call{i}",) for i in range(degrees.get("pp", 1)))
    return Plan(stages=stages, batch_size=4, microbatches=groups, **degrees)


def row(made: Plan, predicted: tuple[float, float], *turns: tuple[float, float, float]) -> Row:
    """Predicted seconds to the first token and of the batch; measured ones to the first, the last and in all."""
    first_s, batch_s = predicted
    estimate = InferenceEstimate(
        batch_s=batch_s,
        first_token_s=first_s,
        token_s=(batch_s - first_s) / 10,
        samples=4,
        tokens=11,
        time=dict.fromkeys(INFERENCE_TIME_TERMS, batch_s / len(INFERENCE_TIME_TERMS)),
        busy=(1.0,),
        memory=(dict.fromkeys(INFERENCE_MEMORY_TERMS, 1.0),),
        cache_tokens=1,
        cache_requests=1,
        devices=2,
        calibration="measured here",
    )
    measured = [Turn(*turn) for turn in turns]
    return Row(request=REQUEST, surroundings="plain", plan=made, predicted=[estimate], turns=measured)


COPIES = row(plan(dp_replicate=2), (0.2, 1.2), (0.2, 1.2, 1.25), (9.0, 90.0, 90.0), (0.2, 1.2, 1.25))
STAGES = row(plan(2, pp=2), (0.1, 1.0), (0.4, 1.2, 1.3))
TENSOR = row(plan(tp=2), (0.1, 1.0), (0.4, 1.1, 2.0))


def scenario(throughput: Row, latency: Row) -> Scenario:
    chosen = {"throughput": throughput.name, "latency": latency.name}
    return Scenario(request=REQUEST, surroundings="plain", rows=[COPIES, STAGES, TENSOR], chosen=chosen)


def test_what_is_measured_is_the_median_of_the_faster_rounds():
    assert [typical(each) for each in ([3.0], [9, 2], [9, 1, 3], [8, 1, 9, 3, 2])] == [3, 2, 2, 2]
    assert COPIES.first_s == 0.2
    assert COPIES.tokens_per_s == pytest.approx(44 / 1.25)
    assert COPIES.token_s == pytest.approx(0.1)
    assert COPIES.first_error == pytest.approx(0)
    assert COPIES.rate_error == pytest.approx(1.25 / 1.2 - 1)
    assert COPIES.to_json()["plan"] == "dp_replicate=2"
    assert STAGES.name == "pp=2 x2"


def test_a_plan_is_near_where_both_its_errors_are_small():
    of_one = row(plan(tp=2), (0.2, 2.2), (0.2, 1.1, 1.1))
    assert errors([COPIES, of_one])["within"] == 1
    found = errors([COPIES, STAGES])
    assert found["plans"] == 2
    assert found["within"] == 1
    assert found["first_token_worst"] == pytest.approx(0.75)
    assert found["tokens_per_s"] == pytest.approx((1.25 / 1.2 - 1 + 0.3) / 2)


def test_a_choice_is_judged_by_what_it_was_chosen_for():
    right, near = scenario(COPIES, TENSOR), scenario(STAGES, COPIES)
    assert [right.regret("throughput"), right.regret("latency")] == [0, 0]
    assert near.fastest("latency") is TENSOR
    assert near.regret("throughput") == pytest.approx(0.04)
    assert near.regret("latency") == pytest.approx(0.1 / 0.07 - 1)
    throughput, latency = (choices([right, near], objective) for objective in ("throughput", "latency"))
    assert (throughput["fastest"], throughput["within_5_percent"]) == (1, 2)
    assert (latency["fastest"], latency["within_5_percent"]) == (1, 1)
    assert near.to_json()["latency"]["fastest"] == "tp=2"


def test_plans_that_are_far_behind_in_both_sit_out():
    ahead = Turn(0.5, 1.0, 1.0)
    slow_prompt = Turn(0.9 * SITS_OUT, 0.9 * SITS_OUT + 0.5, SITS_OUT + 0.6)
    far = Turn(1.0, 1.1 + 0.5 * SITS_OUT, 1.1 + SITS_OUT)
    assert contenders([ahead, slow_prompt, far]) == [0, 1]


def test_plans_are_measured_once_each():
    plans = [plan(dp_replicate=2), plan(2, pp=2), plan(pp=2), plan(dp_replicate=2)]
    assert distinct(plans) == plans[:3]
    assert distinct_index(plans, plans[3]) == 0


def test_there_are_eight_plans_and_eight_scenarios():
    assert sum(len(fixed) for _, fixed in CASES) == 8
    where = {(request.batch, request.prompt, place.name) for request, place in SCENARIOS}
    assert len(where) == len(SCENARIOS) == 8
    assert {batch for batch, *_ in where} == {1, 32}
