"""Cuts a sequence of costs into consecutive parts. Pure: numbers in, numbers out.

For costs ``c_1..c_n`` and ``p`` parts, a cut is ``0 = e_0 < e_1 < ... < e_p = n``. ``cuts`` finds, exactly,

    minimise    max_k  sum(c[e_k : e_{k+1}])                the slowest stage sets the pace of a pipeline
    then        sum_k  sum(c[e_k : e_{k+1}]) ** 2           and the others are as even as they can be
    subject to  allowed(k, e_k, e_{k+1})                    the part fits on its stage

by dynamic programming over (part, end): for the squares under the maximum, which is found first. Where every part is
allowed and costs the same wherever it is, by bisection, each step of which fills parts from the left; where not by the
same programming, under a limit that grows until there is a cut.

Where devices are of unequal speed every part has costs of its own: ``c`` is then a row for each part.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

Allowed = Callable[[int, int, int], bool]

ROUNDING = 1e-12
"""Sums of floats differ in the last bits by their order: limits allow for that much more, as a share of them."""


def ends(rows: Sequence[Sequence[float]], parts: int, allowed: Allowed | None = None) -> list[int] | None:
    """Where each part ends, for the cut that ``cuts`` makes; None if there is none.

    Args:
        rows: costs, not negative: one row for all parts, or one for each, where they are of unequal speed.
        parts: how many consecutive, non-empty parts.
        allowed: ``allowed(part, start, end)`` tells whether ``costs[start:end]`` may be that part.
    """
    if not 1 <= parts <= len(rows[0]):
        return None
    sums = _sums(rows, parts)
    pace = _pace(sums, parts)
    if allowed is not None or len(rows) > 1:
        slowest = None
        for limit in (pace, 1.5 * pace, 3 * pace, math.inf):
            slowest = _solve(sums, parts, allowed, limit * (1 + ROUNDING), even=False)
            if slowest is not None:
                break
        if slowest is None:
            return None
        pace = slowest[0]
    even = _solve(sums, parts, allowed, pace * (1 + ROUNDING), even=True)
    assert even is not None
    return even[1]


def cuts(costs: Sequence[float], parts: int, allowed: Allowed | None = None) -> list[list[float]] | None:
    """The costs in consecutive parts whose largest sum is the least possible: ``cuts([1, 2, 3, 4, 5, 6], 2)`` is
    ``[[1, 2, 3, 4], [5, 6]]``; None where no cut is allowed. Arguments as for ``ends``.
    """
    found = ends([costs], parts, allowed)
    if found is None:
        return None
    return [list(costs[start:end]) for start, end in zip([0, *found], found, strict=False)]


def packed(rows: Sequence[Sequence[float]], parts: int, allowed: Allowed, *, steps: int = 12) -> list[int] | None:
    """Where each part ends, quickly: as ``ends`` but for evenness, for parts of which any piece is allowed where the
    whole is, and any single item on any part. The largest sum is the least possible to within ``2 ** -steps`` of the
    sum of all, where one row of costs holds for all parts.

    Under a limit parts are filled from the left, each as far as it may go, which leaves least for the others; the limit
    is found by bisection.
    """
    every = _sums(rows, parts)
    n = len(rows[0])
    # of a part from its start: an end that is allowed, one that is not
    known: dict[tuple[int, int], tuple[int, int]] = {}

    def furthest(part: int, start: int, most: int, length: int) -> int:
        """The furthest end up to ``most`` that is allowed, looked for about ``length`` items on; or the start."""
        allows, refuses = known.get((part, start), (start, n + 1))
        end, step = start + length, 1
        while allows < (last := min(most, refuses - 1)):
            end = max(allows + 1, min(end, last))
            fits = allowed(part, start, end)
            allows, refuses = (end, refuses) if fits else (allows, end)
            if start < allows and refuses <= n:
                end = (allows + refuses) // 2
            else:
                end, step = end + (step if fits else -step), 2 * step
        known[part, start] = allows, refuses
        return min(allows, most)

    def fill(limit: float) -> list[int] | None:
        found: list[int] = []
        start, length = 0, n // parts
        for part, sums in enumerate(every):
            most = min(bisect_right(sums, sums[start] + limit) - 1, n - (parts - part - 1))
            end = furthest(part, start, most, length)
            if end <= start:
                return None
            found.append(end)
            start, length = end, end - start
        return found if start == n else None

    best, low, high = fill(math.inf), _pace(every, parts), max(sums[-1] for sums in every)
    for _ in range(steps if best else 0):
        limit = (low + high) / 2
        narrower = fill(limit)
        best, low, high = (narrower, low, limit) if narrower else (best, limit, high)
    return best


def _sums(rows: Sequence[Sequence[float]], parts: int) -> list[list[float]]:
    """Sums of the costs up to each, for every part."""
    found = [[0.0, *accumulate(row)] for row in rows]
    return found if len(found) > 1 else found * parts


def _pace(every: Sequence[Sequence[float]], parts: int) -> float:
    """The least possible sum of the largest part; where parts have costs of their own, about that."""
    low, high, n = 0.0, max(sums[-1] for sums in every), len(every[0]) - 1
    while high - low > ROUNDING * high / 4:
        limit = (low + high) / 2
        start, largest, more = 0, 0.0, math.inf
        for sums in every:
            end = bisect_right(sums, sums[start] + limit) - 1
            if end < n:
                more = min(more, sums[end + 1] - sums[start])
            if end == start:
                break
            largest, start = max(largest, sums[end] - sums[start]), end
        if start == n:
            high = min(high, largest)
        else:
            low = max(limit, more)  # up to which no part takes more
    return high


def _solve(
    every: Sequence[Sequence[float]], parts: int, allowed: Allowed | None, limit: float, *, even: bool
) -> tuple[float, list[int]] | None:
    """The cut into parts whose sums are at most ``limit`` with the least largest sum, or if it is to be ``even`` with
    the least sum of their squares: that cost and its ends."""
    n = len(every[0]) - 1
    alike = all(sums is every[0] for sums in every)
    best: list[list[float]] = [[0.0] + [math.inf] * n]
    origin: list[list[int]] = []
    for part, sums in enumerate(every):
        row, source, before = [math.inf] * (n + 1), [0] * (n + 1), best[part]
        # Part ``part`` ends at least at part + 1, and leaves an item for each part after it.
        low, high = part + 1, n - parts + part + 1
        if alike and not math.isinf(limit):  # so many parts hold no more, and the others have to hold the rest
            low = max(low, bisect_left(sums, sums[n] - (parts - part - 1) * limit))
            high = min(high, bisect_right(sums, (part + 1) * limit) - 1)
        for end in range(low, high + 1):
            total, least = sums[end], math.inf
            for start in range(end - 1, part - 1, -1):
                cost = total - sums[start]
                if cost > limit:
                    break
                joined = before[start] + cost * cost if even else max(before[start], cost)
                if joined < least and (allowed is None or allowed(part, start, end)):
                    least, source[end] = joined, start
            row[end] = least
        best.append(row)
        origin.append(source)
    if math.isinf(best[parts][n]):
        return None
    found = [n]
    for source in reversed(origin[1:]):
        found.append(source[found[-1]])
    return best[parts][n], found[::-1]
