"""Cutting costs into consecutive parts."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.planner.balance import cuts, ends


def every_cut(costs, parts):
    n = len(costs)
    for inner in combinations(range(1, n), parts - 1):
        bounds = (0, *inner, n)
        yield [list(costs[a:b]) for a, b in pairwise(bounds)]


def test_the_example():
    assert cuts([1, 2, 3, 4, 5, 6], 2) == [[1, 2, 3, 4], [5, 6]]


@pytest.mark.parametrize(
    ("costs", "parts", "expected"),
    [
        ([5], 1, [[5]]),
        ([1, 1, 1, 1], 4, [[1], [1], [1], [1]]),
        ([9, 1, 1, 1], 2, [[9], [1, 1, 1]]),
        ([1, 1, 1, 9], 3, [[1, 1], [1], [9]]),
        ([0, 0, 0], 3, [[0], [0], [0]]),
    ],
)
def test_small_cuts(costs, parts, expected):
    assert cuts(costs, parts) == expected


@pytest.mark.parametrize(("costs", "parts"), [([], 1), ([1, 2], 3), ([1, 2], 0)])
def test_no_cut(costs, parts):
    assert cuts(costs, parts) is None


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.data())
def test_against_every_cut(costs, data):
    parts = data.draw(st.integers(1, len(costs)))
    found = cuts(costs, parts)
    assert found is not None
    assert [cost for part in found for cost in part] == costs

    def quality(cut):
        sums = [sum(part) for part in cut]
        return max(sums), sum(s * s for s in sums)

    assert quality(found) == min(quality(cut) for cut in every_cut(costs, parts))


@given(st.lists(st.floats(0.001, 10), min_size=2, max_size=9), st.data())
def test_a_limit_on_each_part(costs, data):
    """Parts are forbidden at random: the cut found is the best of those left, or there is none left."""
    parts = data.draw(st.integers(1, len(costs)))
    limits = [data.draw(st.integers(1, len(costs))) for _ in range(parts)]

    def allowed(part, start, end):
        return end - start <= limits[part]

    left = [
        c for c in every_cut(costs, parts) if all(len(part) <= limit for part, limit in zip(c, limits, strict=True))
    ]
    found = cuts(costs, parts, allowed)
    if not left:
        assert found is None
    else:
        assert found is not None
        best = min(max(map(sum, cut)) for cut in left)
        assert max(map(sum, found)) == pytest.approx(best)
        assert all(len(part) <= limit for part, limit in zip(found, limits, strict=True))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.data())
def test_parts_of_unequal_speed(costs, data):
    """Every part has costs of its own."""
    n = len(costs)
    rows = [[data.draw(st.integers(0, 20)) for _ in costs] for _ in range(data.draw(st.integers(2, max(2, n))))]
    parts = len(rows)
    every = [[sum(row[a:b]) for row, (a, b) in zip(rows, pairwise((0, *inner, n)), strict=True)]
             for inner in combinations(range(1, n), parts - 1)]  # fmt: skip
    found = ends(rows, parts)
    if parts > n:
        assert found is None
        return
    assert found is not None
    sums = [sum(row[a:b]) for row, (a, b) in zip(rows, pairwise((0, *found)), strict=True)]
    assert found[-1] == n
    assert all(a < b for a, b in pairwise((0, *found)))
    assert (max(sums), sum(s * s for s in sums)) == min((max(cut), sum(s * s for s in cut)) for cut in every)


def test_one_hundred_and_thirty_blocks():
    found = ends([[1.0] * 130], 16)
    assert found is not None
    sizes = [b - a for a, b in zip([0, *found], found, strict=False)]
    assert max(sizes) == 9
    assert min(sizes) == 8
