"""The simulated timeline of a schedule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.planner.timeline import simulate
from weft.planner.work import Stage, Work
from weft.schedule import Edge, actions


def run(
    schedule,
    stages,
    microbatches,
    *,
    forward=1.0,
    backward=2.0,
    transfer=0.0,
    reduce=0.0,
    step=0.0,
    cores=None,
    devices=1,
):
    work = [Stage(Work(forward), Work(backward), Work(0.0, reduce), Work(step), devices=devices) for _ in range(stages)]
    edges = [Edge(s, s + 1) for s in range(stages - 1)]
    times = {pair: transfer for s in range(stages - 1) for pair in ((s, s + 1), (s + 1, s))}
    return simulate(actions(schedule, stages, microbatches, edges), work, times, cores)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (1, 5), (2, 1), (4, 4), (4, 16), (3, 2)])
def test_the_bubble_of_a_pipeline_is_known(schedule, stages, microbatches):
    """(m + p - 1) (f + b), as the papers say."""
    spent = run(schedule, stages, microbatches)
    assert max(s.end_s for s in spent) == pytest.approx((microbatches + stages - 1) * 3.0)
    assert all(s.compute_s == pytest.approx(microbatches * 3.0) for s in spent)


def test_one_stage_adds_up():
    (spent,) = run("1f1b", 1, 4, reduce=0.5, step=0.25)
    assert (spent.compute_s, spent.reduce_s, spent.step_s) == (12.0, 0.5, 0.25)
    assert spent.end_s == pytest.approx(12.75)
    assert spent.idle_s == 0.0


def test_transfers_that_travel_while_computing_cost_only_the_ends():
    fast, slow = (max(s.end_s for s in run("gpipe", 2, 8, transfer=t)) for t in (0.0, 0.5))
    assert slow == pytest.approx(fast + 2 * 0.5)


def test_transfers_of_a_pair_follow_each_other():
    """A link slower than the stages sets the pace."""
    spent = run("gpipe", 2, 4, forward=1.0, backward=1.0, transfer=3.0)
    # The last activation arrives at 1 + 4 * 3, and is used; all four gradients come back one by one after the first.
    assert spent[1].compute_s == 8.0
    assert max(s.end_s for s in spent) == pytest.approx(1 + 12 + 1 + 1 + 12 + 1)
    assert spent[1].transfer_s == pytest.approx(12 - 3)


def test_four_processes_on_two_cores():
    """Only two can compute at once: the work of all over two, and never less than a process alone."""
    busy = run("gpipe", 1, 1, cores=2.0, devices=4)[0]
    assert busy.end_s == pytest.approx(3.0 * 4 / 2)
    # Two stages of two processes with one microbatch take turns, and so have the cores to themselves.
    turns = run("gpipe", 2, 1, cores=2.0, devices=2)
    assert max(s.end_s for s in turns) == pytest.approx(6.0)


def test_stages_on_other_nodes_share_no_cores():
    work = [Stage(Work(1.0), Work(1.0), Work(0.0), Work(0.0), node=n) for n in (0, 1)]
    lists = actions("gpipe", 2, 4, [])
    assert [s.end_s for s in simulate(lists, work, {}, 1.0)] == [8.0, 8.0]
    same_node = [Stage(Work(1.0), Work(1.0), Work(0.0), Work(0.0)) for _ in (0, 1)]
    assert [s.end_s for s in simulate(lists, same_node, {}, 1.0)] == [16.0, 16.0]


def test_skip_connections():
    """Stage 0 also sends to stage 2: stage 2 waits for the later of its two inputs."""
    work = [Stage(Work(1.0), Work(1.0), Work(0.0), Work(0.0)) for _ in range(3)]
    edges = [Edge(0, 1), Edge(0, 2), Edge(1, 2)]
    times = dict.fromkeys([(0, 1), (1, 2), (1, 0), (2, 1), (2, 0)], 0.0) | {(0, 2): 10.0}
    spent = simulate(actions("gpipe", 3, 1, edges), work, times, None)
    assert max(s.end_s for s in spent) == pytest.approx(1 + 10 + 1 + 1 + 1 + 1)
    assert spent[2].bubble_s == pytest.approx(1.0)
    assert spent[2].transfer_s == pytest.approx(10.0)


@given(
    st.sampled_from(["gpipe", "1f1b"]),
    st.integers(1, 5),
    st.integers(1, 8),
    st.lists(st.floats(0.01, 3), min_size=10, max_size=10),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.floats(0, 4), st.booleans()), max_size=6),
)
def test_stages_of_their_own_are_simulated_as_those_with_cores_to_spare(schedule, stages, microbatches, seconds, more):
    work = [
        Stage(Work(f, f / 3), Work(b, b / 5), Work(0.1, 0.2), Work(0.3))
        for f, b in zip(seconds[::2], seconds[1::2], strict=True)
    ][:stages]
    edges = {(s, s + 1): Edge(s, s + 1) for s in range(stages - 1)}
    edges |= {(s, t): Edge(s, t, gradient) for s, t, _, gradient in more if s < t < stages}
    times = dict.fromkeys([pair for s, t in edges for pair in ((s, t), (t, s))], 0.4)
    times |= {(s, t): seconds for s, t, seconds, _ in more}
    lists = actions(schedule, stages, microbatches, edges.values())
    for own, shared in zip(simulate(lists, work, times, None), simulate(lists, work, times, 1e9), strict=True):
        assert vars(own) == pytest.approx(vars(shared), rel=1e-9, abs=1e-9)


@given(
    st.sampled_from(["gpipe", "1f1b"]),
    st.integers(1, 5),
    st.integers(1, 8),
    st.lists(st.floats(0.01, 3), min_size=10, max_size=10),
    st.floats(0, 2),
    st.sampled_from([None, 1.0, 1.7, 2.0]),
)
def test_every_stage_adds_up(schedule, stages, microbatches, seconds, transfer, cores):
    work = [
        Stage(Work(f, f / 3), Work(b, b / 5), Work(0.1, 0.2), Work(0.3))
        for f, b in zip(seconds[::2], seconds[1::2], strict=True)
    ]
    edges = [Edge(s, s + 1) for s in range(stages - 1)]
    times = {pair: transfer for s in range(stages - 1) for pair in ((s, s + 1), (s + 1, s))}
    spent = simulate(actions(schedule, stages, microbatches, edges), work[:stages], times, cores)
    for stage, cost in zip(spent, work, strict=False):
        total = stage.compute_s + stage.collective_s + stage.reduce_s + stage.step_s + stage.transfer_s + stage.bubble_s
        assert total == pytest.approx(stage.end_s)
        assert stage.compute_s >= microbatches * (cost.forward.compute_s + cost.backward.compute_s) * (1 - 1e-9)
        assert stage.collective_s == pytest.approx(
            microbatches * (cost.forward.collective_s + cost.backward.collective_s)
        )
    if cores is not None:  # the cores are never overdrawn
        work_done = sum(microbatches * (w.forward.compute_s + w.backward.compute_s) for w in work[:stages])
        assert max(s.end_s for s in spent) >= work_done / cores * (1 - 1e-9)
