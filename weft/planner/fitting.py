"""Fitting: which candidates have no room however they recompute, known before anybody works out how they would.

    standing    what the stages hold in any case, of all the memory there is
    least       a candidate with everything recomputed and few microbatches alive, its stages cut by memory if need be

Smaller microbatches, ZeRO-3 and 1F1B need less, as a rule: candidates that differ in these alone share an answer. What
does not fit so has no room at all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from weft.planner import space
from weft.planner.memory import Held
from weft.planner.sites import at
from weft.planner.space import Candidate, Constraints, Degrees, everywhere
from weft.planner.stages import Ends, Stages
from weft.quantity import format_bytes


class Cut(NamedTuple):
    """A candidate with its stages cut, not yet costed, and what its fullest device holds; with its bound, where it is
    known."""

    candidate: Candidate
    ends: Ends
    full: Held
    bound_s: float | None = None

    @property
    def needs(self) -> str:
        """What its fullest device needs, in words."""
        again = " with recomputation" if self.candidate.recompute else ""
        return f"needs {format_bytes(self.full.bytes)} of {format_bytes(self.full.limit)}{again}"


class Fitting:
    """What has room, of the candidates of one search; each question is answered once."""

    def __init__(self, stages: Stages, constraints: Constraints) -> None:
        self.stages, self.constraints = stages, constraints
        self.full = everywhere(stages.profile, "full")
        self._most = self.full if constraints.recompute is None else everywhere(stages.profile, constraints.recompute)
        self._standing: dict[tuple[Degrees, int], float] = {}
        self._least: dict[tuple[Degrees, int, int, tuple[int, ...]], Cut] = {}

    def standing(self, degrees: Degrees, zero: int) -> float:
        """Share of their memory that devices fill at least, in the optimizer's step: what the stages hold together, of
        what those devices of each that can hold least can."""
        key = (degrees, zero)
        if key not in self._standing:
            self._standing[key] = self._filled(degrees, zero)
        return self._standing[key]

    def _filled(self, degrees: Degrees, zero: int) -> float:
        stages = self.stages
        holding = stages.holding(degrees, [(0, len(stages.profile.calls))])
        shards = holding.trainable_shard + holding.frozen_shard
        whole = holding.trainable + holding.frozen if degrees.dp_shard > 1 and zero < 3 else 0.0
        state = holding.trainable_shard * (1 + stages.profile.optimizer_state_bytes)  # and the gradients
        kinds, sites = stages.kinds, stages.layout(Candidate(degrees, 1, "1f1b")).sites
        rooms = [(k.memory_bytes - k.reserved_bytes) / (1 + k.allocator_share) for k in kinds]
        room = sum(min(rooms[site.kind] for site in at(sites, stage)) for stage in range(degrees.pp))
        return (shards + whole + state) / room if room > 0 else math.inf

    def may(self, candidate: Candidate) -> bool:
        """False where it is known at once that a candidate does not fit: by what it holds in any case, or because
        smaller microbatches, ZeRO-3 or 1F1B would not, which need less: but for a single microbatch, which keeps no
        gradients beside activations."""
        if self.standing(candidate.degrees, candidate.zero) > 1:
            return False
        if candidate.microbatches == 1 or self.constraints.recompute is not None:
            return True
        if candidate.zero < 3 and not self.may(candidate._replace(zero=3)):
            return False
        most = space.counts(self.stages.profile, candidate.degrees, self.constraints)[-1]
        return self.recomputing(candidate._replace(microbatches=most)).full.fits

    def recomputing(self, candidate: Candidate) -> Cut:
        """A candidate with everything recomputed and few microbatches alive, cut by memory too if it must be."""
        key = (candidate.degrees, candidate.microbatches, candidate.zero, candidate.shares)
        if key not in self._least:
            self._least[key] = self._recomputing(candidate)
        return self._least[key]

    def _recomputing(self, candidate: Candidate) -> Cut:
        stages = self.stages
        schedule = "1f1b" if self.constraints.schedule is None else candidate.schedule
        full = candidate._replace(schedule=schedule, recompute=self._most)
        fastest = stages.fastest(full)
        held = stages.fullest(full, fastest)
        if not held.fits:
            fastest = stages.cut(full)
            held = stages.fullest(full, fastest)
        return Cut(full, fastest, held)
