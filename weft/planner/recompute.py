"""How much a candidate recomputes: nothing where it fits, and where it does not, as few units as will do.

Every stage by itself (``recomputing``): first some of its units in mode selective, as many as it takes; if all of them
are not enough, some in mode full, and the others selective. Units that free the most memory per second of recomputation
come first, of equal ones the earlier. What is chosen in the end loses what it does not need (``pruned``).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from weft.plan import RECOMPUTE
from weft.planner.space import Candidate
from weft.planner.stages import Ends, Stages


def recomputing(stages: Stages, candidate: Candidate, ends: Ends) -> Candidate:
    """The candidate with the least recomputation that fits; all there is where nothing does."""
    chosen: dict[str, str] = {}
    for stage, (start, end) in enumerate(stages.stretches(ends)):
        for unit, mode in _of_stage(stages, candidate, stage, start, end).items():
            # A unit with calls on several stages does on all of them what one of them needs.
            chosen[unit] = max(mode, chosen.get(unit, mode), key=RECOMPUTE.index)
    return candidate._replace(recompute=chosen)


def pruned(stages: Stages, candidate: Candidate, ends: Ends) -> Candidate:
    """The candidate without the recomputation that it does not need: where some units are recomputed in full, others
    may not have to be at all."""
    limit = stages.cluster.memory_bytes
    for unit in reversed(list(candidate.recompute)):
        rest = {other: mode for other, mode in candidate.recompute.items() if other != unit}
        less = candidate._replace(recompute=rest)
        if max(stages.peaks(less, ends)) <= limit:
            candidate = less
    return candidate


def _of_stage(stages: Stages, candidate: Candidate, stage: int, start: int, end: int) -> Mapping[str, str]:
    limit = stages.cluster.memory_bytes

    def fits(modes: Mapping[str, str]) -> bool:
        changed = candidate._replace(recompute=modes)
        return sum(stages.memory(changed, stage, start, end).values()) <= limit

    before: dict[str, str] = {}
    if fits(before):
        return before
    for mode in RECOMPUTE:
        units = _by_gain(stages, candidate, start, end, mode, before)
        tries = [before | dict.fromkeys(units[:count], mode) for count in range(1, len(units) + 1)]
        least = bisect_left(tries, True, key=fits)  # more units never need more memory
        if least < len(tries):
            return tries[least]
        before = tries[-1] if tries else before
    return before


def _by_gain(
    stages: Stages, candidate: Candidate, start: int, end: int, mode: str, before: Mapping[str, str]
) -> Sequence[str]:
    """Units that keep less in a mode than they do ``before``, the best bargains first."""
    units = [call.unit for call in stages.profile.calls[start:end]]
    freed, spent = dict.fromkeys(units, 0.0), dict.fromkeys(units, 0.0)
    now = stages.calls(candidate._replace(recompute=before), start, end)
    then = stages.calls(candidate._replace(recompute=dict.fromkeys(units, mode)), start, end)
    for unit, a, b in zip(units, now, then, strict=True):
        freed[unit] += a.saved_bytes - b.saved_bytes
        spent[unit] += b.backward_s - a.backward_s
    gaining = [unit for unit in freed if freed[unit] > 0]
    return sorted(gaining, key=lambda unit: -freed[unit] / max(spent[unit], 1e-12))
