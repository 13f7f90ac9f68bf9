"""Later: variants of the best plans that weft cannot run yet, and that would be faster than the choice.

They are told of, so that one knows what to wait for, and never chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from weft.estimate import Estimate
from weft.planner import space
from weft.planner.evaluate import Evaluator
from weft.planner.frontier import Costed
from weft.planner.space import Candidate
from weft.planner.stages import Ends

WORTH_WAITING = 0.99
"""Share of the choice's time below which a plan that weft cannot run yet is told of."""

TOLD_LATER = 2
"""How many of those are told of."""

DIVIDED_ELSEWISE = 2
"""Of so many of the best plans also variants with context and expert parallelism are looked at."""


class Later(NamedTuple):
    """A plan that would be faster, in a line; its estimate; what weft lacks to run it."""

    what: str
    estimate: Estimate
    lacks: str


def later_of(evaluator: Evaluator, best: Sequence[Costed]) -> list[Later]:
    """Variants of the best plans that would be faster than the choice."""
    limit = WORTH_WAITING * best[0].estimate.step_time_s
    possible: list[tuple[float, Candidate, Ends, str]] = []
    for number, costed in enumerate(best):
        variants = list(space.later(evaluator.profile, costed.candidate))
        if number < DIVIDED_ELSEWISE:
            variants += space.elsewise(evaluator.profile, costed.candidate)
        for candidate, lacks in variants:
            ends = evaluator.stages.fastest(candidate)
            if evaluator.stages.fullest(candidate, ends).fits:
                possible.append((evaluator.bound(candidate, ends), candidate, ends, lacks))
    found: list[Later] = []
    for bound, candidate, ends, lacks in sorted(possible, key=lambda x: x[0]):
        if bound >= limit:
            break
        variant = Costed(candidate, ends, evaluator.estimate(candidate, ends))
        if variant.estimate.step_time_s < limit:
            found.append(Later(variant.title, variant.estimate, lacks))
            found.sort(key=lambda x: x.estimate.step_time_s)
            del found[TOLD_LATER:]
            if len(found) == TOLD_LATER:
                limit = found[-1].estimate.step_time_s
    return found
