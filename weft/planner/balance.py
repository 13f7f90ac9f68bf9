"""Cuts a sequence of costs into consecutive parts. Pure: numbers in, numbers out.

For costs ``c_1..c_n`` and ``p`` parts, a cut is ``0 = e_0 < e_1 < ... < e_p = n``. ``cuts`` finds, exactly,

    minimise    max_k  sum(c[e_k : e_{k+1}])                the slowest stage sets the pace of a pipeline
    then        sum_k  sum(c[e_k : e_{k+1}]) ** 2           and the others are as even as they can be
    subject to  allowed(k, e_k, e_{k+1})                    the part fits on its stage

by dynamic programming over (part, end): once for the maximum, once more for the squares under that maximum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

Allowed = Callable[[int, int, int], bool]


def ends(costs: Sequence[float], parts: int, allowed: Allowed | None = None) -> list[int] | None:
    """Where each part ends, for the cut that ``cuts`` makes; None if there is none.

    Args:
        costs: not negative.
        parts: how many consecutive, non-empty parts.
        allowed: ``allowed(part, start, end)`` tells whether ``costs[start:end]`` may be that part.
    """
    n = len(costs)
    if not 1 <= parts <= n:
        return None
    sums = [0.0, *accumulate(costs)]
    slowest = _solve(sums, parts, allowed, lambda best, part: max(best, part), math.inf)
    if slowest is None:
        return None
    # Sums of floats differ in the last bits by their order: the second pass allows for that.
    limit = slowest[0] * (1 + 1e-12)
    even = _solve(sums, parts, allowed, lambda best, part: best + part * part, limit)
    assert even is not None
    return even[1]


def cuts(costs: Sequence[float], parts: int, allowed: Allowed | None = None) -> list[list[float]] | None:
    """The costs in consecutive parts whose largest sum is the least possible: ``cuts([1, 2, 3, 4, 5, 6], 2)`` is
    ``[[1, 2, 3, 4], [5, 6]]``; None where no cut is allowed. Arguments as for ``ends``.
    """
    found = ends(costs, parts, allowed)
    if found is None:
        return None
    return [list(costs[start:end]) for start, end in zip([0, *found], found, strict=False)]


def _solve(
    sums: Sequence[float], parts: int, allowed: Allowed | None, join: Callable[[float, float], float], limit: float
) -> tuple[float, list[int]] | None:
    """The cut that minimises a joined cost of parts whose sums are at most ``limit``: its cost and its ends."""
    n = len(sums) - 1
    best: list[list[float]] = [[0.0] + [math.inf] * n]
    origin: list[list[int]] = []
    for part in range(parts):
        row, source = [math.inf] * (n + 1), [0] * (n + 1)
        # Part ``part`` ends at least at part + 1, and leaves an item for each part after it.
        for end in range(part + 1, n - parts + part + 2):
            for start in range(end - 1, part - 1, -1):
                cost = sums[end] - sums[start]
                if cost > limit:
                    break
                joined = join(best[part][start], cost)
                if joined < row[end] and (allowed is None or allowed(part, start, end)):
                    row[end], source[end] = joined, start
        best.append(row)
        origin.append(source)
    if math.isinf(best[parts][n]):
        return None
    found = [n]
    for source in reversed(origin[1:]):
        found.append(source[found[-1]])
    return best[parts][n], found[::-1]
