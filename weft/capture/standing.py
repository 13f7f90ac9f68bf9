"""Standing caches: what a model of ``transformers`` is given to keep keys and values in while it is recorded.

They cost what the runtime's cost: a token is written where there is room, nothing is copied with it. They say which
unit's calls fill which layer, and how much each token of a sequence takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.cache_utils import Cache, EncoderDecoderCache

from weft.capture.keeping import Keeping, cache_of

ROOM = 32
"""Tokens that there is room for beside those kept."""


class Within:
    """Which unit a forward is in: the one that was called last, since units do not nest."""

    def __init__(self) -> None:
        self.unit = ""

    @contextmanager
    def watching(self, model: nn.Module, units: Sequence[str]) -> Iterator[None]:
        """Watch a model's calls inside the block."""
        names = {model.get_submodule(name): name for name in units}

        def entered(module: nn.Module, _: Any) -> None:
            self.unit = names.get(module, self.unit)

        handle = nn.modules.module.register_module_forward_pre_hook(entered)
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True, slots=True)
class Filled:
    """What one layer keeps of each sequence: whose calls write it, bytes of a token, and how many tokens at most
    (None: all); ``cross``: of the encoder's tokens, not of the sequence's own."""

    unit: str
    token_bytes: int
    window: int | None
    cross: bool


class Standing(Keeping):  # type: ignore[no-untyped-call]  # in transformers
    """One layer's keys and values, (sequences, heads, tokens, head_dim).

    Args:
        within: says which unit writes.
        window: of a sliding attention, in tokens; None: it sees everything.
    """

    def __init__(self, within: Within, window: int | None = None) -> None:
        super().__init__(window)
        self.within, self.unit = within, ""
        self.buffers: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write tokens where there is room; the keys and values that they attend to."""
        new, before, self.unit = key_states.shape[-2], self.kept(self.seen), self.within.unit
        if not self.buffers:
            shapes = ((*like.shape[:2], new + ROOM, like.shape[-1]) for like in (key_states, value_states))
            self.buffers = tuple(key_states.new_empty(shape) for shape in shapes)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, before : before + new] = states
        self.seen, self.is_initialized = self.seen + new, True
        self.keys, self.values = (buffer[:, :, : before + new] for buffer in self.buffers)
        return self.keys, self.values

    def after(self, mode: FakeTensorMode, sequences: int, tokens: int) -> Standing:
        """The same layer when it has seen so many tokens of so many sequences, on fake tensors."""
        found = Standing(self.within, self.window)
        found.seen, found.unit, found.is_initialized = tokens, self.unit, True
        length = self.kept(tokens) + ROOM
        with mode:
            found.buffers = tuple(
                torch.empty((sequences, b.shape[1], length, b.shape[-1]), dtype=b.dtype) for b in self.buffers
            )
        found.keys, found.values = (b[:, :, : self.kept(tokens)] for b in found.buffers)
        return found


def standing_cache(config: Any, within: Within) -> Cache:
    """An empty cache for a model of transformers: see ``cache_of``."""
    return cache_of(config, lambda window: Standing(within, window))


def parts(cache: Cache) -> list[Sequence[Standing]]:
    """Layers of the sequences' own tokens; and of the encoder's, if there is one."""
    both = [cache]
    if isinstance(cache, EncoderDecoderCache):
        both = [cache.self_attention_cache, cache.cross_attention_cache]
    return [cast(Sequence[Standing], part.layers) for part in both]


def cache_after(cache: Cache, mode: FakeTensorMode, sequences: int, tokens: int, prompt: int) -> Cache:
    """A cache like one that was filled, when it has seen so many tokens; of an encoder the prompt."""
    made = [
        Cache(layers=[layer.after(mode, sequences, length) for layer in part])
        for part, length in zip(parts(cache), (tokens, prompt), strict=False)
    ]
    return made[0] if len(made) == 1 else EncoderDecoderCache(*made)


def filled(cache: Cache) -> list[Filled]:
    """What the layers keep of each sequence, those that were never written left out."""
    return [
        Filled(layer.unit, sum(b.shape[1] * b.shape[-1] * b.itemsize for b in layer.buffers), layer.window, cross == 1)
        for cross, part in enumerate(parts(cache))
        for layer in part
        if layer.buffers
    ]
