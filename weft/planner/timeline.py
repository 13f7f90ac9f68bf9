"""Simulates a schedule: the very lists of actions that the runtime executes, with the time each one takes.

One representative device stands for each stage. An action computes for ``compute_s`` on a device alone, then
communicates for ``collective_s`` with the stage's other devices. Transfers between stages are asynchronous: one begins
when both ends have posted it and the pair's previous one in that direction has arrived.

Devices that share processor cores slow each other: of ``A`` devices of a node that are busy at once, each computes at
``min(1, cores / A)`` of its speed. Communication counts as busy, but is not slowed: its rates were measured with all at
work.

A step's time is the end of the last stage, and for each stage

    end = compute + collectives + reduce + step + transfer + bubble

where waiting for a tensor is ``transfer`` while that tensor travels and ``bubble`` before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from weft.schedule import COMPUTE, Action, Kind


class Work(NamedTuple):
    """One action on one device: seconds of computation alone, then seconds of communication inside the stage."""

    compute_s: float
    collective_s: float = 0.0


@dataclass(frozen=True)
class Stage:
    """What a stage's actions cost, and where its devices are.

    ``node`` names the node (stages on different nodes share no cores) and ``devices`` counts the stage's devices on it.
    """

    forward: Work
    backward: Work
    reduce: Work
    step: Work
    node: int = 0
    devices: int = 1

    def work(self, kind: Kind) -> Work:
        """Cost of an action that takes a device's time."""
        match kind:
            case Kind.FORWARD:
                return self.forward
            case Kind.BACKWARD:
                return self.backward
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
        arrival = max(arrival for _, arrival in travels)
        # Of those that arrive together, but for rounding, the one that travelled longest.
        begin = min(begin for begin, end in travels if end >= arrival * (1 - 1e-9))
        if arrival <= since * (1 + 1e-12):
            return since
        travelling = arrival - max(begin, since)
        self.transfer_s += travelling
        self.bubble_s += arrival - since - travelling
        return arrival

    def work(self, kind: Kind, compute_s: float, collective_s: float) -> None:
        """Spend what an action takes, or a part of it."""
        match kind:
            case Kind.REDUCE:
                self.reduce_s += compute_s + collective_s
            case Kind.STEP:
                self.step_s += compute_s + collective_s
            case _:
                self.compute_s += compute_s
                self.collective_s += collective_s


class Key(NamedTuple):
    """Identity of a transfer: gradients go from a higher stage to a lower."""

    source: int
    target: int
    microbatch: int


def simulate(
    actions: Sequence[Sequence[Action]],
    stages: Sequence[Stage],
    transfer_s: Mapping[tuple[int, int], float],
    cores: float | None = None,
) -> list[Spent]:
    """Run the lists of actions.

    Args:
        actions: one list per stage, as ``schedule.actions`` makes them.
        stages: their costs.
        transfer_s: seconds one microbatch's tensors take from a stage to another, by (source, target).
        cores: devices of a node that compute at full speed at once; None: all.

    Returns:
        Per stage what its time went to.
    """
    if cores is None:
        return _independent(actions, stages, transfer_s)
    run = _Run(actions, stages, transfer_s, cores)
    while run.advance():
        pass
    return [state.spent for state in run.states]


def _independent(
    actions: Sequence[Sequence[Action]], stages: Sequence[Stage], transfer_s: Mapping[tuple[int, int], float]
) -> list[Spent]:
    """The same where no stage slows another: each is followed on its own as far as what it waits for is known, so the
    work grows with the actions alone.

    Transfers of a pair follow each other in one order, which is that of both ends' lists.
    """
    waits = [_needs(own, stage) for stage, own in enumerate(actions)]
    posted: dict[Key, float] = {}
    travels: dict[Key, tuple[float, float]] = {}
    free: dict[tuple[int, int], float] = {}
    now, place = [0.0] * len(stages), [0] * len(stages)
    spent = [Spent() for _ in stages]
    moved = True
    while moved:
        moved = False
        for stage, own in enumerate(actions):
            while place[stage] < len(own):
                action = own[place[stage]]
                if action.kind not in COMPUTE and action.peer >= 0:
                    sends = action.kind in (Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT)
                    pair = (stage, action.peer) if sends else (action.peer, stage)
                    key = Key(*pair, action.microbatch)
                    if key in posted:
                        begin = max(now[stage], posted[key], free.get(pair, 0.0))
                        free[pair] = begin + transfer_s[pair]
                        travels[key] = begin, free[pair]
                    else:
                        posted[key] = now[stage]
                else:
                    needed = waits[stage].get((action.kind, action.microbatch), [])
                    if any(key not in travels for key in needed):
                        break
                    if needed:
                        now[stage] = spent[stage].wait(now[stage], [travels[key] for key in needed])
                    work = stages[stage].work(action.kind)
                    spent[stage].work(action.kind, *work)
                    now[stage] += work.compute_s + work.collective_s
                place[stage] += 1
                moved = True
    assert all(p == len(own) for p, own in zip(place, actions, strict=True)), "the schedule is stuck"
    for stage, end in enumerate(now):
        spent[stage].end_s = end
    return spent


def _needs(actions: Sequence[Action], stage: int) -> dict[tuple[Kind, int], list[Key]]:
    """The tensors each computation of a stage waits for."""
    needs: dict[tuple[Kind, int], list[Key]] = {}
    for action in actions:
        if action.kind in (Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT):
            kind = Kind.FORWARD if action.kind is Kind.RECEIVE_ACTIVATION else Kind.BACKWARD
            needs.setdefault((kind, action.microbatch), []).append(Key(action.peer, stage, action.microbatch))
    return needs


@dataclass
class _State:
    """Where one stage is: the next action, what is left of the present one, since when it waits."""

    next: int = 0
    kind: Kind | None = None
    compute_left: float = 0.0
    collective_left: float = 0.0
    waits_since: float | None = None
    spent: Spent = field(default_factory=Spent)


class _Run:
    def __init__(
        self,
        actions: Sequence[Sequence[Action]],
        stages: Sequence[Stage],
        transfer_s: Mapping[tuple[int, int], float],
        cores: float | None,
    ) -> None:
        self.actions, self.stages, self.transfer_s, self.cores = actions, stages, transfer_s, cores
        self.states = [_State() for _ in stages]
        self.now = 0.0
        self.posted: dict[Key, float] = {}  # by the end that came first
        self.travels: dict[Key, tuple[float, float]] = {}  # begin, arrival
        self.free: dict[tuple[int, int], float] = {}  # when a pair's direction is next free
        self.needs = [_needs(own, stage) for stage, own in enumerate(actions)]

    def advance(self) -> bool:
        """Start what can start, then go to the next event; False when every stage is done."""
        started = True
        while started:  # a send posted by one stage may let an earlier one go on at the same instant
            started = False
            for index in range(len(self.states)):
                started |= self._start(index)
        rates = self._rates()
        left = [self._left(index, rates[index]) for index in range(len(self.states))]
        seconds = min(left)
        if math.isinf(seconds):
            assert all(s.next == len(a) for s, a in zip(self.states, self.actions, strict=True)), (
                "the schedule is stuck"
            )
            return False
        for index, state in enumerate(self.states):
            if state.kind is not None:
                self._spend(state, seconds, rates[index], done=left[index] <= seconds)
        self.now += seconds
        return True

    def _left(self, index: int, rate: float) -> float:
        """Seconds to a stage's next event: a phase of its action ends, or what it waits for arrives."""
        state = self.states[index]
        if state.kind is not None:
            return state.compute_left / rate if state.compute_left > 0 else state.collective_left
        return math.inf if state.waits_since is None else self._arrival(index) - self.now

    def _start(self, index: int) -> bool:
        """Go through a stage's list up to the next action that takes time; whether anything happened."""
        state, actions = self.states[index], self.actions[index]
        moved = False
        while state.kind is None and state.next < len(actions):
            action = actions[state.next]
            if action.kind in COMPUTE or action.peer < 0:
                if self._arrival(index) > self.now * (1 + 1e-12):
                    if state.waits_since is None:
                        state.waits_since, moved = self.now, True
                    return moved
                self._end_wait(state, index)
                work = self.stages[index].work(action.kind)
                state.kind, state.compute_left, state.collective_left = action.kind, work.compute_s, work.collective_s
            else:
                sends = action.kind in (Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT)
                pair = (index, action.peer) if sends else (action.peer, index)
                self._post(Key(*pair, action.microbatch))
                state.next += 1
            moved = True
        if state.next == len(actions) and not state.spent.end_s:
            state.spent.end_s = self.now
        return moved

    def _post(self, key: Key) -> None:
        """One end is ready for a transfer; with both it begins when its pair is free."""
        if key not in self.posted:
            self.posted[key] = self.now
            return
        pair = (key.source, key.target)
        begin = max(self.now, self.free.get(pair, 0.0))
        self.travels[key] = (begin, begin + self.transfer_s[pair])
        self.free[pair] = self.travels[key][1]

    def _waited_for(self, index: int) -> list[Key]:
        action = self.actions[index][self.states[index].next]
        return self.needs[index].get((action.kind, action.microbatch), [])

    def _arrival(self, index: int) -> float:
        """When everything the stage's next computation needs is there; infinite while something is not on its way."""
        keys = self._waited_for(index)
        return max((self.travels[k][1] if k in self.travels else math.inf for k in keys), default=0.0)

    def _end_wait(self, state: _State, index: int) -> None:
        if state.waits_since is None:
            return
        state.spent.wait(state.waits_since, [self.travels[key] for key in self._waited_for(index)])
        state.waits_since = None

    def _rates(self) -> list[float]:
        """Speed of every stage's computation, 1 alone."""
        if self.cores is None:
            return [1.0] * len(self.stages)
        busy: dict[int, int] = {}
        for state, stage in zip(self.states, self.stages, strict=True):
            if state.kind is not None:
                busy[stage.node] = busy.get(stage.node, 0) + stage.devices
        return [min(1.0, self.cores / busy.get(stage.node, stage.devices)) for stage in self.stages]

    @staticmethod
    def _spend(state: _State, seconds: float, rate: float, *, done: bool) -> None:
        """Let time pass for a busy stage; ``done`` ends the phase it is in, and after its last phase the action."""
        computing = state.compute_left > 0
        if computing:
            state.compute_left = 0.0 if done else state.compute_left - seconds * rate
        else:
            state.collective_left = 0.0 if done else state.collective_left - seconds
        assert state.kind is not None
        state.spent.work(state.kind, seconds * computing, seconds * (not computing))
        if state.compute_left == 0.0 and state.collective_left == 0.0:
            state.kind = None
            state.next += 1
