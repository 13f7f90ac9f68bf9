"""Batches are cut evenly, in an order that the plan does not change."""

from __future__ import annotations

import pytest
import torch
import workloads
from hypothesis import given
from hypothesis import strategies as st

from weft.errors import BatchError
from weft.runtime.batches import Sampler, count_samples, divide, layout, pieces


@given(samples=st.integers(0, 200), parts=st.integers(1, 20))
def test_pieces_cover_everything_once_and_evenly(samples: int, parts: int) -> None:
    cut = pieces(samples, parts)
    assert [i for piece in cut for i in piece] == list(range(samples))
    lengths = [len(piece) for piece in cut]
    assert max(lengths) - min(lengths) <= 1


def test_layout_of_an_uneven_batch() -> None:
    assert layout(7, 2, 2) == [[range(0, 2), range(4, 6)], [range(2, 4), range(6, 7)]]


def test_a_batch_smaller_than_its_pieces_gets_samples_of_weight_zero() -> None:
    batch = divide({"x": torch.arange(3)}, replica=1, replicas=2, microbatches=2)
    assert batch.samples == (1, 0)
    assert [m["x"].tolist() for m in batch.microbatches] == [[1], [0]]


def test_a_batch_without_a_common_dimension_of_samples_is_refused() -> None:
    with pytest.raises(BatchError, match=r"\['y'\] has 5; put the samples"):
        count_samples({"x": torch.zeros(4, 2), "y": torch.zeros(5)})
    with pytest.raises(BatchError, match="no tensor"):
        count_samples({"x": 3})


def test_replicas_together_see_the_single_devices_batch() -> None:
    sampler = Sampler(workloads.mlp(batch_size=10, samples=24))
    for step in range(6):  # 24 samples: batches of 10, 10 and 4, twice
        whole = sampler.global_batch(step)[0]
        parts = [sampler.load(step, replica, 3, 2) for replica in range(3)]
        seen = [part.microbatches[m][0][: part.samples[m]] for m in range(2) for part in parts]
        assert torch.equal(torch.cat(seen), whole)
        assert all(part.total == len(whole) for part in parts)


def test_epochs_are_shuffled_differently() -> None:
    sampler = Sampler(workloads.mlp())
    assert sampler.order(0) != sampler.order(1)
    assert sampler.order(0) == Sampler(workloads.mlp()).order(0)
    assert sorted(sampler.order(1)) == list(range(64))
