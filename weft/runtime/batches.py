"""Batches: which samples each replica sees, and how a batch is cut into microbatches.

The order of the samples depends on the workload's seed and the epoch alone, never on the plan. A batch of N samples is
cut into M microbatches as evenly as whole samples allow, and each of them among the replicas in proportion to their
shares: what is normalised together does not depend on the replicas. A piece that would be empty (a last batch of fewer
samples than pieces) gets a sample of weight 0, so that every rank takes part in every collective.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import keystr as path_name
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map

from weft.capture.draws import has_drawn, python_state, python_stream, restore_python
from weft.containers import opened
from weft.errors import BatchError
from weft.runtime.randomness import seed_of, stream
from weft.shares import apportion
from weft.workload import Workload


@dataclass(frozen=True)
class Batch:
    """One replica's part of every microbatch of a global batch.

    Attributes:
        microbatches: pytrees, one per microbatch.
        samples: samples in each microbatch that count; 0 for a stand-in sample.
        total: samples in the global batch.
        together: samples that count in each microbatch on all replicas.
    """

    microbatches: tuple[Any, ...]
    samples: tuple[int, ...]
    total: int
    together: tuple[int, ...]


def layout(total: int, shares: Sequence[int], microbatches: int) -> list[list[range]]:
    """The samples of every microbatch of every replica, as positions in the global batch.

    Args:
        total: samples in the global batch.
        shares: of every replica, relative to each other (``Plan.portions``).
        microbatches: how many.
    """
    every: list[list[range]] = [[] for _ in shares]
    start = 0
    for whole in apportion(total, (1,) * microbatches):
        for mine, length in zip(every, apportion(whole, shares), strict=True):
            mine.append(range(start, start + length))
            start += length
    return every


def together(every: list[list[range]]) -> tuple[int, ...]:
    """The samples in each microbatch of a layout on all replicas."""
    return tuple(sum(map(len, pieces)) for pieces in zip(*every, strict=True))


def count_samples(batch: Any) -> int:
    """The number of samples of a batch: the length of dimension 0, which all its tensors share.

    Raises:
        BatchError: there is no tensor, or two tensors disagree.
    """
    leaves, _ = tree_flatten_with_path(batch)
    lengths = [
        (path_name(path), len(leaf)) for path, leaf in leaves if isinstance(leaf, Tensor | np.ndarray) and leaf.ndim > 0
    ]
    if not lengths:
        raise BatchError("the batch holds no tensor with samples in dimension 0; give it at least one")
    first_name, samples = lengths[0]
    for name, length in lengths[1:]:
        if length != samples:
            raise BatchError(
                f"the batch cannot be divided: batch{first_name} has {samples} samples in dimension 0 and "
                f"batch{name} has {length}; put the samples of every tensor in dimension 0"
            )
    return samples


def cut(batch: Any, samples: range) -> Any:
    """The part of a batch that holds some samples; an empty range gives the first sample, to be weighted 0.

    Arrays of numpy are cut as tensors are, and so are lists with one value that is no tensor for each sample, which is
    how strings are put together. Other values go to every part.
    """
    part = slice(samples.start, samples.stop) if len(samples) else slice(0, 1)
    total = count_samples(batch)

    def per_sample(node: Any) -> bool:
        return (
            isinstance(node, list) and len(node) == total and not any(isinstance(x, Tensor) for x in tree_leaves(node))
        )

    def take(leaf: Any) -> Any:
        divided = per_sample(leaf) or (isinstance(leaf, Tensor | np.ndarray) and leaf.ndim > 0)
        return leaf[part] if divided else leaf

    return tree_map(take, batch, is_leaf=per_sample)


def divide(batch: Any, *, replica: int, shares: Sequence[int], microbatches: int) -> Batch:
    """One replica's part of a global batch.

    Raises:
        BatchError: the batch has no common dimension of samples.
    """
    total = count_samples(batch)
    every = layout(total, shares, microbatches)
    return Batch(
        tuple(cut(batch, r) for r in every[replica]), tuple(len(r) for r in every[replica]), total, together(every)
    )


class Sampler:
    """Which samples make up each global batch: a function of the workload, the epoch and the step in it."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.samples = len(workload.data)
        self._epoch: tuple[int, list[int]] = (-1, [])
        self._draws = False

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch, the partial last one included."""
        return -(-self.samples // self.workload.batch_size)

    @property
    def facts(self) -> dict[str, Any]:
        """What the samples of a step depend on, as checkpoints have it."""
        work = self.workload
        found = {"batch_size": work.batch_size, "samples": self.samples, "seed": work.seed, "shuffle": work.shuffle}
        return {f"data.{name}": value for name, value in found.items()}

    def compare(self, before: Mapping[str, Any]) -> None:
        """Warn where training goes on with other facts than those it had before."""
        now = self.facts
        other = [name for name in now if name in before and before[name] != now[name]]
        if other and dist.get_rank() == 0:
            changes = ", ".join(f"{name.partition('.')[2]} was {before[name]!r} and is {now[name]!r}" for name in other)
            warnings.warn(
                f"training goes on with other batches than the checkpoint's ({changes}): of the samples of this epoch "
                "some are taken twice or not at all",
                RuntimeWarning,
                stacklevel=3,
            )

    def order(self, epoch: int) -> list[int]:
        """The samples of an epoch in the order they are seen."""
        if not self.workload.shuffle:
            return list(range(self.samples))
        generator = torch.Generator().manual_seed((self.workload.seed << 20) + epoch)
        order: list[int] = torch.randperm(self.samples, generator=generator).tolist()
        return order

    def samples_of(self, step: int) -> list[int]:
        """The samples of the global batch of a step, by their numbers in the data set."""
        epoch, place = divmod(step, self.steps_per_epoch)
        size = self.workload.batch_size
        return self._order(epoch)[place * size : (place + 1) * size]

    def collate(self, samples: Sequence[int], step: int) -> Any:
        """A batch of some samples, as they are read for a step.

        Data that draw random numbers when they are read (from PyTorch's, Python's or NumPy's global generator) draw
        them from a stream of each sample and epoch: the same under every plan, and after a restart.
        """
        if not self._draws:
            python, own = python_state(), torch.get_rng_state()
            batch = self.workload.batch_of(samples)
            if not has_drawn(python) and torch.equal(torch.get_rng_state(), own):
                return batch
            self._draws = True
            restore_python(python)
            torch.set_rng_state(own)
        read = [self._sample(step // self.steps_per_epoch, i % self.samples) for i in samples]
        return opened(self.workload.collate(read))

    def _sample(self, epoch: int, number: int) -> Any:
        seed = seed_of(self.workload.seed, "sample", epoch, number)
        with python_stream(seed, when=True), stream(seed, torch.device("cpu"), when=True):
            return self.workload.data[number]

    def load(self, step: int, replica: int, shares: Sequence[int], microbatches: int) -> Batch:
        """One replica's part of the global batch of a step counted from the start of training. Only its samples are
        read."""
        chosen = self.samples_of(step)
        every = layout(len(chosen), shares, microbatches)
        ranges = every[replica]
        read = [chosen[r.start : r.stop] if len(r) else chosen[:1] for r in ranges]
        parts = tuple(self.collate(samples, step) for samples in read)
        return Batch(parts, tuple(len(r) for r in ranges), len(chosen), together(every))

    def global_batch(self, step: int) -> Any:
        """The whole batch of a step, as one device sees it."""
        return self.load(step, 0, (1,), 1).microbatches[0]

    def _order(self, epoch: int) -> list[int]:
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self.order(epoch))
        return self._epoch[1]
