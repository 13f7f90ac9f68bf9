"""Best first: of all candidates the fastest that fits, and the fastest of each other kind, without costing every one.

Every candidate has a *bound*, seconds that its step takes at least, and is looked at in the order of its bound, more
and more closely:

    degrees      the least of its candidates' bounds                                    _of_degrees
    candidate    S sum over calls of forward + backward, m microbatches, p stages: at best stages are cut so that
                 every one of them ends at the same time, S / (1 - (1 - 1 / m) ** p), and no stage is faster than the
                 slowest call; where devices differ, of every line of replicas           _floor
    tight        stages are cut, and the least recomputation that frees the memory they lack, if any   Deficit.floor
    cut          recomputation is chosen; the bound of Evaluator.bound, with what is exchanged, gathered, reduced, and
                 the optimizer's step
    costed       the simulated timeline

What comes out costed is the fastest there is, since everything else has a bound that is no less. So pruning loses
nothing of what is searched: all degrees, numbers of microbatches (space.counts), schedules, stages of the sharded
optimizer, shares that are equal or by speed; with stages cut by exact balance (balance.ends) and recomputation as
recompute.py chooses it, greedily.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from weft.estimate import Estimate
from weft.plan import listed
from weft.planner import space
from weft.planner.deficit import Deficit
from weft.planner.evaluate import Evaluator
from weft.planner.fitting import Cut, Fitting
from weft.planner.recompute import recomputing
from weft.planner.sites import Line, Site
from weft.planner.space import Candidate, Constraints, Degrees
from weft.planner.stages import Ends


class Costed(NamedTuple):
    """A candidate with its stages cut, and its estimate."""

    candidate: Candidate
    ends: Ends
    estimate: Estimate

    @property
    def peak(self) -> float:
        """Bytes of the fullest device."""
        return max(self.estimate.peak_memory_bytes)

    @property
    def title(self) -> str:
        """The candidate in a line."""
        return title(self.candidate)

    @property
    def order(self) -> tuple[float, float]:
        """Fastest first, of equals the one that needs least memory."""
        return self.estimate.step_time_s, self.peak


def title(candidate: Candidate) -> str:
    """A candidate in a line."""
    degrees, microbatches = candidate.degrees, candidate.microbatches
    shares = f" shares={listed(candidate.shares)}" if candidate.shares else ""
    parts = [degrees.describe() + shares, f"{microbatches} microbatch{'es' if microbatches > 1 else ''}"]
    if degrees.pp > 1:
        parts.append(candidate.schedule + (f" in {candidate.chunks} chunks" if candidate.chunks > 1 else ""))
    parts += [f"zero={candidate.zero}"] * (degrees.dp_shard > 1) + ["sequence-parallel"] * candidate.sequence
    return ", ".join(parts + ["recomputing"] * bool(candidate.recompute))


class Tight(NamedTuple):
    """A candidate whose bound counts the memory it lacks."""

    candidate: Candidate


@dataclass
class Frontier:
    """One search.

    Attributes:
        evaluator: of the profile on the cluster.
        constraints: what is fixed.
        degrees: those that are possible at all.
        fits: degrees of which a candidate was seen to fit.
        costed: how many candidates were looked at closely.
    """

    evaluator: Evaluator
    constraints: Constraints
    degrees: list[Degrees]
    fits: set[Degrees] = field(default_factory=set)
    costed: int = 0
    _floors: dict[object, tuple[float, float, list[float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._deficit = Deficit(self.evaluator.stages)
        self.fitting = Fitting(self.evaluator.stages, self.constraints)

    def __iter__(self) -> Iterator[Costed]:
        """The fastest that fits of each kind of plan, fastest first."""
        number = count()
        heap: list[tuple[float, float, int, Degrees | Candidate | Tight | Cut | Costed]] = []
        settled: set[frozenset[str]] = set()

        def push(bound: float, what: Degrees | Candidate | Tight | Cut | Costed, peak: float = 0.0) -> None:
            heapq.heappush(heap, (bound, peak, next(number), what))

        for degrees in self.degrees:
            push(min(self._floor(c) for c in self._candidates(degrees)), degrees)
        while heap:
            bound, _, _, what = heapq.heappop(heap)
            degrees = (
                what
                if isinstance(what, Degrees)
                else what.degrees
                if isinstance(what, Candidate)
                else (what.candidate.degrees)
            )
            if degrees.kind in settled:
                continue
            if isinstance(what, Degrees):
                if self.fitting.standing(what, 3) > 1:
                    continue
                for candidate in self._of_degrees(what):
                    push(max(bound, self._floor(candidate)), candidate)
            elif isinstance(what, Candidate):
                if self.fitting.may(what) and (least := self._with_memory(what)) < math.inf:
                    push(max(bound, least), Tight(what))
            elif isinstance(what, Tight):
                cut = self.cut(what.candidate)
                if cut.full.fits:
                    self.fits.add(degrees)
                    push(max(bound, self._bound(cut).bound_s or 0.0), cut, cut.full.bytes)
            elif isinstance(what, Cut):
                self.costed += 1
                found = Costed(what.candidate, what.ends, self.evaluator.estimate(what.candidate, what.ends))
                push(max(bound, found.estimate.step_time_s), found, found.peak)
            else:
                settled.add(degrees.kind)
                yield what

    def _candidates(self, degrees: Degrees) -> list[Candidate]:
        """Those of some degrees, with equal shares, and with shares by speed where replicas are of unequal speed."""
        stages = self.evaluator.stages
        equal = list(space.candidates(self.evaluator.profile, degrees, self.constraints))
        if stages.layouts.alike:
            return equal
        return equal + [c for each in equal if (c := stages.with_shares(each)).shares]

    def _of_degrees(self, degrees: Degrees) -> list[Candidate]:
        """The candidates of some degrees. Where cutting the batch would change the statistics taken over it and no
        pipeline asks for it, those that do not, if one of them fits."""
        every = self._candidates(degrees)
        if not self.evaluator.profile.batch_statistics or degrees.pp > 1:
            return every
        whole = [c for c in every if c.microbatches == 1]
        return whole if any(self.cut(c).full.fits for c in whole) else every

    def _floor(self, candidate: Candidate) -> float:
        """Seconds that a candidate's step takes at least, before its stages are cut."""
        stages, cluster = self.evaluator.stages, self.evaluator.cluster
        lines = stages.layout(candidate).lines
        shown = 1 - self.evaluator.system.hides_tensor
        floor = shown * max(self._line_floor(candidate, line) for line in lines)
        if cluster.cores is not None and len(cluster.node_starts) == 1:
            floor = max(floor, sum(self._core_seconds(candidate, line) for line in lines) / cluster.cores)
        return floor

    def _line_floor(self, candidate: Candidate, line: Line) -> float:
        """The same of a line, whose stage ``d`` is at most ``v_d`` as fast at any call as its fastest stage: from

            m y_d + sum of y_e over e < d <= T        for every stage, whose microbatch takes y_d
            sum of v_d y_d >= S                       together they do everything

        follows ``T >= S / sum of l_d`` for ``l_d >= 0`` with ``m l_d + sum of l_e over e > d >= v_d``.
        """
        stages, degrees, m = self.evaluator.stages, candidate.degrees, candidate.microbatches
        paces = [stages.slowest(candidate, sites) for sites in line.sites]
        key = (tuple((site.kind, site.samples) for site in paces), degrees.tp, degrees.cp, candidate.sequence)
        if key not in self._floors:
            whole = candidate._replace(recompute={}, degrees=Degrees(tp=degrees.tp, cp=degrees.cp))
            rows = {site: stages.row(whole, site) for site in paces}
            least = [min(costs) for costs in zip(*rows.values(), strict=True)]
            ratios = {site: [a / b for a, b in zip(least, row, strict=True) if b] for site, row in rows.items()}
            self._floors[key] = sum(least), max(least), [max(ratios[site], default=1.0) for site in paces]
        total, slowest, speeds = self._floors[key]
        if len(speeds) == 1:
            filled = 1 - (1 - 1 / m) ** degrees.pp
        else:
            filled = 0.0
            for speed in reversed(speeds):
                filled += max(0.0, speed - filled) / m
        return max(total / filled, m * slowest)

    def _core_seconds(self, candidate: Candidate, line: Line) -> float:
        """Seconds of processor cores that a line's devices take at least."""
        stages, degrees = self.evaluator.stages, candidate.degrees

        def seconds(site: Site) -> float:
            calls = stages.calls(candidate, 0, len(stages.profile.calls), site)
            return sum(call.forward_s + call.backward_s for call in calls)

        least = min(seconds(site) for sites in line.sites for site in sites)
        share = min(place.core_share for place in line.places)
        devices = len(line.replicas) * degrees.tp * degrees.cp
        return candidate.microbatches * least * share * devices

    def _with_memory(self, candidate: Candidate) -> float:
        """Seconds that a candidate's step takes at least, however it recomputes to fit."""
        stages, shown = self.evaluator.stages, 1 - self.evaluator.system.hides_tensor
        fastest = stages.fastest(candidate)
        if self.constraints.recompute is not None or candidate.chunks > 1 or stages.fullest(candidate, fastest).fits:
            return 0.0
        if not self.fitting.recomputing(candidate).full.fits:
            return math.inf
        full = candidate._replace(recompute=self.fitting.full)
        asked = (candidate, stages.cut(candidate)), (full, fastest), (full, stages.cut(full))
        cuts = dict.fromkeys(ends for which, ends in asked if stages.fullest(which, ends).fits)
        lines = [[stages.slowest(candidate, sites) for sites in line.sites] for line in stages.layout(candidate).lines]
        every = (max(self._deficit.floor(candidate, ends, line) for line in lines) for ends in cuts)
        return shown * min(every, default=math.inf)

    def cut(self, candidate: Candidate) -> Cut:
        """The candidate as it is, or where that does not fit, cut by memory too, or recomputing as much as it takes."""
        stages = self.evaluator.stages

        def found(candidate: Candidate, ends: Ends) -> Cut:
            return Cut(candidate, ends, stages.fullest(candidate, ends))

        fastest = stages.fastest(candidate)
        plain = found(candidate, fastest)
        if plain.full.fits or (self.constraints.recompute is not None and candidate.stages == 1):
            return plain
        options = [plain]
        if (ends := stages.cut(candidate)) != fastest:
            options.append(found(candidate, ends))
        if self.constraints.recompute is None:
            # The stages as they would be with memory for everything, and as they can be with everything recomputed.
            full = candidate._replace(recompute=self.fitting.full)
            for ends in dict.fromkeys([fastest, stages.cut(full)]):
                everything = found(full, ends)
                fits = everything.full.fits
                options.append(found(recomputing(stages, candidate, ends), ends) if fits else everything)
        fitting = [option for option in options if option.full.fits]
        if not fitting:
            return min(options, key=lambda o: o.full.order)
        if len(fitting) == 1:
            return fitting[0]
        # The bound tells little where devices share cores; clusters of such are small.
        evaluator = self.evaluator
        if evaluator.cluster.cores is None:
            return min(map(self._bound, fitting), key=lambda o: o.bound_s or 0.0)
        return min(fitting, key=lambda o: evaluator.estimate(o.candidate, o.ends).step_time_s)

    def _bound(self, cut: Cut) -> Cut:
        """The same with its bound."""
        return cut if cut.bound_s is not None else cut._replace(bound_s=self.evaluator.bound(cut.candidate, cut.ends))

    def least(self, degrees: Degrees) -> Cut:
        """Of the candidates of some degrees the one that needs least memory, as far as their order tells: with one
        microbatch, or with the most."""
        counts = space.counts(self.evaluator.profile, degrees, self.constraints)
        every = [c for c in self._candidates(degrees) if c.microbatches in (1, counts[-1])]
        schedule = every[-1].schedule
        least = (self.fitting.recomputing(c) for c in every if c.schedule == schedule)
        return min(least, key=lambda cut: cut.full.order)
