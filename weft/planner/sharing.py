"""The timeline where devices share processor cores, by events: each phase of an action goes on at the rate its node's
busy devices leave it, until the next one begins or ends anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weft.planner.work import Event, Key, Spent, Stage, needs, transfer_of
from weft.schedule import COMPUTE, Action, Kind


@dataclass
class _State:
    """Where one device is: the next action, what is left of the present one, since when it waits."""

    next: int = 0
    began: float = 0.0
    kind: Kind | None = None
    compute_left: float = 0.0
    collective_left: float = 0.0
    waits_since: float | None = None
    spent: Spent = field(default_factory=Spent)


class Sharing:
    """One simulation."""

    def __init__(
        self,
        actions: Sequence[Sequence[Action]],
        stages: Sequence[Stage],
        transfer_s: Mapping[tuple[int, int], float],
        cores: float,
        events: list[Event],
    ) -> None:
        self.actions, self.stages, self.transfer_s, self.cores = actions, stages, transfer_s, cores
        self.events, self.devices = events, len(actions)
        self.states = [_State() for _ in actions]
        self.now = 0.0
        self.posted: dict[Key, float] = {}  # by the end that came first
        self.travels: dict[Key, tuple[float, float]] = {}  # begin, arrival
        self.free: dict[tuple[int, int], float] = {}  # when a pair's direction is next free
        self.needs = [needs(own, device, self.devices) for device, own in enumerate(actions)]

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
                self._spend(index, seconds, rates[index], done=left[index] <= seconds)
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
                work = self.stages[index + action.chunk * self.devices].work(action.kind)
                assert not work.sending_s, "processes that share cores send without waiting"
                state.kind, state.compute_left, state.collective_left = action.kind, work.compute_s, work.collective_s
                state.began = self.now
            else:
                self._post(transfer_of(action, index, self.devices))
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
        pair = (key.source % self.devices, key.target % self.devices)
        begin = max(self.now, self.free.get(pair, 0.0))
        self.travels[key] = (begin, begin + self.transfer_s[key.source, key.target])
        self.free[pair] = self.travels[key][1]

    def _waited_for(self, index: int) -> list[Key]:
        action = self.actions[index][self.states[index].next]
        return self.needs[index].get((action.kind, action.microbatch, action.chunk), [])

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
        busy: dict[int, int] = {}
        for state, stage in zip(self.states, self.stages, strict=False):
            if state.kind is not None:
                busy[stage.node] = busy.get(stage.node, 0) + stage.devices
        stages = self.stages[: self.devices]
        return [min(1.0, self.cores / busy.get(stage.node, stage.devices)) for stage in stages]

    def _spend(self, index: int, seconds: float, rate: float, *, done: bool) -> None:
        """Let time pass for a busy stage; ``done`` ends the phase it is in, and after its last phase the action."""
        state = self.states[index]
        computing = state.compute_left > 0
        if computing:
            state.compute_left = 0.0 if done else state.compute_left - seconds * rate
        else:
            state.collective_left = 0.0 if done else state.collective_left - seconds
        assert state.kind is not None
        state.spent.work(state.kind, seconds * computing, seconds * (not computing), 0.0)
        if state.compute_left == 0.0 and state.collective_left == 0.0:
            action = self.actions[index][state.next]
            self.events.append(Event(index, action, state.began, self.now + seconds))
            state.kind = None
            state.next += 1
