"""Seconds of recomputation that memory asks for at least, before anybody works out which units it takes.

When a device's first backward begins, all of the calls on it keep what they saved, of ``first`` microbatches each:

    parameters + optimizer + buffers + first * (sum of saved + outputs that wait) <= room          (memory.Footprint)

in every mode of recomputation, of which only the saved bytes depend. What is too much has to be freed by recomputing:
of every call some part, the best bargains first, is the least that can do it (the relaxation of a knapsack: Dantzig,
Discrete-variable extremum problems, 1957). Whole units in modes that there are take no less.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from weft.plan import RECOMPUTE
from weft.planner.compute import CallCost
from weft.planner.memory import Held, alive
from weft.planner.sites import Site, at
from weft.planner.space import Candidate, everywhere
from weft.planner.stages import Ends, Stages, Stretch


class Deficit:
    """Bounds of candidates that recompute; of one profile on one cluster."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        self._everywhere = [everywhere(stages.profile, mode) for mode in RECOMPUTE]
        self._bargains: dict[tuple[CallCost, ...], list[tuple[float, float]]] = {}

    def floor(self, candidate: Candidate, ends: Ends, sites: Sequence[Site]) -> float:
        """Seconds that a candidate's step takes at least with its stages cut so, one chunk each, however it recomputes;
        infinite where no recomputation is enough. ``sites``: of every stage the one that is looked at.

        A device works through its microbatches, and through the first one's forward and the last one's backward all
        devices before it do.
        """
        rows = {site: self.stages.row(candidate, site) for site in set(sites)}
        before = most = 0.0
        for device, stretch in enumerate(self.stages.stretches(ends)):
            site = at(sites, device)
            held = self.stages.memory(candidate, device, [stretch])
            own = sum(rows[site][slice(*stretch)])
            if not held.fits:
                own += self._again_s(candidate, device, stretch, site, held)
            most = max(most, before + candidate.microbatches * own / site.speed)
            before += own / site.speed
        return most

    def _again_s(self, candidate: Candidate, device: int, stretch: Stretch, site: Site, held: Held) -> float:
        """Seconds of recomputation of one microbatch that free what a device has not."""
        stages = self.stages
        kind = stages.kinds[site.kind]
        (kept,) = alive(candidate.schedule, device, candidate.degrees.pp, candidate.microbatches)
        room = (kind.memory_bytes - kind.reserved_bytes) / (1 + kind.allocator_share)
        room -= sum(held.terms[term] for term in ("parameters", "optimizer", "buffers"))
        plain = stages.calls(candidate, *stretch, site)
        missing = sum(call.saved_bytes for call in plain) - room / kept.first
        modes = [stages.calls(candidate._replace(recompute=all_), *stretch, site) for all_ in self._everywhere]
        parts: list[tuple[float, float]] = []
        for of, count in Counter(zip(plain, *modes, strict=True)).items():
            parts += [(freed * count, spent * count) for freed, spent in self._of(of)]
        again = 0.0
        for freed, spent in sorted(parts, key=lambda part: part[1] / part[0]):
            if missing <= 0:
                return again
            again += spent * min(1.0, missing / freed)
            missing -= freed
        return again if missing <= 0 else math.inf

    def _of(self, costs: tuple[CallCost, ...]) -> list[tuple[float, float]]:
        """What a call frees and what that takes, in parts, each a worse bargain than the one before: the lower side of
        the convex hull of what its modes free and take."""
        if costs not in self._bargains:
            self._bargains[costs] = list(_hull(costs[0], costs[1:]))
        return self._bargains[costs]


def _hull(plain: CallCost, modes: Sequence[CallCost]) -> Iterator[tuple[float, float]]:
    """Steps along the lower convex hull from nothing recomputed to all that can be freed."""
    points = [(plain.saved_bytes - m.saved_bytes, max(0.0, m.backward_s - plain.backward_s)) for m in modes]
    x = y = 0.0
    while further := [(a, b) for a, b in points if a > x]:
        a, b = min(further, key=lambda point: ((point[1] - y) / (point[0] - x), -point[0]))
        yield a - x, b - y
        x, y = a, b
