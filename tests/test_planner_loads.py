"""What stages do besides computing: statistics over the batch, communication that hides or does not, cuts by memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner_profiles import gpt

from weft.capture.profile import Profile
from weft.cluster import Cluster, Link
from weft.cluster.curve import Curve
from weft.cluster.presets import processes
from weft.planner import balance, estimate, make_plan
from weft.planner.communication import Path, ring_s
from weft.planner.loads import STATISTICS_BYTES
from weft.planner.space import Candidate, Degrees, elsewise
from weft.planner.stages import NEARLY, Stages


def processors(devices: int, **changes: object) -> Cluster:
    cluster = processes(devices, memory_bytes=2**32, cores=8.0)
    links = (Link(name="wire", devices=devices, latency_s=1e-3, bytes_per_s=1e9),) if devices > 1 else ()
    device = replace(cluster.device, **changes)
    return replace(cluster, nodes=(replace(cluster.nodes[0], device=device, cores=None),), links=links)


def normalising(profile: Profile) -> Profile:
    """The profile with a normalisation over the batch in every call's forward and backward."""

    def changed(call):
        op = call.forward[0]._replace(name="aten.native_batch_norm")
        back = call.backward[0]._replace(name="aten.native_batch_norm_backward")
        return replace(call, forward=(op, *call.forward[1:]), backward=(back, *call.backward[1:]))

    return replace(profile, calls=tuple(map(changed, profile.calls)), batch_statistics=True)


def test_replicas_wait_for_each_other_at_every_normalisation_over_the_batch():
    cluster, plain = processors(4), gpt()
    several = normalising(plain)
    plan = make_plan(plain, cluster, dp_replicate=4, microbatches=2)
    without, with_them = (estimate(profile, cluster, plan) for profile in (plain, several))
    path = Path.flat(cluster.links[0], 4)
    each = ring_s("all_gather", STATISTICS_BYTES, path) + ring_s("all_reduce", STATISTICS_BYTES, path)
    more = with_them.time["data_parallel"] - without.time["data_parallel"]
    assert more == pytest.approx(2 * len(several.calls) * each)
    alone = make_plan(plain, processors(1))
    assert estimate(several, processors(1), alone).step_time_s == estimate(plain, processors(1), alone).step_time_s


def test_what_accelerators_hide_takes_a_processors_time():
    profile, degrees = gpt(hidden=1024), {"dp_shard": 4}
    seconds = {}
    for accelerator in (False, True):
        cluster = processors(4, accelerator=accelerator)
        seconds[accelerator] = estimate(profile, cluster, make_plan(profile, cluster, **degrees)).time["data_parallel"]
    assert seconds[True] < 0.5 * seconds[False]


def test_messages_cost_their_ends_computing():
    profile, free = gpt(layers=12), processors(3)
    costly = replace(free, links=(replace(free.links[0], busy_s=1e-3),))
    plan = make_plan(profile, free, pp=3, microbatches=4)
    before, after = estimate(profile, free, plan), estimate(profile, costly, plan)
    # a forward and a backward of each microbatch: one message at the ends of the pipeline, two in the middle
    more = [b["compute"] - a["compute"] for a, b in zip(before.stage_time, after.stage_time, strict=True)]
    assert more == pytest.approx([8e-3, 16e-3, 8e-3])
    assert after.step_time_s > before.step_time_s + 8e-3


@pytest.mark.parametrize("pp", [2, 4])
def test_no_cut_fits_where_no_stage_of_the_fastest_does(pp):
    profile, tried = gpt(layers=12), 0
    candidate = Candidate(Degrees(pp=pp), 4, "1f1b")
    stages = Stages(profile, processes(pp, memory_bytes=2**36, cores=8.0))
    full = stages.fullest(candidate, stages.fastest(candidate)).bytes
    for share in (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1):
        stages = Stages(profile, processes(pp, memory_bytes=int(share * full), cores=8.0))
        fastest = stages.fastest(candidate)
        if not all(held.bytes > NEARLY * held.limit for held in stages.telling(candidate, fastest)):
            continue
        tried += 1

        def allowed(stage: int, start: int, end: int, stages: Stages = stages) -> bool:
            end = len(profile.calls) if end == len(profile.calls) - 1 else end
            return stages.memory(candidate, stage, [(start, end)]).fits

        assert balance.packed([[1.0] * (len(profile.calls) - 1)], pp, allowed) is None
        assert balance.ends([[1.0] * (len(profile.calls) - 1)], pp, allowed) is None
    assert tried


def test_sequences_are_divided_where_their_length_is():
    profile = replace(gpt(), sample_tokens=128)
    candidate = Candidate(Degrees(dp_replicate=2, tp=4), 2, "1f1b", {"blocks.0": "full"})
    found = [c for c, lacks in elsewise(profile, candidate) if lacks == "context parallelism"]
    assert {c.degrees.cp for c in found} == {2, 4}
    assert all(c.degrees.devices == 8 for c in found)
    assert {bool(c.recompute) for c in found} == {True, False}
    assert not list(elsewise(replace(profile, sample_tokens=127), candidate))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero_bubble"])
@pytest.mark.parametrize("again", [{}, {f"blocks.{i}": "full" for i in range(4, 9)}], ids=["plain", "recomputing"])
def test_the_stages_that_tell_hold_the_most_and_the_least(schedule, again):
    profile, pp = gpt(layers=12), 6
    stages = Stages(profile, processes(pp, memory_bytes=2**36, cores=8.0))
    candidate = Candidate(Degrees(pp=pp), 8, schedule, recompute=again)
    ends = stages.fastest(candidate)
    telling, alike = {held.bytes for held in stages.telling(candidate, ends)}, {}
    for device, stretch in enumerate(stages.stretches(ends)):
        content = stages.content(stretch, stages.modes(candidate, stretch))
        alike.setdefault(content, []).append(stages.memory(candidate, device, [stretch]).bytes)
    assert any(len(set(of)) > 1 for of in alike.values()) or schedule != "1f1b"
    for of in alike.values():
        assert {max(of), min(of)} <= telling


def test_gathering_at_the_end_of_a_step_is_communication():
    profile, cluster = gpt(hidden=512), processors(4)
    sharded, copied = (
        estimate(profile, cluster, make_plan(profile, cluster, **fixed)).time
        for fixed in ({"dp_shard": 4, "zero": 1}, {"dp_replicate": 4})
    )
    assert sharded["optimizer"] < copied["optimizer"]  # each steps a part of the parameters
    assert sharded["data_parallel"] > copied["data_parallel"]


def test_a_convolution_is_as_fast_as_its_operations_for_each_byte_allow():
    curve = Curve((10.0, 100.0), (1e9, 1e10))
    device = replace(processors(1).device, overhead_s=0.0)
    device = replace(device, rates={**device.rates, "convolution": curve}, matmul={"float32": Curve((1.0,), (1e10,))})
    few, many = (device.seconds("convolution", 1e9, 1e9 / intensity) for intensity in (10, 100))
    assert (few, many) == (pytest.approx(1.0), pytest.approx(0.1))
    assert device.seconds("batch_norm", 0.0, 1e6) == device.seconds("normalization", 0.0, 1e6)
