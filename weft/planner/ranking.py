"""Ranking: of all candidates for inference the best that fits of each kind, without simulating every one.

A candidate has a bound before its stages are cut (Forwards.floor), another when they are (Forwards.bound), and is
simulated only when none that is left could be better.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

from weft.estimate import InferenceEstimate
from weft.planner import space
from weft.planner.forwards import Forwards
from weft.planner.memory import Held
from weft.planner.space import Candidate, Constraints, Degrees
from weft.planner.stages import Ends


class Weighed(NamedTuple):
    """A candidate with its stages cut, what its fullest device holds, and its estimate if it was simulated."""

    candidate: Candidate
    ends: Ends
    full: Held
    estimate: InferenceEstimate | None = None

    @property
    def title(self) -> str:
        """The candidate in a line."""
        groups = self.candidate.microbatches
        return self.candidate.degrees.describe() + (f", {groups} groups" if groups > 1 else "")


class Search:
    """One search among some degrees."""

    def __init__(self, forwards: Forwards, constraints: Constraints, degrees: list[Degrees], objective: str) -> None:
        self.forwards, self.objective = forwards, objective
        self.candidates = [c for each in degrees for c in candidates(forwards, each, constraints)]
        self.simulated = 0
        self._room = math.inf
        if objective == "memory":
            self._room = min((self.cut(c).full.order[0] for c in self.candidates), default=math.inf) * (1 + 1e-9)

    def best(self, most: int) -> list[Weighed]:
        """The best of each kind of plan that fits, best first, so many at most."""
        found: list[Weighed] = []
        for weighed in self:
            found.append(weighed)
            if len(found) == most:
                break
        return found

    def cut(self, candidate: Candidate) -> Weighed:
        """A candidate with its stages cut."""
        ends = self.forwards.cut(candidate)
        rooms = self.forwards.holder.rooms(candidate, ends)
        return Weighed(candidate, ends, max((room.held for room in rooms), key=lambda held: held.order))

    def score(self, estimate: InferenceEstimate) -> float:
        """What is to be least: seconds of a batch, or of a token."""
        if self.objective == "latency" and estimate.token_s is not None:
            return estimate.token_s
        return estimate.batch_s

    def __iter__(self) -> Iterator[Weighed]:
        number, settled = count(), set[frozenset[str]]()
        token = self.objective == "latency"
        heap: list[tuple[float, float, int, Candidate | Weighed]] = []
        for candidate in self.candidates:
            heapq.heappush(heap, (self.forwards.floor(candidate, token=token), 0.0, next(number), candidate))
        while heap:
            bound, _, _, what = heapq.heappop(heap)
            degrees = what.candidate.degrees if isinstance(what, Weighed) else what.degrees
            if degrees.kind in settled:
                continue
            if not isinstance(what, Weighed):
                what = self.cut(what)
                if what.full.fits and what.full.order[0] <= self._room:
                    bounded = self.forwards.token_bound if token else self.forwards.bound
                    least = max(bound, bounded(what.candidate, what.ends))
                    heapq.heappush(heap, (least, what.full.bytes, next(number), what))
            elif what.estimate is None:
                self.simulated += 1
                estimate = self.forwards.estimate(what.candidate, what.ends)
                what = what._replace(estimate=estimate)
                heapq.heappush(heap, (self.score(estimate), what.full.bytes, next(number), what))
            else:
                settled.add(degrees.kind)
                yield what


def candidates(forwards: Forwards, degrees: Degrees, constraints: Constraints) -> list[Candidate]:
    """Every number of groups for these degrees, with equal shares, and with shares by speed where replicas differ."""
    profile, stages = forwards.task.first, forwards.first.stages
    equal = [Candidate(degrees, count, "gpipe") for count in space.counts(profile, degrees, constraints)]
    return equal + [c for each in equal if (c := stages.with_shares(each)).shares]
