"""The search's bounds are bounds, its short cuts change nothing, and it stays quick on large clusters."""

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_profiles import gpt

from weft.cluster import Cluster
from weft.cluster.presets import processes
from weft.planner import search
from weft.planner.balance import ends, packed
from weft.planner.evaluate import Evaluator
from weft.planner.frontier import Frontier
from weft.planner.program import compiled, follow
from weft.planner.space import Constraints, Degrees, candidates, later, products
from weft.planner.timeline import repeated
from weft.planner.work import Stage, Work
from weft.schedule import Edge, actions

CLUSTERS = {
    "gpus": Cluster.preset("h100-sxm", nodes=2, devices_per_node=4),
    "cores": processes(8, memory_bytes=2**31, cores=2.0),
    "own cores": processes(8, memory_bytes=2**31, cores=8.0),
}


@pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=CLUSTERS)
def test_no_candidate_beats_its_bounds(cluster):
    profile = gpt(layers=6, batch_size=16)
    evaluator = Evaluator(profile, cluster)
    possible = products(8, Constraints())
    frontier = Frontier(evaluator, Constraints(), possible)
    checked = 0
    for degrees in possible:
        if degrees.pp > 8 or degrees.tp > 8:
            continue
        for candidate in candidates(profile, degrees, Constraints()):
            cut = evaluator.stages.fastest(candidate)
            exact = evaluator.estimate(candidate, cut).step_time_s
            assert frontier._floor(candidate) <= exact * (1 + 1e-9)
            assert evaluator.bound(candidate, cut) <= exact * (1 + 1e-9)
            checked += 1
    assert checked > 100


@pytest.mark.parametrize(("cluster", "share"), [("gpus", 0.5), ("gpus", 0.2), ("own cores", 0.3)])
def test_no_candidate_recomputes_less_than_memory_asks_for(cluster, share):
    profile = gpt(layers=6, hidden=256, batch_size=32)
    plain = Evaluator(profile, CLUSTERS[cluster])
    one = next(iter(candidates(profile, Degrees(dp_replicate=8), Constraints())))
    full = plain.stages.fullest(one, plain.stages.fastest(one)).bytes
    nodes, reserved = CLUSTERS[cluster].nodes, plain.stages.kinds[0].reserved_bytes
    enough = int(reserved + share * (full - reserved))
    less = tuple(replace(n, device=replace(n.device, memory_bytes=enough)) for n in nodes)
    evaluator = Evaluator(profile, replace(CLUSTERS[cluster], nodes=less))
    possible = [d for d in products(8, Constraints()) if d.pp <= 8 and d.tp <= 8]
    frontier = Frontier(evaluator, Constraints(), possible)
    told = refused = 0
    for candidate in (c for degrees in possible for c in candidates(profile, degrees, Constraints())):
        cut, bound = frontier.cut(candidate), frontier._with_memory(candidate)
        if not cut.full.fits:
            refused += bound == float("inf")
        else:
            assert bound <= evaluator.estimate(cut.candidate, cut.ends).step_time_s * (1 + 1e-9)
            told += bound > frontier._floor(candidate) * 1.01 and bool(cut.candidate.recompute)
    assert told > 10
    assert refused > 10


@given(
    st.integers(1, 6),
    st.integers(1, 60),
    st.sampled_from(["gpipe", "1f1b", "zero_bubble", "interleaved"]),
    st.lists(st.floats(0.2, 2), min_size=12, max_size=12),
    st.floats(0, 0.5),
)
@settings(max_examples=60)
def test_a_long_schedule_is_what_two_short_ones_tell(devices, microbatches, schedule, seconds, transfer):
    chunks = 2 if schedule == "interleaved" else 1
    microbatches = -(-microbatches // devices) * devices if chunks > 1 else microbatches
    count = devices * chunks
    stages = [Stage(Work(s), Work(2 * s), Work(0.1), Work(0.2), weight=Work(s)) for s in seconds[:count]]
    edges = [Edge(s, s + 1) for s in range(count - 1)]
    times = {pair: transfer for e in edges for pair in ((e.source, e.target), (e.target, e.source))}

    def program(number):
        return compiled(actions(schedule, devices, number, edges, chunks))

    whole = max(spent.end_s for spent in follow(program(microbatches), stages, times))
    short = max(spent.end_s for spent in repeated(program, microbatches, stages, times, devices))
    assert short == pytest.approx(whole, rel=5e-3)


@given(st.lists(st.floats(0.1, 5), min_size=4, max_size=14), st.data())
def test_packed_parts_are_as_short_as_balanced_ones(costs, data):
    parts = data.draw(st.integers(1, len(costs)))
    limits = [data.draw(st.floats(max(costs), 30)) for _ in range(parts)]

    def allowed(part, start, end):
        return sum(costs[start:end]) <= limits[part]

    def longest(cut):
        return max(sum(costs[start:end]) for start, end in zip([0, *cut], cut, strict=False))

    exact, quick = ends([costs], parts, allowed), packed([costs], parts, allowed, steps=30)
    if exact is None:
        assert quick is None
    else:
        assert quick is not None
        assert longest(quick) == pytest.approx(longest(exact), rel=1e-5)
        assert all(allowed(p, s, e) for p, (s, e) in enumerate(zip([0, *quick], quick, strict=False)))


def test_what_cannot_run_yet_is_told_and_not_chosen():
    profile = gpt(layers=16, batch_size=64)
    choice = search(profile, CLUSTERS["gpus"], pp=4, dp_replicate=1, dp_shard=1, tp=2, microbatches=4)
    assert choice.plan.schedule in ("gpipe", "1f1b")
    assert choice.later
    for found in choice.later:
        assert found.estimate.step_time_s < choice.estimate.step_time_s
        assert found.lacks in choice.plan.explain()
    lacks = {what for candidate in candidates(profile, products(8, Constraints())[0], Constraints())
             for _, what in later(profile, candidate)}  # fmt: skip
    assert all("yet" not in what for what in lacks)


def test_sixteen_thousand_devices_are_searched_in_seconds():
    profile, cluster = gpt(layers=64, hidden=1024, batch_size=4096), Cluster.preset("h100-sxm", nodes=2048)
    began = time.process_time()
    choice = search(profile, cluster)
    assert choice.plan.devices == 16384
    assert time.process_time() - began < 20
