"""Memory of a stage, against walking through its step by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_profiles import gpt

from weft.capture.profile import Parameter
from weft.cluster.presets import processes
from weft.planner.compute import CallCost
from weft.planner.holdings import Holding, Holdings, padded_share
from weft.planner.memory import GATHER_COPIES, REDUCE_COPIES, STEP_COPIES, Alive, alive, footprint
from weft.schedule import ORDERS, Kind, in_flight

PROCESS = processes(1, memory_bytes=2**30, cores=1).device


def call(saved, workspace=0.0):
    return CallCost(0.0, 0.0, 0.0, (), (), saved, workspace)


def holding(gradients, shards=None, units=None):
    whole, shards = sum(gradients), tuple(shards or gradients)
    return Holding(
        whole, 0.0, sum(shards), 0.0, len(gradients), max(gradients), units or {"a": whole}, tuple(gradients), shards
    )


def memory(calls, held, **changes):
    kept = changes.pop("alive", [Alive(1, 0)])
    settings = {
        "several": any(of.later for of in kept),
        "sharded": False,
        "copied": False,
        "device": PROCESS,
        "optimizer_state": 2.0,
        "boundary_bytes": 0.0,
        "kept_output_bytes": [0.0],
    }
    return footprint([calls], held, **(settings | changes)).terms(kept)


def walked(saved, gradients, order, kept):
    """The most bytes of activations and gradients together, call by call through an order of microbatches."""
    most = held_activations = 0.0
    done = [0.0] * len(gradients)
    for action in order:
        calls = range(len(saved)) if action.kind is Kind.FORWARD else reversed(range(len(saved)))
        for c in calls:
            if action.kind is Kind.FORWARD:
                held_activations += saved[c]
                most = max(most, held_activations + sum(done))
            else:
                done[c] = gradients[c]
                most = max(most, held_activations + (sum(gradients) if kept else sum(done)))
                held_activations -= saved[c]
        if kept:
            most = max(most, held_activations + sum(gradients))
    return max(most, sum(gradients))


@given(
    st.sampled_from(["1f1b", "gpipe"]),
    st.integers(1, 4),
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=5),
    st.booleans(),
)
def test_the_fullest_moment_is_the_walk_s(schedule, stages, microbatches, costs, replicated):
    saved, gradients = [float(s) for s, _ in costs], [float(g) for _, g in costs]
    held = holding(gradients)._replace(largest=0.0)
    for stage in range(stages):
        terms = memory(
            [call(s) for s in saved],
            held,
            alive=alive(schedule, stage, stages, microbatches),
            copied=replicated,
        )
        order = ORDERS[schedule](stage, stages, microbatches)
        # The buckets are the gradients.
        assert terms["activations"] + terms["gradients"] == pytest.approx(walked(saved, gradients, order, replicated))
        assert terms["buffers"] == 0.0


@given(st.sampled_from(["1f1b", "gpipe"]), st.integers(1, 6), st.integers(1, 12))
def test_alive_is_what_the_schedule_keeps(schedule, stages, microbatches):
    for stage in range(stages):
        counted = alive(schedule, stage, stages, microbatches)
        assert max(counted[0]) == in_flight(schedule, stage, stages, microbatches)


def test_one_microbatch_never_holds_all_activations_and_all_gradients():
    terms = memory([call(100.0), call(100.0)], holding([60.0, 60.0]))
    assert (terms["activations"], terms["gradients"]) == (200.0, 60.0)
    kept = memory([call(100.0), call(100.0)], holding([60.0, 60.0]), alive=[Alive(1, 1)])
    assert (kept["activations"], kept["gradients"]) == (200.0, 120.0)


def test_replicas_keep_buckets():
    """Gradients are views of them, however many microbatches there are."""
    once = memory([call(100.0), call(100.0)], holding([60.0, 60.0]), copied=True)
    several = memory([call(100.0), call(100.0)], holding([60.0, 60.0]), copied=True, alive=[Alive(1, 1)])
    assert (once["activations"], once["gradients"], once["buffers"]) == (200.0, 120.0, 0.0)
    assert (several["activations"], several["gradients"], several["buffers"]) == (200.0, 120.0, 0.0)


def test_the_optimizer_step_can_be_the_fullest_moment():
    terms = memory([call(1.0)], holding([50.0]))
    assert (terms["activations"], terms["gradients"], terms["optimizer"]) == (0.0, 50.0, 100.0)
    assert terms["slack"] == pytest.approx(
        STEP_COPIES * 50 * (1 + 0.02) + 0.02 * (50 + 50 + 100) + PROCESS.reserved_bytes
    )


def test_sharding_gathers_whole_units_and_keeps_shards_of_gradients():
    held = holding([80.0, 40.0], [20.0, 10.0], {"a": 80.0, "b": 40.0})
    once = memory([call(500.0), call(0.0)], held, sharded=True)
    again = memory([call(500.0), call(0.0)], held, sharded=True, alive=[Alive(1, 1)])
    assert (once["parameters"], once["optimizer"]) == (30.0, 60.0)
    assert once["buffers"] == (GATHER_COPIES + REDUCE_COPIES) * 80.0
    assert (once["gradients"], again["gradients"]) == (30.0, 30.0)
    optimizer_only = memory([call(500.0), call(0.0)], held, sharded=True, alive=[Alive(1, 1)], zero=1)
    assert (optimizer_only["gradients"], optimizer_only["parameters"]) == (120.0, 150.0)


def test_holdings_divide_what_tensor_parallelism_and_sharding_divide():
    profile = gpt(layers=2, hidden=64, heads=8)
    holdings = Holdings(profile)
    whole, halved, sharded = holdings.of(0, 5, 1, 1), holdings.of(0, 5, 2, 1), holdings.of(0, 5, 1, 4)
    table = 4 * 256 * 64
    blocks = 2 * 4 * 12 * 64 * 64
    assert whole.trainable == 2 * table + blocks
    assert halved.trainable == 2 * table + blocks / 2
    assert sharded.trainable == whole.trainable
    assert sharded.trainable_shard == whole.trainable / 4
    assert whole.units == {"token": table, "blocks.0": blocks / 2, "blocks.1": blocks / 2, "head": table}
    assert sum(whole.gradients) == whole.trainable
    assert holdings.of(1, 2, 1, 1).trainable == blocks / 2


def test_a_tied_parameter_is_on_both_stages_and_once_on_one():
    profile = gpt(layers=2, hidden=64, heads=8, tied=True)
    holdings = Holdings(profile)
    table = 4 * 256 * 64
    assert holdings.of(0, 1, 1, 1).trainable == table
    assert holdings.of(3, 5, 1, 1).trainable == table
    assert holdings.of(0, 5, 1, 1).trainable == table + 2 * 4 * 12 * 64 * 64
    assert holdings.of(0, 5, 1, 1).gradients[0] == table  # its gradient is complete when the embedding's backward is


@pytest.mark.parametrize(
    ("shape", "ranks", "share"),
    [
        ((8, 3), 4, 0.25),
        ((6,), 4, 2 / 6),
        ((1, 9), 2, 1.0),
        ((), 2, 1.0),
        ((0, 3), 2, 0.0),
        ((3, 5, 8), 2, 0.5),  # along the last dimension
        ((101, 8), 2, 51 / 101),
    ],
)
def test_shards_are_padded(shape, ranks, share):
    assert padded_share(shape, ranks) == pytest.approx(share)


def test_frozen_parameters_have_no_gradient():
    profile = gpt(layers=1, hidden=64, heads=8)
    frozen = {
        n: Parameter(p.names, p.shape, p.bytes, False, p.tensor_dim, p.group) for n, p in profile.parameters.items()
    }
    profile.parameters.update({n: p for n, p in frozen.items() if n.startswith("token")})
    held = Holdings(profile).of(0, 1, 1, 1)
    assert (held.trainable, held.frozen, held.tensors, sum(held.gradients)) == (0.0, 4 * 256 * 64, 0, 0.0)


@pytest.mark.parametrize(
    ("schedule", "chunks"), [("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zero_bubble", 1)]
)
def test_microbatches_kept_are_those_of_the_schedule(schedule, chunks):
    """By following every device's actions."""
    for devices in (1, 2, 3, 5):
        for microbatches in range(1, 24):
            if schedule == "interleaved" and microbatches % devices:
                continue
            for device in range(devices):
                order = ORDERS[schedule](device, devices, microbatches, chunks)
                ends = Kind.WEIGHT if schedule == "zero_bubble" else Kind.BACKWARD
                now, kept = [0] * chunks, []
                for action in order:
                    now[action.chunk] += (action.kind is Kind.FORWARD) - (action.kind is ends)
                    kept.append((action.kind is ends, list(now)))
                begin = next(i for i, (ended, _) in enumerate(kept) if ended)
                first, later = kept[begin - 1][1], max((n for _, n in kept[begin:]), key=sum)
                found = alive(schedule, device, devices, microbatches, chunks)
                assert [each.first for each in found] == first
                assert [each.later for each in found] == later
