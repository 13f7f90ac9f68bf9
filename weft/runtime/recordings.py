"""Recordings: the recording that is true of a microbatch, made when it first appears.

A recording depends on the shapes of a microbatch, and on what code between units saw of its values and of random
numbers: whether a mask is all ones, which layers are dropped. Of each shape several are kept, each with its conditions;
the oldest go when there are too many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_flatten

from weft.capture.draws import derived
from weft.capture.forward import evaluated
from weft.capture.initial import FakeModel, build_fake
from weft.capture.recorder import Recording, record
from weft.capture.units import find_units
from weft.capture.watch import Watch, plain_synchronised
from weft.runtime.randomness import Seeds
from weft.workload import Workload

MOST = 64
"""Recordings that are kept."""


class Recordings:
    """Makes recordings of one workload and keeps them.

    Args:
        workload: whose loss is recorded; ``inferring``: as a model that is not trained computes it.

    Attributes:
        watch: what was seen of the loss while it was recorded.
        units: names of the model's units; fewer, where a recording had to place some together.
    """

    def __init__(self, workload: Workload, *, inferring: bool = False) -> None:
        self.watch, self._inferring = Watch(), inferring
        self._workload, self._loss = workload, self.watch.of(workload.loss)
        self._fake: FakeModel | None = None
        self.units: Sequence[str] = find_units(self.fake.model, workload.units)
        self._kept: dict[Any, tuple[Any, Recording]] = {}
        self._alike: frozenset[tuple[str, str]] = frozenset()
        self._made = 0

    @property
    def fake(self) -> FakeModel:
        """What is recorded: the model on fake tensors. Every recording leaves it as it was."""
        if self._fake is None:
            self._fake = build_fake(self._workload.model, self._workload.seed, self._workload.weights)
            plain_synchronised(self._fake.model)
            if self._inferring:
                evaluated(self._fake.model)
        return self._fake

    def hand_over(self) -> FakeModel:
        """Give the model away, to be changed; another is built if there is more to record."""
        fake, self._fake = self.fake, None
        return fake

    def longest(self, microbatch: Any) -> Recording:
        """A recording for these shapes in which random decisions leave out as little as they can."""
        own = signature(microbatch), None
        known = next((recording for theirs, recording in self._kept.values() if theirs == own), None)
        return known or self._record(microbatch, own)

    def of(self, microbatch: Any, seeds: Seeds) -> Recording:
        """The recording of a microbatch, whose code between units draws from these seeds."""
        shape, seed = signature(microbatch), decisions_seed(seeds)
        for key, (own, recording) in self._kept.items():
            same = own[0] == shape and (own[1] == seed or not recording.drawn)
            if same and recording.conditions.hold(microbatch, lambda number: derived(seed, number)):
                self._kept[key] = self._kept.pop(key)  # the last used goes last
                return recording
        return self._record(microbatch, (shape, seed))

    def _record(self, microbatch: Any, own: tuple[Any, int | None]) -> Recording:
        model, loss, alike = self.fake, self._loss, self._alike
        recording = record(model, self.units, loss, microbatch, backward=False, alike=alike, seed=own[1])
        self._alike |= recording.alike
        self.units = recording.units
        self._made += 1
        self._kept[self._made] = own, recording
        if len(self._kept) > MOST:
            del self._kept[next(iter(self._kept))]
        return recording


def decisions_seed(seeds: Seeds) -> int:
    """Seed of the draws that decide which way the forward takes: one for all replicas, so that all take the same."""
    return Seeds(seeds.seed, seeds.step, seeds.microbatch, 0).glue()


def signature(batch: Any) -> Any:
    """What every recording depends on: the structure of a microbatch, its tensors' shapes and dtypes, its other
    values."""
    leaves, spec = tree_flatten(batch, is_leaf=is_words)
    return spec, tuple(map(describe, leaves))


def describe(leaf: Any) -> Any:
    """What a recording depends on in a leaf of a batch. Strings that come one for each sample are data, as the values
    of tensors are; a string by itself may say what to do."""
    if isinstance(leaf, Tensor | np.ndarray):
        return tuple(leaf.shape), leaf.dtype
    return ("words", len(leaf)) if is_words(leaf) else (type(leaf).__name__, repr(leaf))


def is_words(leaf: Any) -> bool:
    """Whether this is a list of strings."""
    return isinstance(leaf, list) and len(leaf) > 0 and all(isinstance(x, str) for x in leaf)
