"""What is put on a pipeline's timeline, and what comes out of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from weft.schedule import Action, Kind


class Work(NamedTuple):
    """One action on one device: seconds of computation alone, then of communication inside the stage, then of sending
    to other stages where the device can do nothing else meanwhile."""

    compute_s: float
    collective_s: float = 0.0
    sending_s: float = 0.0


IDLE = Work(0.0)

TOGETHER, LATER = 1 - 1e-9, 1 + 1e-12
"""Tensors that arrive at the same time, and one that arrives after another moment, rounding aside."""


@dataclass(frozen=True)
class Stage:
    """What a stage's actions cost, and where its devices are. Of a device with several stages, ``reduce`` and ``step``
    stand with the first.

    ``node`` names the node (stages on different nodes share no cores), ``devices`` counts the stage's devices on it,
    ``core_share`` is what each takes of a core.
    """

    forward: Work
    backward: Work
    reduce: Work
    step: Work
    node: int = 0
    devices: int = 1
    weight: Work = IDLE
    core_share: float = 1.0

    def work(self, kind: Kind) -> Work:
        """Cost of an action that takes a device's time."""
        match kind:
            case Kind.FORWARD:
                return self.forward
            case Kind.BACKWARD:
                return self.backward
            case Kind.WEIGHT:
                return self.weight
            case Kind.REDUCE:
                return self.reduce
            case _:
                return self.step


@dataclass
class Spent:
    """Seconds a stage spent by what it did; they add up to ``end_s``."""

    compute_s: float = 0.0
    collective_s: float = 0.0
    reduce_s: float = 0.0
    step_s: float = 0.0
    transfer_s: float = 0.0
    bubble_s: float = 0.0
    end_s: float = 0.0

    @property
    def idle_s(self) -> float:
        """Seconds spent waiting for other stages."""
        return self.transfer_s + self.bubble_s

    def wait(self, since: float, travels: Sequence[tuple[float, float]]) -> float:
        """Wait for tensors that begin to travel and arrive at these times; when the wait is over. While the last of
        them travels the link is waited for, before that the schedule."""
        begin, arrival = last_of(travels)
        if arrival <= since * LATER:
            return since
        travelling = arrival - max(begin, since)
        self.transfer_s += travelling
        self.bubble_s += arrival - since - travelling
        return arrival

    def work(self, kind: Kind, compute_s: float, collective_s: float, sending_s: float) -> None:
        """Spend what an action takes, or a part of it."""
        match kind:
            case Kind.REDUCE:
                self.reduce_s += compute_s + collective_s
            case Kind.STEP:
                self.step_s += compute_s + collective_s
            case _:
                self.compute_s += compute_s
                self.collective_s += collective_s
                self.transfer_s += sending_s


class Event(NamedTuple):
    """An action that took a device's time, seconds from the beginning of the step; of a receive while it travelled
    and was waited for."""

    device: int
    action: Action
    begin_s: float
    end_s: float


class Key(NamedTuple):
    """Identity of a transfer: gradients go from a higher stage to a lower."""

    source: int
    target: int
    microbatch: int


def transfer_of(action: Action, device: int, devices: int) -> Key:
    """The transfer that an action posts its end of."""
    stage = device + action.chunk * devices
    sends = action.kind in (Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT)
    return Key(stage, action.peer, action.microbatch) if sends else Key(action.peer, stage, action.microbatch)


def arriving(action: Action) -> Action:
    """The receive that a computation waits for."""
    forward = action.kind is Kind.FORWARD
    return action._replace(kind=Kind.RECEIVE_ACTIVATION if forward else Kind.RECEIVE_GRADIENT)


def last_of(travels: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """When the last of some tensors begins to travel, and arrives: of those that arrive together the one that travels
    longest."""
    travels = list(travels)
    arrival = max(end for _, end in travels)
    return min(begin for begin, end in travels if end >= arrival * TOGETHER), arrival


def needs(actions: Sequence[Action], device: int, devices: int) -> dict[tuple[Kind, int, int], list[Key]]:
    """The tensors each computation of a device waits for."""
    needs: dict[tuple[Kind, int, int], list[Key]] = {}
    for action in actions:
        if action.kind in (Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT):
            kind = Kind.FORWARD if action.kind is Kind.RECEIVE_ACTIVATION else Kind.BACKWARD
            key = transfer_of(action, device, devices)
            needs.setdefault((kind, action.microbatch, action.chunk), []).append(key)
    return needs
