"""How much a candidate recomputes: nothing where it fits, and where it does not, as few units as will do.

Every device by itself (``recomputing``): first some of its units in mode selective, as many as it takes; if all of them
are not enough, some in mode full, and the others selective. Units that free the most memory per second of recomputation
come first, of equal ones the earlier. What is chosen in the end loses what it does not need (``pruned``).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from weft.plan import RECOMPUTE
from weft.planner.sites import Site, at
from weft.planner.space import Candidate
from weft.planner.stages import Ends, Stages, Stretch


def recomputing(stages: Stages, candidate: Candidate, ends: Ends) -> Candidate:
    """The candidate with the least recomputation that fits; all there is where nothing does."""
    chosen: dict[str, str] = {}
    for device in range(candidate.degrees.pp):
        for unit, mode in _of_device(stages, candidate, device, stages.chunks(candidate, ends, device)).items():
            # A unit with calls on several stages does on all of them what one of them needs.
            chosen[unit] = max(mode, chosen.get(unit, mode), key=RECOMPUTE.index)
    return candidate._replace(recompute=chosen)


def pruned(stages: Stages, candidate: Candidate, ends: Ends) -> Candidate:
    """The candidate without the recomputation that it does not need: where some units are recomputed in full, others
    may not have to be at all."""
    own = [stages.chunks(candidate, ends, device) for device in range(candidate.degrees.pp)]
    homes: dict[str, set[int]] = {}
    for device, stretches in enumerate(own):
        for stretch in stretches:
            for call in stages.profile.calls[slice(*stretch)]:
                homes.setdefault(call.unit, set()).add(device)
    for unit in reversed(list(candidate.recompute)):
        rest = {other: mode for other, mode in candidate.recompute.items() if other != unit}
        less = candidate._replace(recompute=rest)
        if all(_fits(stages, less, device, own[device]) for device in homes[unit]):
            candidate = less
    return candidate


def _fits(stages: Stages, candidate: Candidate, device: int, stretches: Sequence[Stretch]) -> bool:
    return stages.memory(candidate, device, stretches).fits


def _of_device(stages: Stages, candidate: Candidate, device: int, stretches: Sequence[Stretch]) -> Mapping[str, str]:
    def fits(modes: Mapping[str, str]) -> bool:
        return _fits(stages, candidate._replace(recompute=modes), device, stretches)

    site = stages.slowest(candidate, at(stages.layout(candidate).sites, device))
    before: dict[str, str] = {}
    if fits(before):
        return before
    for mode in RECOMPUTE:
        units = _by_gain(stages, candidate, site, stretches, mode, before)

        def first(count: int, before: dict[str, str] = before, mode: str = mode, units: Sequence[str] = units) -> bool:
            return fits(before | dict.fromkeys(units[:count], mode))

        least = bisect_left(range(len(units) + 1), True, key=first)  # more units never need more memory
        before = before | dict.fromkeys(units[:least], mode)
        if least <= len(units):
            return before
    return before


def _by_gain(
    stages: Stages,
    candidate: Candidate,
    site: Site,
    stretches: Sequence[Stretch],
    mode: str,
    before: Mapping[str, str],
) -> Sequence[str]:
    """Units that keep less in a mode than they do ``before``, the best bargains first."""
    units = [call.unit for stretch in stretches for call in stages.profile.calls[slice(*stretch)]]
    freed, spent = dict.fromkeys(units, 0.0), dict.fromkeys(units, 0.0)
    recomputes = [candidate._replace(recompute=modes) for modes in (before, dict.fromkeys(units, mode))]
    now, then = ([c for stretch in stretches for c in stages.calls(which, *stretch, site)] for which in recomputes)
    for unit, a, b in zip(units, now, then, strict=True):
        freed[unit] += a.saved_bytes - b.saved_bytes
        spent[unit] += b.backward_s - a.backward_s
    gaining = [unit for unit in freed if freed[unit] > 0]
    return sorted(gaining, key=lambda unit: -freed[unit] / max(spent[unit], 1e-12))
