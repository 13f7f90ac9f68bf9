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

Interleaved 1F1B (Narayanan et al. 2021): a device holds several stages, ``chunks`` of them. Stage ``k`` of the model is
chunk ``k // S`` of device ``k % S``, so the bubble is shorter by their number, and more tensors travel. Two devices,
two microbatches, two chunks (F0.1: microbatch 0, chunk 1; F0: chunk 0)::

    device 0  F0 F1 F0.1 F1.1 B0.1 B1.1 B0 B1
    device 1  F0 F1 F0.1 B0.1 F1.1 B1.1 B0 B1

Zero bubble (Qi et al. 2023, ZB-H1): a backward is split into the gradients of the inputs (B), which others wait for,
and those of the weights (W), which fill what would be idle. Stage s leaves s of the latter for the end::

    stage 0   F0 F1 F2 .  .  B0 W0 F3 B1 W1 B2 W2 B3 W3
    stage 1   .  F0 F1 .  B0 F2 B1 W0 F3 B2 W1 B3 W2 W3
    stage 2   .  .  F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3

A receive is posted one computation ahead of its use, so that it travels while the stage computes. The runtime executes
GPipe and 1F1B; the others are planned only (``plan.SCHEDULES`` against ORDERS).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What an action does."""

    FORWARD = "F"
    BACKWARD = "B"
    WEIGHT = "W"
    SEND_ACTIVATION = "SA"
    RECEIVE_ACTIVATION = "RA"
    SEND_GRADIENT = "SG"
    RECEIVE_GRADIENT = "RG"
    REDUCE = "R"
    STEP = "S"


COMPUTE = (Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT)
TRANSFERS = (Kind.SEND_ACTIVATION, Kind.RECEIVE_ACTIVATION, Kind.SEND_GRADIENT, Kind.RECEIVE_GRADIENT)


class Action(NamedTuple):
    """One action of one device.

    ``microbatch`` is -1 for REDUCE and STEP; ``peer`` is the other stage of a transfer, else -1; ``chunk`` tells which
    of the device's stages it is of.
    """

    kind: Kind
    microbatch: int = -1
    peer: int = -1
    chunk: int = 0

    def __str__(self) -> str:
        microbatch = "" if self.microbatch < 0 else str(self.microbatch)
        chunk = f".{self.chunk}" if self.chunk else ""
        peer = "" if self.peer < 0 else f"({self.peer})"
        return f"{self.kind}{microbatch}{chunk}{peer}"


@dataclass(frozen=True, slots=True)
class Edge:
    """Tensors go from stage ``source`` to stage ``target``; ``gradient`` tells whether gradients come back."""

    source: int
    target: int
    gradient: bool = True


def gpipe(device: int, devices: int, microbatches: int, chunks: int = 1) -> list[Action]:
    """Order of one device's computations under GPipe."""
    del device, devices
    assert chunks == 1
    return [Action(kind, m) for kind in (Kind.FORWARD, Kind.BACKWARD) for m in range(microbatches)]


def one_f_one_b(device: int, devices: int, microbatches: int, chunks: int = 1) -> list[Action]:
    """Order of one device's computations under 1F1B."""
    assert chunks == 1
    warmup = min(devices - 1 - device, microbatches)
    order = [Action(Kind.FORWARD, m) for m in range(warmup)]
    for m in range(microbatches):
        if warmup + m < microbatches:
            order.append(Action(Kind.FORWARD, warmup + m))
        order.append(Action(Kind.BACKWARD, m))
    return order


def interleaved(device: int, devices: int, microbatches: int, chunks: int = 1) -> list[Action]:
    """Order of one device's computations under interleaved 1F1B; ``microbatches`` is a multiple of ``devices``."""
    assert microbatches % devices == 0
    total = microbatches * chunks

    def action(kind: Kind, k: int) -> Action:
        chunk = k // devices % chunks
        microbatch = k // (devices * chunks) * devices + k % devices
        return Action(kind, microbatch, chunk=chunk if kind is Kind.FORWARD else chunks - 1 - chunk)

    warmup = min(2 * (devices - 1 - device) + (chunks - 1) * devices, total)
    order = [action(Kind.FORWARD, k) for k in range(warmup)]
    for k in range(total):
        if warmup + k < total:
            order.append(action(Kind.FORWARD, warmup + k))
        order.append(action(Kind.BACKWARD, k))
    return order


def zero_bubble(device: int, devices: int, microbatches: int, chunks: int = 1) -> list[Action]:
    """Order of one device's computations under ZB-H1."""
    order = []
    for action in one_f_one_b(device, devices, microbatches, chunks):
        order.append(action)
        if action.kind is Kind.BACKWARD and action.microbatch >= device:
            order.append(Action(Kind.WEIGHT, action.microbatch - device))
    return order + [Action(Kind.WEIGHT, m) for m in range(max(0, microbatches - device), microbatches)]


ORDERS = {"gpipe": gpipe, "1f1b": one_f_one_b, "interleaved": interleaved, "zero_bubble": zero_bubble}


def actions(
    schedule: str, devices: int, microbatches: int, edges: Iterable[Edge], chunks: int = 1
) -> list[list[Action]]:
    """The list of actions of every device of a pipeline.

    Args:
        schedule: a key of ORDERS.
        devices: devices of the pipeline; stages are ``devices * chunks``.
        microbatches: microbatches per step.
        edges: which stages send to which; every edge goes from a lower to a higher stage.
        chunks: stages of a device; above 1 for ``"interleaved"`` only.

    Returns:
        One list per device, ending with REDUCE (gradients are averaged) and STEP (the optimizer runs).
    """
    edges = sorted(edges, key=lambda e: (e.source, e.target))
    assert all(0 <= e.source < e.target < devices * chunks for e in edges)
    edges = [e for e in edges if (e.target - e.source) % devices]  # the others stay on their device
    order = ORDERS[schedule]
    return [
        [*lower(order(d, devices, microbatches, chunks), d, edges, devices), Action(Kind.REDUCE), Action(Kind.STEP)]
        for d in range(devices)
    ]


def lower(order: Sequence[Action], device: int, edges: Sequence[Edge], devices: int) -> list[Action]:
    """Add transfers to a device's computations: receives one computation ahead, sends right after."""
    stages = {action.chunk: device + action.chunk * devices for action in order}
    # Peers of each chunk: what comes from which, and back to it; what goes to which, and comes back from it.
    comes = {chunk: [e.source for e in edges if e.target == stage] for chunk, stage in stages.items()}
    returns = {chunk: [e.source for e in edges if e.target == stage and e.gradient] for chunk, stage in stages.items()}
    goes = {chunk: [e.target for e in edges if e.source == stage] for chunk, stage in stages.items()}
    back = {chunk: [e.target for e in edges if e.source == stage and e.gradient] for chunk, stage in stages.items()}
    lowered: list[Action] = []
    sends: list[Action] = []
    previous: Action | None = None
    forward, receive, send = Kind.FORWARD, Kind.RECEIVE_ACTIVATION, Kind.SEND_ACTIVATION
    backward, receive_back, send_back = Kind.BACKWARD, Kind.RECEIVE_GRADIENT, Kind.SEND_GRADIENT
    for action in order:
        kind, m, _, chunk = action
        receives: list[Action] = []
        after: list[Action] = []
        if kind is forward:
            receives = [Action(receive, m, peer, chunk) for peer in comes[chunk]]
            after = [Action(send, m, peer, chunk) for peer in goes[chunk]]
        elif kind is backward:
            receives = [Action(receive_back, m, peer, chunk) for peer in back[chunk]]
            after = [Action(send_back, m, peer, chunk) for peer in returns[chunk]]
        lowered += receives
        if previous is not None:
            lowered.append(previous)
            lowered += sends
        previous, sends = action, after
    return lowered if previous is None else [*lowered, previous, *sends]


def in_flight(schedule: str, stage: int, stages: int, microbatches: int) -> int:
    """The most microbatches whose activations one stage keeps at once."""
    alive = most = 0
    for action in ORDERS[schedule](stage, stages, microbatches):
        alive += {Kind.FORWARD: 1, Kind.BACKWARD: -1}.get(action.kind, 0)
        most = max(most, alive)
    return most
