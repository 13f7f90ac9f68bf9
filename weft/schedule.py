"""A pipeline's schedule: one list of actions per stage.

The planner's timeline simulates these lists and the runtime executes them, so this room belongs to neither. Two steps
make a list: an *order* of forwards and backwards, then ``lower`` adds what travels between stages.

GPipe (Huang et al. 2019): all forwards, then all backwards in the order of the forwards. Three stages, four
microbatches, time to the right::

    stage 0   F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3
    stage 1   .  F0 F1 F2 F3 .  .  B0 B1 B2 B3
    stage 2   .  .  F0 F1 F2 F3 B0 B1 B2 B3

1F1B (Narayanan et al. 2019, PipeDream-flush): stage s of S warms up with S-1-s forwards, then alternates, so it keeps
at most S-s microbatches alive::

    stage 0   F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
    stage 1   .  F0 F1 .  B0 F2 B1 F3 B2 .  B3
    stage 2   .  .  F0 B0 F1 B1 F2 B2 F3 B3

A receive is posted one computation ahead of its use, so that it travels while the stage computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What an action does."""

    FORWARD = "F"
    BACKWARD = "B"
    SEND_ACTIVATION = "SA"
    RECEIVE_ACTIVATION = "RA"
    SEND_GRADIENT = "SG"
    RECEIVE_GRADIENT = "RG"
    REDUCE = "R"
    STEP = "S"


COMPUTE = (Kind.FORWARD, Kind.BACKWARD)
TRANSFERS = (Kind.SEND_ACTIVATION, Kind.RECEIVE_ACTIVATION, Kind.SEND_GRADIENT, Kind.RECEIVE_GRADIENT)


@dataclass(frozen=True, slots=True)
class Action:
    """One action of one stage.

    ``microbatch`` is -1 for REDUCE and STEP; ``peer`` is the other stage of a transfer, else -1.
    """

    kind: Kind
    microbatch: int = -1
    peer: int = -1

    def __str__(self) -> str:
        microbatch = "" if self.microbatch < 0 else str(self.microbatch)
        peer = "" if self.peer < 0 else f"({self.peer})"
        return f"{self.kind}{microbatch}{peer}"


@dataclass(frozen=True, slots=True)
class Edge:
    """Tensors go from stage ``source`` to stage ``target``; ``gradient`` tells whether gradients come back."""

    source: int
    target: int
    gradient: bool = True


def gpipe(stage: int, stages: int, microbatches: int) -> list[Action]:
    """Order of one stage's computations under GPipe."""
    del stage, stages
    return [Action(kind, m) for kind in COMPUTE for m in range(microbatches)]


def one_f_one_b(stage: int, stages: int, microbatches: int) -> list[Action]:
    """Order of one stage's computations under 1F1B."""
    warmup = min(stages - 1 - stage, microbatches)
    order = [Action(Kind.FORWARD, m) for m in range(warmup)]
    for m in range(microbatches):
        if warmup + m < microbatches:
            order.append(Action(Kind.FORWARD, warmup + m))
        order.append(Action(Kind.BACKWARD, m))
    return order


ORDERS = {"gpipe": gpipe, "1f1b": one_f_one_b}


def actions(schedule: str, stages: int, microbatches: int, edges: Iterable[Edge]) -> list[list[Action]]:
    """The list of actions of every stage.

    Args:
        schedule: a key of ORDERS.
        stages: number of pipeline stages.
        microbatches: microbatches per step.
        edges: which stages send to which; every edge goes from a lower to a higher stage.

    Returns:
        One list per stage, ending with REDUCE (gradients are averaged) and STEP (the optimizer runs).
    """
    edges = sorted(edges, key=lambda e: (e.source, e.target))
    assert all(0 <= e.source < e.target < stages for e in edges)
    order = ORDERS[schedule]
    return [
        [*lower(order(s, stages, microbatches), s, edges), Action(Kind.REDUCE), Action(Kind.STEP)]
        for s in range(stages)
    ]


def lower(order: Sequence[Action], stage: int, edges: Sequence[Edge]) -> list[Action]:
    """Add transfers to a stage's computations: receives one computation ahead, sends right after."""
    before: list[list[Action]] = []
    after: list[list[Action]] = []
    for action in order:
        m = action.microbatch
        if action.kind is Kind.FORWARD:
            before.append([Action(Kind.RECEIVE_ACTIVATION, m, e.source) for e in edges if e.target == stage])
            after.append([Action(Kind.SEND_ACTIVATION, m, e.target) for e in edges if e.source == stage])
        else:
            before.append(
                [Action(Kind.RECEIVE_GRADIENT, m, e.target) for e in edges if e.source == stage and e.gradient]
            )
            after.append([Action(Kind.SEND_GRADIENT, m, e.source) for e in edges if e.target == stage and e.gradient])
    lowered = list(before[0]) if before else []
    for i, action in enumerate(order):
        if i + 1 < len(order):
            lowered += before[i + 1]
        lowered.append(action)
        lowered += after[i]
    return lowered


def in_flight(schedule: str, stage: int, stages: int, microbatches: int) -> int:
    """The most microbatches whose activations one stage keeps at once."""
    alive = most = 0
    for action in ORDERS[schedule](stage, stages, microbatches):
        alive += 1 if action.kind is Kind.FORWARD else -1
        most = max(most, alive)
    return most
