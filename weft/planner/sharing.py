"""The timeline where devices share processor cores, by events: each phase of an action goes on at the rate its node's
busy devices leave it, until the next one begins or ends anywhere.

The kernel gives every busy process as much of the cores, and what one cannot take (Device.core_share) to the others
(``level``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from weft.planner.work import Event, Key, Spent, Stage, arriving, needs, transfer_of
from weft.schedule import COMPUTE, Action, Kind

Pipeline = tuple[Sequence[Stage], Mapping[tuple[int, int], float]]
"""All stages of a pipeline, and seconds from stage to stage."""


def level(takers: Iterable[tuple[float, int]], cores: float) -> float:
    """What each device gets of the cores at most, where so many ``(share, devices)`` take this share of a core each."""
    takers = sorted(takers)
    count = sum(devices for _, devices in takers)
    for share, devices in takers:
        if share * count >= cores:
            return cores / count
        cores, count = cores - share * devices, count - devices
    return math.inf


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
    """One simulation: pipelines that do the same actions side by side. State ``k`` is of device ``k % devices`` of
    pipeline ``k // devices``."""

    def __init__(
        self, actions: Sequence[Sequence[Action]], pipelines: Sequence[Pipeline], cores: Mapping[int, float]
    ) -> None:
        self.actions, self.pipelines, self.cores = actions, pipelines, cores
        self.devices = len(actions)
        self.events: list[list[Event]] = [[] for _ in pipelines]
        self.states = [_State() for _ in pipelines for _ in actions]
        self.now = 0.0
        self.posted: dict[tuple[int, Key], float] = {}  # by the end that came first
        self.travels: dict[tuple[int, Key], tuple[float, float]] = {}  # begin, arrival
        self.free: dict[tuple[int, int, int], float] = {}  # when a pair's direction is next free
        self.needs = [needs(own, device, self.devices) for device, own in enumerate(actions)]

    def run(self) -> list[list[Spent]]:
        """What every device of each pipeline spends."""
        while self.advance():
            pass
        spent = [state.spent for state in self.states]
        return [spent[first : first + self.devices] for first in range(0, len(spent), self.devices)]

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
            every = zip(self.states, len(self.pipelines) * list(self.actions), strict=True)
            assert all(state.next == len(own) for state, own in every), "the schedule is stuck"
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
        pipeline, device = divmod(index, self.devices)
        state, actions, stages = self.states[index], self.actions[device], self.pipelines[pipeline][0]
        moved = False
        while state.kind is None and state.next < len(actions):
            action = actions[state.next]
            if action.kind in COMPUTE or action.peer < 0:
                if self._arrival(index) > self.now * (1 + 1e-12):
                    if state.waits_since is None:
                        state.waits_since, moved = self.now, True
                    return moved
                self._end_wait(state, index)
                work = stages[device + action.chunk * self.devices].work(action.kind)
                assert not work.sending_s, "processes that share cores send without waiting"
                state.kind, state.compute_left, state.collective_left = action.kind, work.compute_s, work.collective_s
                state.began = self.now
            else:
                self._post(pipeline, transfer_of(action, device, self.devices))
                state.next += 1
            moved = True
        if state.next == len(actions) and not state.spent.end_s:
            state.spent.end_s = self.now
        return moved

    def _post(self, pipeline: int, key: Key) -> None:
        """One end is ready for a transfer; with both it begins when its pair is free."""
        if (pipeline, key) not in self.posted:
            self.posted[pipeline, key] = self.now
            return
        pair = (pipeline, key.source % self.devices, key.target % self.devices)
        begin = max(self.now, self.free.get(pair, 0.0))
        end = begin + self.pipelines[pipeline][1][key.source, key.target]
        self.travels[pipeline, key] = begin, end
        self.free[pair] = end

    def _waited_for(self, index: int) -> list[tuple[int, Key]]:
        pipeline, device = divmod(index, self.devices)
        action = self.actions[device][self.states[index].next]
        keys = self.needs[device].get((action.kind, action.microbatch, action.chunk), [])
        return [(pipeline, key) for key in keys]

    def _arrival(self, index: int) -> float:
        """When everything the stage's next computation needs is there; infinite while something is not on its way."""
        keys = self._waited_for(index)
        return max((self.travels[k][1] if k in self.travels else math.inf for k in keys), default=0.0)

    def _end_wait(self, state: _State, index: int) -> None:
        if state.waits_since is None:
            return
        before = state.spent.transfer_s
        arrival = state.spent.wait(state.waits_since, [self.travels[key] for key in self._waited_for(index)])
        if (travelled := state.spent.transfer_s - before) > 0:
            pipeline, device = divmod(index, self.devices)
            action = arriving(self.actions[device][state.next])
            self.events[pipeline].append(Event(device, action, arrival - travelled, arrival))
        state.waits_since = None

    def _rates(self) -> list[float]:
        """Speed of every stage's computation, 1 alone."""
        stages = [stage for pipeline, _ in self.pipelines for stage in pipeline[: self.devices]]
        busy: dict[int, list[tuple[float, int]]] = {}
        for state, stage in zip(self.states, stages, strict=True):
            if state.kind is not None:
                busy.setdefault(stage.node, []).append((stage.core_share, stage.devices))
        levels = {node: level(takers, self.cores[node]) for node, takers in busy.items()}
        return [min(1.0, levels.get(stage.node, math.inf) / stage.core_share) for stage in stages]

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
            pipeline, device = divmod(index, self.devices)
            action = self.actions[device][state.next]
            self.events[pipeline].append(Event(device, action, state.began, self.now + seconds))
            state.kind = None
            state.next += 1
