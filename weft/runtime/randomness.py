"""Two random streams, so that random draws do not depend on where a unit lives.

Glue code and the user's loss draw from a stream seeded by (seed, step, microbatch, replica): all ranks of a replica
agree. Each call of a unit draws from its own stream, seeded by that and the call's number. Code that draws nothing pays
nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Seeds:
    """Seeds of one microbatch's streams."""

    seed: int
    step: int
    microbatch: int
    replica: int

    def glue(self) -> int:
        """Seed of the glue's stream."""
        return self._hash(-1)

    def call(self, number: int) -> int:
        """Seed of the stream of call number ``number``."""
        return self._hash(number)

    def _hash(self, number: int) -> int:
        return seed_of(self.seed, self.step, self.microbatch, self.replica, number)


def seed_of(*words: int | str) -> int:
    """The seed of the stream that some words name."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def stream(seed: int, device: torch.device, *, when: bool) -> Iterator[None]:
    """Draw from a stream of its own inside the block, and go on with the outer one after it."""
    if not when:
        yield
        return
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield
