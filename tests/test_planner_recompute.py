"""The planner recomputes where memory binds, as little as will do, and says so."""

import pytest
from planner_profiles import gpt

from weft.cluster.presets import processes
from weft.errors import MemoryLimitError, PlanError
from weft.plan import Plan
from weft.planner import estimate, make_plan, search
from weft.planner.compute import CallCosts, Division
from weft.planner.explain import stretches

MIB = 2**20
DEGREES = [{}, {"pp": 2}, {"dp_shard": 2}, {"tp": 2}, {"dp_replicate": 2}]


def cluster(devices=1, memory=8 * 2**30):
    return processes(devices, memory_bytes=int(memory), cores=float(devices))


def peak(profile, plan, devices):
    return max(estimate(profile, cluster(devices), plan).peak_memory_bytes)


def test_what_a_mode_costs_and_frees():
    profile = gpt(layers=2)
    costs = CallCosts(profile, cluster().device)
    block = profile.calls[1]
    for tp in (1, 2):
        none, selective, full = (costs.of(1, Division(8, tp), mode) for mode in (None, "selective", "full"))
        assert none.saved_bytes > selective.saved_bytes > full.saved_bytes
        assert none.backward_s < selective.backward_s < full.backward_s
        assert none.forward_s == selective.forward_s == full.forward_s
        # What was not kept is there again while the backward of the call runs.
        for way in (selective, full):
            assert way.saved_bytes + way.workspace_bytes == pytest.approx(none.saved_bytes + none.workspace_bytes)
            assert way.backward_reduced == (*none.backward_reduced, *none.forward_reduced)
        if tp == 1:
            assert full.backward_s - none.backward_s == pytest.approx(none.forward_s)
    assert full.saved_bytes == sum(s.bytes.at(8) for s in block.recompute["full"].saved)
    assert costs.of(0, Division(8), "full") == costs.of(0, Division(8))  # the embedding has no ways in this profile


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_recomputation_trades_time_for_memory(degrees):
    profile, devices = gpt(), 2 if degrees else 1
    plans = [make_plan(profile, cluster(devices), **degrees, recompute=mode) for mode in ("none", "selective", "full")]
    found = [estimate(profile, cluster(devices), plan) for plan in plans]
    times, peaks = [e.step_time_s for e in found], [max(e.peak_memory_bytes) for e in found]
    assert times == sorted(times)
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 3
    assert [set(plan.recompute.values()) for plan in plans] == [set(), {"selective"}, {"full"}]


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_as_much_as_memory_asks_for_and_no_more(degrees):
    profile, devices = gpt(layers=12, hidden=128), 2 if degrees else 1
    fixed = {**dict.fromkeys(("pp", "dp_replicate", "dp_shard", "tp"), 1), **degrees, "microbatches": 1, "zero": 3}
    peaks = {
        mode: peak(profile, make_plan(profile, cluster(devices), **degrees, recompute=mode), devices)
        for mode in ("none", "selective", "full")
    }
    seen = []
    for share in (1.0, 0.75, 0.5, 0.25, 0.0):
        limit = peaks["full"] + share * (peaks["none"] - peaks["full"])
        choice = search(profile, cluster(devices, limit + 1), **fixed)
        assert max(choice.estimate.peak_memory_bytes) <= limit + 1
        seen.append(dict(choice.plan.recompute))
        for unit in choice.plan.recompute:  # one unit less would not do
            less = {u: m for u, m in choice.plan.recompute.items() if u != unit}
            smaller = Plan(**{**vars(choice.plan), "recompute": less})
            assert peak(profile, smaller, devices) > limit + 1
    assert seen[0] == {}
    assert "full" not in seen[1].values()
    assert "full" in seen[-1].values()


def test_a_choice_that_is_fixed_is_kept():
    profile = gpt(layers=12, hidden=128)
    tight = peak(profile, make_plan(profile, cluster(), recompute="selective"), 1) + 1
    with pytest.raises(MemoryLimitError):
        search(profile, cluster(1, tight), recompute="none", microbatches=1)
    assert set(search(profile, cluster(1, tight), recompute="full", microbatches=1).plan.recompute.values()) == {"full"}
    assert not search(profile, cluster(1, tight)).plan.recompute  # more microbatches do it here, without
    with pytest.raises(PlanError, match="recompute 'most' is unknown; choose from none, selective, full"):
        make_plan(profile, cluster(), recompute="most")


def test_the_explanation_says_what_and_why():
    profile = gpt(layers=12, hidden=128)
    whole = peak(profile, make_plan(profile, cluster()), 1)
    choice = search(profile, cluster(1, 0.8 * whole), microbatches=1)
    text = choice.plan.explain()
    assert "It recomputes activations, since keeping them all needs " in text
    assert "recompute: selective in blocks.0-" in text
    assert text.splitlines()[0].endswith(", recomputing")
    assert "recompute" not in search(profile, cluster()).plan.explain()


def test_names_are_drawn_together():
    assert stretches(["blocks.0", "blocks.1", "blocks.2", "blocks.5", "h.1.x", "norm", "tail.9"]) == [
        "blocks.0-2", "blocks.5", "h.1.x", "norm", "tail.9",
    ]  # fmt: skip


def test_a_unit_on_two_stages_is_recomputed_as_the_one_that_needs_more_asks():
    profile = gpt(layers=4)
    plan = make_plan(profile, cluster(2), pp=2, recompute="full")
    assert Plan.from_json(plan.to_json()) == plan
    assert (
        estimate(profile, cluster(2), plan).step_time_s
        > estimate(profile, cluster(2), Plan(**{**vars(plan), "recompute": {}})).step_time_s
    )


def test_compile_is_kept_in_the_plan():
    assert search(gpt(), cluster(), compile=True).plan.compile is True
    assert search(gpt(), cluster(), compile=True).plan.explain().splitlines()[0].endswith(", compiled")
    assert search(gpt(), cluster()).plan.compile is False
