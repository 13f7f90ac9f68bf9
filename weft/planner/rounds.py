"""Rounds: what the devices of a pipeline do where nothing is trained, put on the timeline.

A batch is cut into groups, all of which are in flight. Round 0 takes each through the pipeline once (a prediction, or a
prompt); every later one through a step of decoding, one more token for each sequence. Three stages, two groups (a, b)::

    stage 0   a0 b0 .  a1 b1 .  a2 b2
    stage 1   .  a0 b0 .  a1 b1 .  a2 b2
    stage 2   .  .  a0 b0 .  a1 b1 .  a2 b2

The last stage chooses a group's tokens and sends them to every earlier one, which begins the group's next step with
them. So a round takes as long as a group takes once around, or the slowest stage for all groups, whichever is more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from weft.planner.program import compiled, follow
from weft.planner.sharing import Sharing
from weft.planner.work import IDLE, Event, Spent, Stage, Work
from weft.schedule import Action, Kind

FILLED = 3
"""Rounds after which every round takes as long as the one before."""


class Lap(NamedTuple):
    """One forward of a group on one pipeline.

    Attributes:
        works: of each stage.
        transfers: seconds from stage to stage.
    """

    works: tuple[Work, ...]
    transfers: Mapping[tuple[int, int], float]

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of each stage."""
        return tuple(map(sum, self.works))

    @property
    def around_s(self) -> float:
        """Seconds through all stages, of a group alone: along neighbours."""
        stages = range(1, len(self.works))
        return sum(self.seconds) + sum(self.transfers.get((s - 1, s), 0.0) for s in stages)


class Pipe(NamedTuple):
    """One pipeline: its prompts, its steps of decoding if there are any, seconds in which chosen tokens reach an
    earlier stage, and where its stages' devices are: ``(node, devices, core_share)`` of each."""

    first: Lap
    then: Lap | None
    back: Mapping[int, float]
    places: tuple[tuple[int, int, float], ...]


class Ended(NamedTuple):
    """When all groups of a pipeline have been through round 0 and through the last, and what its devices spent."""

    first_s: float
    end_s: float
    spent: tuple[Spent, ...]


@lru_cache(maxsize=256)
def lists(
    stages: int, groups: int, rounds: int, first: frozenset[tuple[int, int]], then: frozenset[tuple[int, int]]
) -> tuple[tuple[Action, ...], ...]:
    """What each device does in so many rounds. ``first`` and ``then``: which stages send to which in round 0 and later;
    a step of decoding is a device's second chunk."""
    found: list[tuple[Action, ...]] = []
    receive, send = Kind.RECEIVE_ACTIVATION, Kind.SEND_ACTIVATION
    last = stages - 1
    for device in range(stages):
        own: list[Action] = []
        for r in range(rounds):
            chunk, offset, edges = (0, 0, first) if r == 0 else (1, stages, then)
            for number in range(r * groups, (r + 1) * groups):
                if r and device < last:
                    own.append(Action(receive, number, last if r == 1 else last + stages, chunk))
                own += [Action(receive, number, s + offset, chunk) for s, t in sorted(edges) if t == device]
                own.append(Action(Kind.FORWARD, number, chunk=chunk))
                own += [Action(send, number, t + offset, chunk) for s, t in sorted(edges) if s == device]
                if device == last and r < rounds - 1:
                    own += [Action(send, number + groups, t + stages, chunk) for t in range(last)]
        found.append(tuple(own))
    return tuple(found)


def simulate(pipes: Sequence[Pipe], groups: int, rounds: int, cores: Mapping[int, float] | None) -> list[Ended]:
    """What pipelines that do the same side by side spend on so many rounds. Those beyond FILLED are told from the last
    two.

    Args:
        pipes: all of them.
        groups: of each.
        rounds: one, and one for each further token.
        cores: of every node, where devices share them.
    """
    short = FILLED + 2
    if rounds <= short:
        return _run(pipes, groups, rounds, cores)
    one, two = (_run(pipes, groups, count, cores) for count in (short - 1, short))
    more = rounds - short

    def longer(a: Spent, b: Spent) -> Spent:
        return Spent(*(y + more * (y - x) for x, y in zip(vars(a).values(), vars(b).values(), strict=True)))

    return [
        Ended(b.first_s, b.end_s + more * (b.end_s - a.end_s), tuple(map(longer, a.spent, b.spent)))
        for a, b in zip(one, two, strict=True)
    ]


def _run(pipes: Sequence[Pipe], groups: int, rounds: int, cores: Mapping[int, float] | None) -> list[Ended]:
    first = pipes[0]
    stages = len(first.first.works)
    then = frozenset(first.then.transfers) if first.then is not None else frozenset[tuple[int, int]]()
    does = lists(stages, groups, rounds, frozenset(first.first.transfers), then)
    ready = [(_stages(pipe), _transfers(pipe)) for pipe in pipes]
    if cores is not None:
        together = Sharing(does, ready, cores)
        every = list(zip(together.run(), together.events, strict=True))
    else:
        events: list[list[Event]] = [[] for _ in pipes]
        every = [(follow(compiled(does), *pipe, seen), seen) for pipe, seen in zip(ready, events, strict=True)]
    found = []
    for spent, seen in every:
        ends = [e.end_s for e in seen if e.device == stages - 1 and e.action.kind is Kind.FORWARD]
        found.append(Ended(sorted(ends)[groups - 1], max(ends), tuple(spent)))
    return found


def _stages(pipe: Pipe) -> list[Stage]:
    """Costs of all stages: of round 0, and of the later rounds."""
    works = [*pipe.first.works, *(pipe.then.works if pipe.then is not None else ())]
    return [
        Stage(work, IDLE, IDLE, IDLE, node, devices, core_share=share)
        for work, (node, devices, share) in zip(works, pipe.places * 2, strict=False)
    ]


def _transfers(pipe: Pipe) -> dict[tuple[int, int], float]:
    """Seconds from stage to stage, those of later rounds as the second chunks."""
    stages = len(pipe.first.works)
    found = dict(pipe.first.transfers)
    if pipe.then is not None:
        found |= {(s + stages, t + stages): seconds for (s, t), seconds in pipe.then.transfers.items()}
    for target, seconds in pipe.back.items():
        found |= {(source, target + stages): seconds for source in (stages - 1, 2 * stages - 1)}
    return found


def least_s(pipe: Pipe, groups: int, rounds: int) -> float:
    """Seconds that all rounds take at least."""
    p = pipe.first.seconds
    if pipe.then is None or rounds == 1:
        return max(sum(p) + (groups - 1) * own for own in p)
    d, steps = pipe.then.seconds, rounds - 1
    busiest = max(sum(p[:s]) + groups * (p[s] + steps * d[s]) + sum(d[s + 1 :]) for s in range(len(p)))
    return max(busiest, sum(p) + steps * pipe.then.around_s)


def least_token_s(pipe: Pipe, groups: int, rounds: int) -> float:
    """Seconds from token to token at least: a stage is at most a round ahead of the last."""
    assert pipe.then is not None
    d, steps = pipe.then.seconds, rounds - 1
    return max(pipe.then.around_s, groups * d[-1], groups * max(d) * (steps - 1) / steps)
