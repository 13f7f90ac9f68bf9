"""The drawings in weft/schedule.py are what the generators make."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft import schedule
from weft.planner.timeline import simulate
from weft.planner.work import Stage, Work
from weft.schedule import Action, Edge, Kind, actions, in_flight


def drawing(name: str) -> list[str]:
    """The lines of a drawing in the module's docstring, from the one that names the schedule."""
    assert schedule.__doc__ is not None
    after = schedule.__doc__.split(name + " (")[1]
    return [line.split(maxsplit=2)[2] for line in after.splitlines() if line.startswith("    stage ")][:3]


def draw(name: str, stages: int, microbatches: int) -> list[str]:
    """Every computation in the first slot in which what it needs is done, with equal times."""
    done: dict[tuple[str, int, int], int] = {}  # (kind, microbatch, stage) -> slot after it
    orders = [schedule.ORDERS[name](s, stages, microbatches) for s in range(stages)]
    rows: list[list[str]] = [[] for _ in range(stages)]
    while any(orders):
        slot = max(map(len, rows)) if len({len(row) for row in rows}) == 1 else min(map(len, rows))
        for s, order in enumerate(orders):
            if len(rows[s]) > slot:
                continue
            ready = False
            if order:
                action = order[0]
                needs = []
                if action.kind is Kind.FORWARD and s > 0:
                    needs = [("F", action.microbatch, s - 1)]
                elif action.kind is Kind.BACKWARD and s < stages - 1:
                    needs = [("B", action.microbatch, s + 1)]
                ready = all(done.get(need, slot + 1) <= slot for need in needs)
            if ready:
                done[str(order[0].kind), order[0].microbatch, s] = slot + 1
                rows[s].append(str(order.pop(0)))
            else:
                rows[s].append(". ")
    return [" ".join(row).rstrip(" .") for row in rows]


@pytest.mark.parametrize(("name", "title"), [("gpipe", "GPipe"), ("1f1b", "1F1B")])
def test_drawings(name, title):
    assert draw(name, 3, 4) == drawing(title)


def test_gpipe_order():
    assert " ".join(map(str, schedule.gpipe(1, 3, 4))) == "F0 F1 F2 F3 B0 B1 B2 B3"


@pytest.mark.parametrize(
    ("stage", "order"),
    [
        (0, "F0 F1 F2 B0 F3 B1 B2 B3"),
        (1, "F0 F1 B0 F2 B1 F3 B2 B3"),
        (2, "F0 B0 F1 B1 F2 B2 F3 B3"),
    ],
)
def test_1f1b_order(stage, order):
    assert " ".join(map(str, schedule.one_f_one_b(stage, 3, 4))) == order


def test_actions_receive_one_computation_ahead():
    lists = actions("1f1b", 2, 2, [Edge(0, 1)])
    assert " ".join(map(str, lists[0])) == "F0 SA0(1) RG0(1) F1 SA1(1) RG1(1) B0 B1 R S"
    assert " ".join(map(str, lists[1])) == "RA0(0) F0 RA1(0) B0 SG0(0) F1 B1 SG1(0) R S"


def test_actions_skip_edges_and_tensors_without_gradient():
    lists = actions("gpipe", 3, 1, [Edge(0, 2, gradient=False), Edge(0, 1), Edge(1, 2)])
    assert " ".join(map(str, lists[0])) == "RG0(1) F0 SA0(1) SA0(2) B0 R S"
    assert " ".join(map(str, lists[2])) == "RA0(0) RA0(1) F0 B0 SG0(1) R S"


@pytest.mark.parametrize(("name", "stage", "kept"), [("gpipe", 0, 8), ("gpipe", 3, 8), ("1f1b", 0, 4), ("1f1b", 3, 1)])
def test_in_flight(name, stage, kept):
    assert in_flight(name, stage, 4, 8) == kept


@given(st.sampled_from(sorted(schedule.ORDERS)), st.integers(1, 6), st.integers(1, 12), st.integers(1, 3))
def test_every_microbatch_goes_forward_then_backward_once(name, devices, microbatches, chunks):
    chunks = chunks if name == "interleaved" else 1
    microbatches *= devices if name == "interleaved" else 1
    kinds = [Kind.BACKWARD, Kind.FORWARD] + [Kind.WEIGHT] * (name == "zero_bubble")
    for device in range(devices):
        order = schedule.ORDERS[name](device, devices, microbatches, chunks)
        every = [(m, c) for m in range(microbatches) for c in range(chunks)]
        assert sorted(order, key=lambda a: (a.kind, a.microbatch, a.chunk)) == [
            Action(kind, m, chunk=c) for kind in kinds for m, c in every
        ]
        for m, c in every:
            places = [order.index(Action(kind, m, chunk=c)) for kind in (Kind.FORWARD, *kinds[::2], *kinds[2:])]
            assert places == sorted(places)


@given(st.sampled_from(["interleaved", "zero_bubble"]), st.integers(2, 5), st.integers(1, 4), st.integers(1, 3))
def test_schedules_that_are_only_planned_run_to_their_end(name, devices, rounds, chunks):
    """Simulated with transfers that take time, no device waits for ever, and more chunks leave less idle."""
    chunks = chunks if name == "interleaved" else 1
    stages = devices * chunks
    edges = [Edge(s, s + 1) for s in range(stages - 1)]
    work = [Stage(Work(1 / chunks), Work(1 / chunks), Work(0.0), Work(0.0), weight=Work(1 / chunks))] * stages
    if name == "interleaved":
        work = [replace(stage, backward=Work(2 / chunks)) for stage in work]
    times = {pair: 0.0 for e in edges for pair in ((e.source, e.target), (e.target, e.source))}
    lists = actions(name, devices, rounds * devices, edges, chunks)
    end = max(spent.end_s for spent in simulate(lists, work, times))
    if name == "interleaved":  # bubble (p - 1)(F + B) / v, Narayanan et al. 2021
        assert end == pytest.approx(3 * rounds * devices + 3 * (devices - 1) / chunks)
    elif rounds > 1:  # bubble (p - 1)(F + B - W), Qi et al. 2023
        assert end == pytest.approx(3 * rounds * devices + devices - 1)
