"""Draws: random operations of the glue, each from a stream of its own.

A stage runs the glue partly on real and partly on fake tensors, and a fake one draws nothing. So one stream for all of
the glue would drift apart between stages; here every random operation is numbered, and draws from the stream of its
number. That also tells beforehand what a decision drawn at random (a layer that is dropped) will be.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SeedOf = Callable[[int], int]
"""Seed of the glue's random operation of a number."""


def derived(seed: int, number: int) -> int:
    """Seed number ``number`` of those that follow from one."""
    digest = hashlib.blake2b(repr((seed, number)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def is_draw(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operator draws from the default generator."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    return not any(isinstance(x, torch.Generator) for x in (*args, *kwargs.values()))


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's class has an untyped __init_subclass__
    """Seeds the default generators before every random operation; not while ``paused``."""

    def __init__(self, seed_of: SeedOf) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # untyped in torch
        self.seed_of = seed_of
        self.count = 0
        self.paused = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Seed and run."""
        kwargs = kwargs or {}
        if not self.paused and is_draw(func, args, kwargs):
            torch.manual_seed(self.seed_of(self.count))
            self.count += 1
        return func(*args, **kwargs)


@contextmanager
def python_stream(seed: int, *, when: bool) -> Iterator[None]:
    """Let Python's and NumPy's global generators draw from a stream of their own inside the block."""
    if not when:
        yield
        return
    state = python_state()
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    try:
        yield
    finally:
        restore_python(state)


def python_state() -> tuple[Any, Any]:
    """State of Python's and NumPy's global generators."""
    numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
    return random.getstate(), numpy


def restore_python(state: tuple[Any, Any]) -> None:
    """Put a state of ``python_state`` back."""
    random.setstate(state[0])
    if state[1] is not None:
        sys.modules["numpy"].random.set_state(state[1])


def has_drawn(before: tuple[Any, Any]) -> bool:
    """Whether Python's or NumPy's generator has been used since."""
    now = python_state()
    if now[0] != before[0]:
        return True
    a, b = before[1], now[1]
    return a is not None and (a[2:] != b[2:] or not bool((a[1] == b[1]).all()))


@contextmanager
def python_draws(value: float) -> Iterator[None]:
    """Let Python's and NumPy's uniform numbers all be nearly 0 or nearly 1 inside the block (for some hundred draws).

    Both are Mersenne twisters, whose outputs are a bijection of their words of state.
    """
    state = python_state()
    word = 0 if value < 0.5 else _word_of(0xFFFFFFFF)
    random.setstate((3, (word,) * 624 + (0,), None))
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(("MT19937", [word] * 624, 0))
    try:
        yield
    finally:
        restore_python(state)


def _word_of(output: int) -> int:
    """The word of a Mersenne twister's state that is output as this one."""
    y = output
    y ^= y >> 18
    y ^= (y << 15) & 0xEFC60000
    x = y
    for _ in range(5):
        x = y ^ ((x << 7) & 0x9D2C5680)
    y = x & 0xFFFFFFFF
    x = y
    for _ in range(3):
        x = y ^ (x >> 11)
    return x & 0xFFFFFFFF
