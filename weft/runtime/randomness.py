"""Two random streams, so that random draws do not depend on where a unit lives.

Glue code and the user's loss draw from a stream seeded by (seed, step, microbatch, replica): all ranks of a replica
agree. Each call of a unit draws from its own stream, seeded by that and the call's number. Code that draws nothing pays
nothing.

Python's ``random`` and numpy's global generator are seeded along with torch's where the model or the loss was seen to
draw from them: then in every stream, since a unit that lives elsewhere must not move the glue's.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Seed:
    """The seed of a stream; ``python``: of the generators of Python and numpy, too."""

    number: int
    python: bool = False


@dataclass(frozen=True)
class Seeds:
    """Seeds of one microbatch's streams."""

    seed: int
    step: int
    microbatch: int
    replica: int
    python: bool = False

    def glue(self) -> Seed:
        """Seed of the glue's stream."""
        return self._hash(-1)

    def call(self, number: int) -> Seed:
        """Seed of the stream of call number ``number``."""
        return self._hash(number)

    def _hash(self, number: int) -> Seed:
        words = (self.seed, self.step, self.microbatch, self.replica, number)
        digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
        return Seed(int.from_bytes(digest, "little") >> 1, self.python)


@contextmanager
def stream(seed: Seed, device: torch.device, *, when: bool) -> Iterator[None]:
    """Draw from a stream of its own inside the block, and go on with the outer one after it.

    Args:
        seed: of the stream.
        device: of the torch generator.
        when: whether torch's generator is drawn from.
    """
    with ExitStack() as stack:
        if when:
            devices = [] if device.type == "cpu" else [device]
            stack.enter_context(torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"))
            torch.manual_seed(seed.number)
        if seed.python:
            stack.enter_context(_python_stream(seed.number))
        yield


@contextmanager
def _python_stream(seed: int) -> Iterator[None]:
    """The same for Python's generator and numpy's."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
