"""What benchmarks/prediction.py makes of what it measures."""

from __future__ import annotations

import pytest
from planner_profiles import gpt
from prediction import candidates, summary
from prediction_cases import HALF_MEMORY, HALF_SPEED, MEMORY, PLAIN, PLANS, SCENARIOS
from prediction_rows import Row, Scenario

from weft.cluster import Cluster
from weft.estimate import MEMORY_TERMS, TIME_TERMS, Estimate
from weft.plan import Plan
from weft.planner import search


def row(predicted_s: float, *measured_s: float, dp_replicate: int = 1, pp: int = 1, surroundings: str = "plain") -> Row:
    plan = Plan(pp=pp, dp_replicate=dp_replicate, stages=tuple((f"call{i}",) for i in range(pp)), batch_size=8)
    estimate = Estimate(
        step_time_s=predicted_s,
        time=dict.fromkeys(TIME_TERMS, predicted_s / len(TIME_TERMS)),
        memory=(dict.fromkeys(MEMORY_TERMS, 1.0),),
        bytes_sent=0.0,
        idle_share=0.0,
        calibration="measured here",
    )
    found = Row(model="m", surroundings=surroundings, plan=plan, predicted=estimate, rounds_s=list(measured_s))
    found.idle = [0.0] * len(measured_s)
    return found


def scenario(surroundings: str, devices: int, *rows: Row) -> Scenario:
    return Scenario(model="m", surroundings=surroundings, devices=devices, rows=list(rows))


def test_errors_are_of_the_median_of_the_rounds():
    one = row(1.1, 1.0, 5.0, 0.9)
    assert one.time_error == pytest.approx(0.1)
    assert one.memory_error is None
    one.predicted_peak, one.peak = 90.0, 100
    assert summary([one, row(0.7, 1.0)], [])["plans"] == {
        "plans": 2,
        "step_time": pytest.approx(0.2),
        "peak_memory": pytest.approx(0.1),
    }
    assert one.to_json()["plan"] == "one device"


def test_a_choice_is_right_within_five_percent_of_the_fastest():
    right = scenario("100 Mbit/s", 4, row(1, 1.04, pp=4), row(1, 1.0, pp=2), row(3, 2.6, dp_replicate=4))
    wrong = scenario("plain", 2, row(1, 1.1, pp=2), row(1, 1.0, dp_replicate=2))
    lost = scenario("half memory", 2, row(1, pp=2), row(1, 1.0, dp_replicate=2))
    assert (right.regret, wrong.regret) == pytest.approx((0.04, 0.1))
    assert lost.regret == float("inf")
    found = summary([], [right, wrong, lost])
    assert (found["choices"]["scenarios"], found["choices"]["right"]) == (3, 1)
    assert found["slow_link_times_faster"] == pytest.approx(2.5)
    assert found["unequal_times_faster"] is None
    assert right.to_json()["fastest"] == "pp=2 1f1b"


def test_candidates_are_the_choice_and_the_best_of_other_degrees():
    cluster = Cluster.local(devices=4, memory="2GiB")
    plans = candidates(gpt(), cluster, PLAIN)
    assert plans[0] == search(gpt(), cluster).plan
    assert all(plan.devices == 4 for plan in plans)
    assert len({plan.describe() for plan in plans}) == len(plans) > 3
    assert any(plan.dp_replicate == 4 for plan in plans)


def test_what_is_measured_is_what_was_promised():
    assert sum(map(len, PLANS.values())) >= 16
    assert len(PLANS) == 3
    plans = [plan for plans in PLANS.values() for plan in plans]
    assert {plan.get("recompute") for plan in plans} == {None, "selective", "full"}
    assert {plan.get("schedule", "1f1b") for plan in plans} == {"gpipe", "1f1b"}
    assert len({surroundings.name for _, _, surroundings in SCENARIOS}) == 5
    assert len(SCENARIOS) >= 10
    assert ("decoder", 3, HALF_SPEED) in SCENARIOS
    assert HALF_MEMORY.limits(3) == [HALF_MEMORY.memory, HALF_MEMORY.memory, HALF_MEMORY.memory // 2]
    assert PLAIN.limits(3) is None
    assert HALF_MEMORY.memory < MEMORY
