"""Unequal devices: work in proportion to speed, within each one's own memory, and estimates that say so."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_profiles import gpt

from weft.cluster import Cluster, Curve, Device, Link, Nodes
from weft.cluster.presets import processes
from weft.errors import MemoryLimitError, PlanError
from weft.estimate import MEMORY_TERMS, TIME_TERMS
from weft.plan import Plan
from weft.planner import estimate, make_plan, search
from weft.planner.evaluate import Evaluator
from weft.planner.frontier import Frontier
from weft.planner.sharing import Sharing, level
from weft.planner.sites import Layouts, quickest
from weft.planner.space import DEGREES, Candidate, Constraints, Degrees, candidates, products, refuse
from weft.planner.work import Stage, Work
from weft.quantity import format_bytes
from weft.runtime.batches import layout
from weft.schedule import actions

GIB = 2**30
FULL = processes(1, memory_bytes=2 * GIB, cores=1).device


def device(speed: float = 1.0, memory: int = 2 * GIB) -> Device:
    """A process that may use this much of a core."""

    def slow(curve: Curve) -> Curve:
        return Curve(curve.sizes, tuple(speed * rate for rate in curve.rates))

    return replace(
        FULL,
        name="process" if speed == 1 else f"process at {speed:.0%}",
        memory_bytes=memory,
        matmul={dtype: slow(curve) for dtype, curve in FULL.matmul.items()},
        rates={kind: slow(curve) for kind, curve in FULL.rates.items()},
        overhead_s=FULL.overhead_s / speed,
        core_share=speed,
    )


def cluster(*devices: Device, cores: float | None = None, links: tuple[Link, ...] = ()) -> Cluster:
    """One node of these devices."""
    nodes = tuple(Nodes(count=1, devices=1, device=d, cores=cores, host="here") for d in devices)
    if len(devices) > 1 and not links:
        links = (Link(name="memory", devices=len(devices), latency_s=2e-5, bytes_per_s=2e9),)
    return Cluster(name="mix", nodes=nodes, links=links, calibration="preset")


def one(**degrees: int) -> dict[str, int]:
    return dict.fromkeys(DEGREES, 1) | degrees


@pytest.mark.parametrize(("cores", "shares"), [(None, (2, 2, 1)), (2.0, (3, 3, 2))], ids=["own", "shared"])
def test_replicas_get_samples_in_proportion_to_speed(cores: float | None, shares: tuple[int, ...]) -> None:
    """On two cores the kernel gives each fast process three quarters of one, and the slow one its half."""
    profile, mix = gpt(batch_size=320), cluster(device(), device(), device(0.5), cores=cores)
    choice = search(profile, mix, **one(dp_replicate=3), microbatches=4)
    assert choice.plan.shares == shares
    equal = estimate(profile, mix, replace(choice.plan, shares=()))
    assert equal.step_time_s / choice.estimate.step_time_s >= 1.25
    # No other split is faster, but for what one that is done early leaves of the cores to the others.
    for a, b in itertools.product(range(14, 39, 2), repeat=2):
        other = estimate(profile, mix, replace(choice.plan, shares=(a, b, 80 - a - b)))
        assert other.step_time_s >= choice.estimate.step_time_s * (1 - 1e-9 if cores is None else 0.995)
    text = choice.plan.explain()
    assert f"shares={','.join(map(str, shares))}" in text
    each = [80 * share // sum(shares) for share in shares]
    assert f"replicas 0,1 (process) {each[0]}; replica 2 (process at 50%) {each[2]}" in text
    assert f"({equal.step_time_s / choice.estimate.step_time_s - 1:+.1%})" in text
    assert search(profile, mix, microbatches=4).estimate.step_time_s <= choice.estimate.step_time_s


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_slow_stage_gets_fewer_layers(schedule: str) -> None:
    profile, fixed = gpt(layers=12, batch_size=32), one(pp=2) | {"microbatches": 16, "schedule": schedule}
    even, mixed = (search(profile, cluster(device(), device(s)), **fixed) for s in (1.0, 0.5))
    assert [len(stage) for stage in even.plan.stages] == [7, 7]
    assert [len(stage) for stage in mixed.plan.stages] == [9, 5]
    unmoved = estimate(profile, cluster(device(), device(0.5)), replace(mixed.plan, stages=even.plan.stages))
    assert unmoved.step_time_s > 1.25 * mixed.estimate.step_time_s
    first = search(profile, cluster(device(0.5), device()), **fixed)
    assert [len(stage) for stage in first.plan.stages] == [5, 9]
    assert "of 2.00 GiB on process at 50% at most" in mixed.plan.explain()


def test_a_stage_with_little_memory_gets_less_to_hold() -> None:
    profile, fixed = gpt(layers=12, batch_size=32), one(pp=2) | {"microbatches": 8, "recompute": "none"}
    even = search(profile, cluster(device(), device()), **fixed)
    limit = int(even.estimate.peak_memory_bytes[1] * 0.8)
    mix = cluster(device(), device(memory=limit))
    choice = search(profile, mix, **fixed)
    first, second = choice.estimate.peak_memory_bytes
    assert second <= limit < first
    assert len(choice.plan.stages[1]) < len(even.plan.stages[1])
    assert f"{format_bytes(second)} of {format_bytes(limit)} on process at most" in choice.plan.explain()
    # The line on top tells of the device that is fullest for what it has.
    assert f"The fullest device holds {format_bytes(second)} of {format_bytes(limit)}." in choice.plan.explain()
    assert search(profile, cluster(device(memory=limit), device()), **fixed).estimate.peak_memory_bytes[0] <= limit


def test_devices_with_just_what_they_need_are_enough() -> None:
    """Parameters of unequal stages fill unequal devices: nothing is refused that fits."""
    profile, fixed = gpt(layers=12, hidden=512, context=16, batch_size=2), {"recompute": "none", "microbatches": 2}
    roomy = search(profile, cluster(device(), device(0.5)), **one(pp=2), **fixed)
    first, second = (int(need) + 1 for need in roomy.estimate.peak_memory_bytes)
    assert first > 1.5 * second
    tight = cluster(device(memory=first), device(0.5, memory=second))
    assert search(profile, tight, **fixed).plan == roomy.plan
    # What a device takes besides tensors is its own matter.
    greedy = replace(device(0.5), reserved_bytes=FULL.reserved_bytes + 2**20, memory_bytes=second)
    with pytest.raises(MemoryLimitError):
        search(profile, cluster(device(memory=first), greedy), **fixed)
    before, after = (estimate(profile, cluster(device(), d), roomy.plan).memory for d in (device(0.5), greedy))
    assert after[1]["slack"] - before[1]["slack"] == 2**20
    assert after[0] == before[0]


def test_a_stage_is_as_slow_as_the_slowest_of_its_replicas() -> None:
    profile, mix = gpt(layers=12), cluster(device(), device(0.5), device(), device())
    first, second = make_plan(profile, mix, pp=2, dp_replicate=2, microbatches=8).stages
    assert len(first) < len(second)
    first, second = make_plan(profile, mix, pp=2, dp_replicate=2, microbatches=8, shares=[3, 1]).stages
    assert len(first) == len(second)


@given(st.integers(1, 3), st.integers(1, 5), st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 40))
def test_samples_are_those_that_the_runtime_gives(kinds: int, microbatches: int, shares: list[int], more: int) -> None:
    batch_size = microbatches * sum(shares) + more
    mix = cluster(*(device(1 / (1 + i % kinds)) for i in range(len(shares))))
    candidate = Candidate(Degrees(dp_replicate=len(shares)), microbatches, "1f1b", shares=tuple(shares))
    found = {}
    for line in Layouts(batch_size, mix).of(candidate).lines:
        (site,) = line.sites[0]
        found |= dict.fromkeys(line.replicas, (site.kind, site.samples, site.batch))
    for replica, pieces in enumerate(layout(batch_size, shares, microbatches)):
        lengths = [len(piece) for piece in pieces]
        assert found[replica] == (replica % kinds, max(lengths), sum(lengths))


def test_every_replica_needs_memory_of_its_own() -> None:
    profile, fixed = gpt(layers=12, batch_size=32), one(dp_replicate=2) | {"recompute": "none", "microbatches": 1}
    (need,) = search(profile, cluster(device(), device()), **fixed).estimate.peak_memory_bytes
    small = device(memory=int(need * 0.9))
    lacks = f"needs {-(-int(need) // 2**20)}MiB of its {format_bytes(small.memory_bytes)}"
    for mix in (cluster(device(), small), cluster(small, device())):
        with pytest.raises(MemoryLimitError, match=lacks):
            search(profile, mix, **fixed)
        refused = {r.what: r.reason for r in search(profile, mix, recompute="none", microbatches=1).refused}
        assert refused["dp_replicate=2"] == f"needs {format_bytes(need)} of {format_bytes(small.memory_bytes)}"
        # One device alone is refused by the one with most memory, or not at all.
        assert "one device" not in refused
    # Where the one with little memory is slow, it gets fewer samples, and fits.
    slow = replace(device(0.5), memory_bytes=small.memory_bytes)
    shared = search(profile, cluster(device(), slow), **fixed)
    assert shared.plan.shares[0] > shared.plan.shares[1]


def test_a_slow_link_between_islands_is_crossed_by_the_pipeline() -> None:
    parsed = Cluster.parse("a100-80:1x4+h100-sxm:1x4")
    slow = replace(parsed, links=(*parsed.links[:-1], replace(parsed.links[-1], latency_s=1e-4, bytes_per_s=2e7)))
    profile = gpt(layers=16, hidden=8192, heads=64, context=2048, batch_size=1)
    choice = search(profile, slow)
    assert (choice.plan.pp, choice.plan.tp) == (2, 4)
    calls = [len(stage) for stage in choice.plan.stages]
    assert calls[0] < calls[1], "the slower island comes first"


ISLANDS = (
    Link(name="inside", devices=2, latency_s=1e-5, bytes_per_s=1e10),
    Link(name="between", devices=4, latency_s=1e-4, bytes_per_s=5e7),
)
MIXES = {
    "slow last": cluster(device(), device(), device(0.5)),
    "slow first, shared cores": cluster(device(0.4), device(), device(), cores=1.7),
    "islands": cluster(device(), device(), device(0.6), device(0.6), links=ISLANDS),
    "crossed": cluster(device(), device(0.5), device(), device(0.5), cores=2.0),
    "memory": cluster(device(memory=160 * 2**20), device(), device(0.7), device(memory=110 * 2**20)),
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("batch_size", [13, 24])
def test_the_choice_is_the_fastest_of_every_candidate_that_fits(mix: Cluster, batch_size: int) -> None:
    profile = gpt(layers=6, batch_size=batch_size)
    choice = search(profile, mix)
    evaluator = Evaluator(profile, mix)
    seen = fitting = 0
    for degrees in products(mix.devices, Constraints()):
        if refuse(profile, degrees, None):
            continue
        for equal in candidates(profile, degrees, Constraints()):
            for candidate in (equal, evaluator.stages.with_shares(equal)):
                ends = evaluator.stages.cut(candidate)
                found, rows = evaluator.evaluate(candidate, ends)
                seen += 1
                if all(row.memory_bytes <= row.limit_bytes for row in rows):
                    fitting += 1
                    assert found.step_time_s >= choice.estimate.step_time_s
    assert seen > 40
    assert (fitting < seen) == (mix is MIXES["memory"])
    assert choice.estimate == estimate(profile, mix, choice.plan)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_estimates_of_plans_are_what_the_search_said(mix: Cluster) -> None:
    profile = gpt(layers=6, batch_size=26, tied=True)
    choice = search(profile, mix)
    assert choice.alternatives
    for plan, said in ((choice.plan, choice.estimate), *choice.alternatives):
        found = estimate(profile, mix, Plan.from_json(plan.to_json()))
        assert found == said
        assert tuple(found.time) == TIME_TERMS
        assert sum(found.time.values()) == found.step_time_s
        assert all(tuple(stage) == MEMORY_TERMS for stage in found.memory)
        assert all(value >= 0 for terms in (found.time, *found.memory) for value in terms.values())
        assert 0 <= found.idle_share < 1


speeds = st.sampled_from([0.2, 0.5, 0.7, 1.0])


@settings(max_examples=25, deadline=None)
@given(st.lists(speeds, min_size=2, max_size=4), st.sampled_from([None, 0.8, 2.0]), st.integers(4, 17))
def test_no_bound_is_above_what_it_bounds(of: list[float], cores: float | None, batch_size: int) -> None:
    """On which the search's word that nothing is faster rests."""
    profile, mix = gpt(layers=4, batch_size=batch_size), cluster(*map(device, of), cores=cores)
    frontier = Frontier(Evaluator(profile, mix), Constraints(), [])
    for degrees in products(mix.devices, Constraints()):
        if refuse(profile, degrees, None):
            continue
        for candidate in frontier._candidates(degrees):
            cut = frontier.cut(candidate)
            bound = frontier.evaluator.bound(cut.candidate, cut.ends)
            assert frontier._floor(candidate) <= bound * (1 + 1e-9) or cores is not None
            seconds = frontier.evaluator.estimate(cut.candidate, cut.ends).step_time_s
            assert max(bound, frontier._floor(candidate)) <= seconds * (1 + 1e-9)


def test_devices_that_are_alike_are_one_kind_however_they_are_written() -> None:
    profile = gpt()
    written, usual = cluster(*[FULL] * 4, cores=2.0), processes(4, memory_bytes=2 * GIB, cores=2.0)
    written = replace(written, links=usual.links)
    one_by_one, whole = (search(profile, found) for found in (written, usual))
    assert (one_by_one.plan, one_by_one.estimate) == (whole.plan, whole.estimate)
    assert one_by_one.alternatives == whole.alternatives


def test_shares_by_hand_are_estimated_by_their_slowest_replica() -> None:
    """Also where devices are alike: three quarters of the samples take three quarters of the time of all of them."""
    profile, two = gpt(batch_size=32), cluster(device(), device())
    plan = make_plan(profile, two, dp_replicate=2, shares=[3, 1])
    assert plan.shares == (3, 1)
    lone = estimate(profile, cluster(device()), make_plan(profile, cluster(device())))
    assert estimate(profile, two, plan).time["compute"] == pytest.approx(0.75 * lone.time["compute"], rel=0.02)
    with pytest.raises(PlanError, match="for each of 2 replicas"):
        make_plan(profile, two, dp_replicate=2, shares=[1, 2, 3])


def test_what_is_left_of_the_cores_goes_to_those_that_can_take_it() -> None:
    assert level([(1.0, 2), (0.5, 1)], 2.0) == 0.75
    assert level([(1.0, 4)], 2.0) == 0.5
    assert level([(1.0, 1), (0.5, 2)], 2.0) == 1.0
    assert level([(0.5, 2)], 2.0) == float("inf")
    work = Stage(Work(2.0), Work(0.0), Work(0.0), Work(0.0), devices=2)
    slow = Stage(Work(4.0), Work(0.0), Work(0.0), Work(0.0), core_share=0.5)
    (fast,), (held,) = Sharing(actions("gpipe", 1, 1, []), [([work], {}), ([slow], {})], {0: 2.0}).run()
    assert fast.end_s == pytest.approx(2 / 0.75)
    assert held.end_s == pytest.approx(4.0)


def test_samples_by_speed() -> None:
    assert quickest(20, [1.0, 1.0, 2.0]) == [8, 8, 4]
    assert quickest(3, [1.0, 1.0, 9.0]) == [1, 1, 1]
    assert quickest(7, [1.0, 1.0, 1.0]) == [3, 2, 2]


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=4), st.integers(0, 8))
def test_no_other_samples_are_done_earlier(seconds: list[float], more: int) -> None:
    samples = len(seconds) + more
    done = max(n * s for n, s in zip(quickest(samples, seconds), seconds, strict=True))
    every = itertools.product(range(1, samples + 1), repeat=len(seconds))
    assert done == min(max(n * s for n, s in zip(own, seconds, strict=True)) for own in every if sum(own) == samples)
