"""Shares: whole things divided in proportion to whole numbers."""

from __future__ import annotations

from collections.abc import Sequence


def apportion(count: int, shares: Sequence[int]) -> list[int]:
    """Divide ``count`` things in proportion to shares, by largest remainder (Hamilton's method).

    Everybody gets the whole part of ``count * share / sum(shares)``; what is left goes one each to the largest
    remainders, of equal ones to the largest share, then to the first. Equal shares differ by one at most, the larger
    parts first: ``apportion(7, [1, 1, 1]) == [3, 2, 2]``, and ``apportion(8, [3, 1]) == [6, 2]``.
    """
    total = sum(shares)
    parts = [divmod(count * share, total) for share in shares]
    left = count - sum(whole for whole, _ in parts)
    first = sorted(range(len(parts)), key=lambda i: (-parts[i][1], -shares[i]))[:left]
    lengths = [whole for whole, _ in parts]
    for i in first:
        lengths[i] += 1
    return lengths
