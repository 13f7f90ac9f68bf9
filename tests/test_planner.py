"""The search: what it finds, what it refuses and why, and that its numbers add up."""

import json
import time
from dataclasses import replace

import pytest
from planner_profiles import gpt

from weft.capture.profile import NO_GROUP
from weft.cluster import Cluster, Collective, Curve, Link
from weft.cluster.presets import processes
from weft.errors import MemoryLimitError, PlanError
from weft.estimate import MEMORY_TERMS, TIME_TERMS
from weft.plan import Plan
from weft.planner import changes, estimate, make_plan, search
from weft.planner.communication import Path, collective_s
from weft.planner.space import DEGREES, Constraints, Degrees, candidates, products
from weft.quantity import format_bytes

EVERY = [
    {}, {"pp": 2}, {"pp": 3}, {"pp": 4}, {"tp": 2}, {"dp_replicate": 2}, {"dp_replicate": 4}, {"dp_shard": 2},
    {"dp_shard": 4}, {"pp": 2, "dp_shard": 2}, {"pp": 2, "tp": 2}, {"dp_replicate": 2, "dp_shard": 2}, {"pp": 2, "tp":
    2, "dp_shard": 2},
]  # fmt: skip


def cores(devices=4, memory=2**31, shared=2.0):
    return processes(devices, memory_bytes=memory, cores=shared)


def devices(degrees):
    product = 1
    for degree in degrees.values():
        product *= degree
    return product


@pytest.mark.parametrize("degrees", EVERY, ids=str)
@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_terms_add_up(degrees, microbatches, tied):
    profile, cluster = gpt(tied=tied), cores(devices(degrees))
    plan = make_plan(profile, cluster, **degrees, microbatches=microbatches)
    found = estimate(profile, cluster, plan)
    assert tuple(found.time) == TIME_TERMS
    assert sum(found.time.values()) == found.step_time_s
    assert all(value >= 0 for value in found.time.values())
    assert len(found.memory) == plan.pp
    for stage, peak in zip(found.memory, found.peak_memory_bytes, strict=True):
        assert tuple(stage) == MEMORY_TERMS
        assert sum(stage.values()) == peak
        assert all(value >= 0 for value in stage.values())
    assert (found.time["tensor_parallel"] > 0) == (plan.tp > 1)
    assert (found.time["data_parallel"] > 0) == (plan.replicas > 1)
    assert (found.bytes_sent > 0) == (plan.devices > 1)
    assert 0 <= found.idle_share < 1
    assert (found.idle_share > 1e-12) == (plan.devices > 1)


def test_plans_hold_every_call_once_and_the_styles_that_divide():
    profile = gpt(layers=5)
    plan = make_plan(profile, cores(4), pp=2, tp=2, microbatches=4)
    assert [call for stage in plan.stages for call in stage] == [call.name for call in profile.calls[:-1]]
    assert plan.tensor["blocks.4.mlp.0"].name == "colwise"
    assert len(plan.tensor) == 5 * 6
    assert Plan.from_json(plan.to_json()) == plan


def test_stages_are_balanced_by_cost_not_by_count():
    """A head as wide as ten blocks leaves the last stage few blocks."""
    profile = gpt(layers=8, vocabulary=60000)
    first, last = make_plan(profile, cores(2), pp=2, microbatches=4).stages
    assert len(first) > 7
    assert last[-1] == "head"


def test_memory_moves_a_cut_that_time_alone_would_make():
    """The embedding costs no time but much memory: under a limit, its stage gets fewer blocks."""
    profile = gpt(layers=8, vocabulary=16000, batch_size=8)
    free, fixed = cores(2), {"pp": 2, "dp_replicate": 1, "dp_shard": 1, "tp": 1, "microbatches": 8, "schedule": "1f1b"}
    unlimited = search(profile, free, **fixed)
    limit = int(max(unlimited.estimate.peak_memory_bytes)) - 2**20
    limited = search(profile, free.with_memory(limit), **fixed)
    assert max(limited.estimate.peak_memory_bytes) <= limit
    assert [len(s) for s in limited.plan.stages] != [len(s) for s in unlimited.plan.stages]
    assert limited.estimate.step_time_s >= unlimited.estimate.step_time_s


@pytest.mark.parametrize("cluster", [cores(4), Cluster.preset("h100-sxm", devices_per_node=4)], ids=["cores", "gpus"])
def test_the_choice_is_the_fastest_of_every_candidate_that_fits(cluster):
    profile = gpt()
    cluster = cluster.with_memory(200 * 2**20)
    choice = search(profile, cluster)
    for degrees in products(4, Constraints()):
        for candidate in candidates(profile, degrees, Constraints()):
            plan = make_plan(
                profile,
                cluster,
                **{name: getattr(degrees, name) for name in DEGREES},
                microbatches=candidate.microbatches,
                schedule=candidate.schedule,
                zero=candidate.zero,
            )
            found = estimate(profile, cluster, plan)
            if max(found.peak_memory_bytes) <= cluster.memory_bytes:
                assert found.step_time_s >= choice.estimate.step_time_s
    assert choice.estimate == estimate(profile, cluster, choice.plan)
    assert choice.plan.devices == 4


def test_alternatives_differ_in_kind_and_come_fastest_first():
    choice = search(gpt(), cores())
    assert 3 <= len(choice.alternatives) <= 5
    degrees = [str(choice.plan.degrees), *(str(a.plan.degrees) for a in choice.alternatives)]
    assert len(set(degrees)) == len(degrees)
    times = [choice.estimate.step_time_s, *(a.estimate.step_time_s for a in choice.alternatives)]
    assert times == sorted(times)


def test_four_devices_are_searched_in_half_a_second():
    profile, cluster = gpt(layers=24), cores()
    began = time.process_time()
    search(profile, cluster)
    assert time.process_time() - began < 0.5


def test_refused_plans_say_what_bound_them_and_it_is_true():
    profile, cluster = gpt(layers=24, hidden=512), cores(memory=450 * 2**20)
    choice = search(profile, cluster)
    reasons = {r.what: r.reason for r in choice.refused}
    assert "dp_replicate=4" in reasons
    assert choice.plan.describe() not in reasons
    for what, reason in reasons.items():
        degrees = dict(part.split("=") for part in what.split() if what != "one device")
        best = min(
            max(estimate(profile, cluster, make_plan(profile, cluster, **{k: int(v) for k, v in degrees.items()},
                microbatches=c.microbatches, schedule=c.schedule, zero=c.zero, recompute="full")).peak_memory_bytes)
            for c in candidates(profile, Degrees(**{k: int(v) for k, v in degrees.items()}), Constraints())
        )  # fmt: skip
        assert best > cluster.memory_bytes
        assert reason == f"needs {format_bytes(best)} of 450 MiB with recomputation"


def test_nothing_fits_says_the_least_that_would_do_and_it_does():
    profile, cluster = gpt(layers=24, hidden=512), cores(memory=100 * 2**20)
    with pytest.raises(MemoryLimitError, match=r"the least that would do is (\d+)MiB, with .*microbatch") as raised:
        search(profile, cluster)
    least = int(str(raised.value).split("least that would do is ")[1].split("MiB")[0])
    assert search(profile, cluster.with_memory(least * 2**20)).plan.devices == 4
    with pytest.raises(MemoryLimitError):
        search(profile, cluster.with_memory((least - 1) * 2**20))


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        (
            {"pp": 3},
            r"pp=3 multiply to 3, which does not make 4 devices; use degrees whose product divides 4 \(1, 2, 4\)",
        ),
        ({"pp": 3}, "or 3 devices"),
        ({"pp": 2, "dp_replicate": 1, "dp_shard": 1, "tp": 1}, "use dp_replicate=2, or 2 devices"),
        ({"pp": 8}, "or 8 devices"),
        ({"pp": 0}, "pp must be a whole number of at least 1, got 0"),
        ({"pp": True}, "got True"),
        ({"cp": 2}, "cp=2 cannot run yet"),
        ({"schedule": "zigzag"}, "choose from gpipe, 1f1b"),
        ({"microbatches": 64}, "a batch of 32 samples cannot be divided"),
        ({"recompute": "some"}, "recompute 'some' is unknown; choose from none, selective, full"),
        ({"precision": "int4"}, "precision 'int4' is unknown; choose from float32, bf16, fp16"),
        ({"precision": "bf16"}, "the profile is of float32; capture the workload with precision='bf16'"),
        ({"compile": "yes"}, "compile must be True or False, got 'yes'"),
        ({"pipeline": 2}, "cannot fix 'pipeline'; what can be fixed is pp, dp_replicate"),
    ],
)
def test_what_cannot_be_asked(fixed, message):
    with pytest.raises(PlanError, match=message) as raised:
        search(gpt(), cores(), **fixed)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("degrees", "reason"),
    [
        ({"tp": 3}, "8 heads are not divisible by 3"),
        ({"pp": 6}, "6 stages for 5 calls of units that hold parameters"),
        ({"dp_shard": 5}, "a batch of 4 samples cannot be divided over 5 replicas; raise batch_size to 5"),
    ],
)
def test_degrees_that_the_model_refuses(degrees, reason):
    profile = gpt(layers=3, hidden=32, batch_size=4)
    groups = tuple(group for group in profile.tensor_groups if group.sizes[0][0] == "heads")
    profile = replace(
        profile,
        tensor_groups=groups,
        parameters={name: replace(p, group=NO_GROUP) for name, p in profile.parameters.items()},
        calls=tuple(replace(c, forward=(), backward=(), saved=()) for c in profile.calls),
    )
    with pytest.raises(PlanError, match=reason):
        search(profile, cores(devices(degrees)), **degrees)


def test_what_is_fixed_is_kept():
    choice = search(gpt(), cores(), pp=2, microbatches=4, schedule="gpipe", dp_shard=None)
    assert (choice.plan.pp, choice.plan.microbatches, choice.plan.schedule) == (2, 4, "gpipe")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: replace(p, batch_size=64), "a batch of 64 samples, the workload has 32"),
        (lambda p: replace(p, pp=1, stages=(p.stages[0],)), "'blocks.4' is missing"),
        (lambda p: replace(p, stages=(p.stages[1], p.stages[0])), "out of order"),
        (lambda p: replace(p, stages=(p.stages[0], (*p.stages[1], "tail"))), "'tail' is not a call"),
        (lambda p: replace(p, dp_shard=4), "needs 8 devices"),
    ],
)
def test_plans_of_something_else(change, message):
    profile, cluster = gpt(), cores()
    plan = make_plan(profile, cluster, pp=2, microbatches=2)
    with pytest.raises(PlanError, match=message):
        estimate(profile, cluster, change(plan))


def test_processes_on_shared_cores_gain_nothing_and_own_cores_do():
    profile = gpt()
    alone = estimate(profile, cores(1), make_plan(profile, cores(1))).step_time_s
    plan = make_plan(profile, cores(4), dp_replicate=4)
    shared, own = (estimate(profile, cores(4, shared=n), plan).step_time_s for n in (1.0, 4.0))
    assert shared > alone
    assert alone / 4 < own < alone / 3


def test_a_slow_link_turns_the_choice_from_data_to_pipeline():
    profile, cluster = gpt(layers=8, hidden=512), cores(shared=4.0)
    slow = replace(cluster, links=(replace(cluster.links[0], latency_s=1e-3, bytes_per_s=12.5e6),))
    assert search(profile, slow).plan.pp > 1
    gradients = estimate(profile, slow, make_plan(profile, slow, dp_replicate=4)).time["data_parallel"]
    assert gradients > search(profile, slow).estimate.step_time_s


def test_measured_collectives_are_believed():
    link = Link(name="l", devices=4, latency_s=1e-3, bytes_per_s=1e9)
    points = Curve((1e3, 1e6), (1e3 / 5e-3, 1e6 / 9e-3))
    measured = replace(link, collectives=(Collective(kind="all_reduce", ranks=4, rates=points),))
    assert collective_s("all_reduce", 1e6, Path.flat(link, 4)) == pytest.approx(2 * 3 * (1e-3 + 1e6 / 4 / 1e9))
    assert collective_s("all_reduce", 1e6, Path.flat(measured, 4)) == pytest.approx(9e-3)
    assert collective_s("all_reduce", 1, Path.flat(measured, 4)) == pytest.approx(5e-3)
    assert collective_s("all_reduce", (1e3 + 1e6) / 2, Path.flat(measured, 4)) == pytest.approx(7e-3)
    assert collective_s("all_reduce", 1e7, Path.flat(measured, 4)) == pytest.approx(90e-3)
    assert collective_s("all_reduce", 1e6, Path.flat(measured, 2)) == pytest.approx(
        9e-3 * (2 * (1e-3 + 5e5 / 1e9)) / (6 * (1e-3 + 2.5e5 / 1e9))
    )
    assert collective_s("all_gather", 1e6, Path.flat(measured, 4)) == pytest.approx(3 * (1e-3 + 1e6 / 4 / 1e9))


def test_the_plan_explains_itself_until_it_is_saved(tmp_path):
    choice = search(gpt(layers=24, hidden=512), cores(memory=450 * 2**20))
    text = choice.plan.explain()
    assert choice.plan.describe() in text
    assert format_bytes(max(choice.estimate.peak_memory_bytes)) in text
    for refused in choice.refused:
        assert f"{refused.what}: {refused.reason}" in text
    for alternative in choice.alternatives:
        assert alternative.plan.describe() in text
    choice.plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == choice.plan
    assert choice.plan.stages[0][0] in loaded.explain()


def test_a_choice_is_json():
    data = json.loads(json.dumps(search(gpt(), cores()).to_json()))
    assert {"plan", "estimate", "alternatives", "refused", "capture_s", "search_s"} <= set(data)
    assert {"step_time_s", "peak_memory_bytes", "terms"} <= set(data["estimate"])
    assert Plan.from_json(data["plan"]).devices == 4


def test_what_would_change_the_answer():
    profile, cluster = gpt(layers=24, hidden=512), cores(memory=450 * 2**20)
    choice = search(profile, cluster)
    found = {change.what: change for change in changes(profile, cluster, choice)}
    assert list(found) == ["twice the memory", "links twice as fast", "twice the batch", "half the batch"]
    roomy = search(profile, cluster.with_memory(900 * 2**20))
    assert found["twice the memory"].plan == roomy.plan
    assert found["twice the memory"].speed == pytest.approx(choice.estimate.step_time_s / roomy.estimate.step_time_s)
    assert found["links twice as fast"].speed >= 1
    assert "times as fast" in found["half the batch"].describe()
    json.dumps([change.to_json() for change in found.values()])
