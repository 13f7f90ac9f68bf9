"""The drawings in weft/schedule.py are what the generators make."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft import schedule
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


@given(st.sampled_from(sorted(schedule.ORDERS)), st.integers(1, 6), st.integers(1, 12))
def test_every_microbatch_goes_forward_then_backward_once(name, stages, microbatches):
    for stage in range(stages):
        order = schedule.ORDERS[name](stage, stages, microbatches)
        assert sorted(order, key=lambda a: (a.kind, a.microbatch)) == [
            Action(kind, m) for kind in (Kind.BACKWARD, Kind.FORWARD) for m in range(microbatches)
        ]
        for m in range(microbatches):
            assert order.index(Action(Kind.FORWARD, m)) < order.index(Action(Kind.BACKWARD, m))
