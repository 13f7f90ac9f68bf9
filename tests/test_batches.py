"""Batches are cut evenly, in an order that the plan does not change."""

from __future__ import annotations

import pytest
import torch
import workloads
from hypothesis import given
from hypothesis import strategies as st

from weft.errors import BatchError
from weft.runtime.batches import Sampler, count_samples, divide, layout, together
from weft.shares import apportion


@given(count=st.integers(0, 200), shares=st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_apportioned_things_are_whole_and_near_their_shares(count: int, shares: list[int]) -> None:
    parts = apportion(count, shares)
    assert sum(parts) == count
    assert all(abs(part - count * share / sum(shares)) < 1 for part, share in zip(parts, shares, strict=True))


@given(count=st.integers(0, 200), parts=st.integers(1, 20))
def test_equal_shares_differ_by_one_at_most_the_first_ones_larger(count: int, parts: int) -> None:
    lengths = apportion(count, [3] * parts)
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1


@given(
    samples=st.integers(0, 60),
    shares=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    microbatches=st.integers(1, 5),
)
def test_a_layout_covers_every_sample_once_and_cuts_alike_for_all_replicas(
    samples: int, shares: list[int], microbatches: int
) -> None:
    cut = layout(samples, shares, microbatches)
    assert [i for pieces in zip(*cut, strict=True) for piece in pieces for i in piece] == list(range(samples))
    assert together(cut) == tuple(len(r) for r in layout(samples, [1], microbatches)[0])


def test_layout_of_an_uneven_batch() -> None:
    assert layout(7, (1, 1), 2) == [[range(0, 2), range(4, 6)], [range(2, 4), range(6, 7)]]


def test_layout_by_shares() -> None:
    assert layout(13, (3, 1), 2) == [[range(0, 5), range(7, 12)], [range(5, 7), range(12, 13)]]
    assert layout(2, (1, 4, 1), 1) == [[range(0, 0)], [range(0, 2)], [range(2, 2)]]


def test_a_batch_smaller_than_its_pieces_gets_samples_of_weight_zero() -> None:
    batch = divide({"x": torch.arange(3)}, replica=1, shares=(1, 1), microbatches=2)
    assert batch.samples == (1, 0)
    assert [m["x"].tolist() for m in batch.microbatches] == [[1], [0]]


def test_a_batch_without_a_common_dimension_of_samples_is_refused() -> None:
    with pytest.raises(BatchError, match=r"\['y'\] has 5; put the samples"):
        count_samples({"x": torch.zeros(4, 2), "y": torch.zeros(5)})
    with pytest.raises(BatchError, match="no tensor"):
        count_samples({"x": 3})


@pytest.mark.parametrize("shares", [(1, 1, 1), (3, 1, 1), (1, 7, 2)])
def test_replicas_together_see_the_single_devices_batch(shares: tuple[int, ...]) -> None:
    sampler = Sampler(workloads.mlp(batch_size=10, samples=24))
    for step in range(6):  # 24 samples: batches of 10, 10 and 4, twice
        whole = sampler.global_batch(step)[0]
        parts = [sampler.load(step, replica, shares, 2) for replica in range(3)]
        seen = [part.microbatches[m][0][: part.samples[m]] for m in range(2) for part in parts]
        assert torch.equal(torch.cat(seen), whole)
        assert all(part.total == len(whole) for part in parts)


def test_epochs_are_shuffled_differently() -> None:
    sampler = Sampler(workloads.mlp())
    assert sampler.order(0) != sampler.order(1)
    assert sampler.order(0) == Sampler(workloads.mlp()).order(0)
    assert sorted(sampler.order(1)) == list(range(64))
