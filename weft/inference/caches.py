"""Caches: keys and values of the tokens that a model has seen, of this rank's own layers.

A cache of transformers that grows in place: a layer keeps its keys and values in a buffer with room to spare, so that a
token is written where there is room, and not everything copied with it. A layer with a sliding window keeps no more
than the window needs. Layers that live on other ranks keep nothing but how much they have seen, which the glue of a
forward asks for (masks, positions).

Sequences of one batch end together: a shorter one is padded on its left, and the attention mask tells where it begins.
So a sequence joins a batch that is under way by being padded to its length, and when the longest one leaves, what only
it had is cut off on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from weft.capture.keeping import Keeping, cache_of
from weft.inference.room import length_for

SMALL_BYTES = 2**22
"""Keys and values of a layer that are no larger are copied with every token: so they are in the processor's cache when
one query reads them, which takes as long as that longer where they are not (a tenth of a step of a small model)."""


class Kept(Keeping):  # type: ignore[no-untyped-call]  # in transformers
    """One layer's keys and values, (sequences, heads, tokens, head_dim).

    Args:
        window: of a sliding attention, in tokens; None: it sees everything.
    """

    def __init__(self, window: int | None = None) -> None:
        super().__init__(window)
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._start = self._end = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens; the keys and values that they attend to."""
        new = key_states.shape[-2]
        if self.window is not None:
            self._start = max(self._start, self._end - (self.window - 1))
        if self.bytes + key_states.nbytes + value_states.nbytes <= SMALL_BYTES:
            both = [[each] for each in (key_states, value_states)]
            for buffer, parts in zip(self._buffers or (), both, strict=False):
                parts.insert(0, buffer[:, :, self._start : self._end])
            self._buffers = torch.cat(both[0], dim=2), torch.cat(both[1], dim=2)
            self._start, self._end = 0, self._end - self._start
        else:
            self._make_room(new, key_states, value_states)
            assert self._buffers is not None
            for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
                buffer[:, :, self._end : self._end + new] = states
        self._end += new
        self.seen += new
        self.is_initialized = True
        self.keys, self.values = (buffer[:, :, self._start : self._end] for buffer in self._buffers)
        return self.keys, self.values

    def _make_room(self, new: int, *states: Tensor) -> None:
        if self._buffers is not None and self._end + new <= self._buffers[0].shape[-2]:
            return
        kept = self._end - self._start
        length = length_for(kept + new)
        made = []
        for index, like in enumerate(states):
            buffer = like.new_empty((*like.shape[:2], length, like.shape[-1]))
            if self._buffers is not None:
                buffer[:, :, :kept] = self._buffers[index][:, :, self._start : self._end]
            made.append(buffer)
        self._buffers, self._start, self._end = (made[0], made[1]), 0, kept

    def select(self, rows: Tensor) -> None:
        """Keep some of the sequences, by their numbers."""
        if self._buffers is not None:
            keys, values = (buffer[rows][:, :, self._start : self._end] for buffer in self._buffers)
            self._hold(keys, values)

    def shorten(self, tokens: int) -> None:
        """Let go of so many tokens on the left, which are padding in every sequence."""
        self.seen -= tokens
        if self._buffers is not None:
            self._start = max(self._start, self._end - self.seen)

    def lengthen(self, tokens: int) -> None:
        """Pad with so many tokens on the left."""
        self.seen += tokens
        if self._buffers is not None and tokens:
            kept = self.seen if self.window is None else min(self.seen, max(self.window - 1, self._end - self._start))
            missing = kept - (self._end - self._start)
            self._hold(*(
                torch.nn.functional.pad(buffer[:, :, self._start : self._end], (0, 0, missing, 0))
                for buffer in self._buffers
            ))  # fmt: skip

    def append(self, other: Kept) -> None:
        """Take the sequences of another layer that has seen as many tokens."""
        assert self.seen == other.seen
        if other._buffers is None:
            return
        if self._buffers is None:
            self._hold(*(buffer[:, :, other._start : other._end] for buffer in other._buffers))
            return
        most = min(self._end - self._start, other._end - other._start)
        both = [
            torch.cat([mine[:, :, self._end - most : self._end], theirs[:, :, other._end - most : other._end]])
            for mine, theirs in zip(self._buffers, other._buffers, strict=True)
        ]
        self._hold(*both)

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        """Hold these, with room to spare."""
        self._buffers, self._start, self._end = None, 0, 0
        self._make_room(keys.shape[-2], keys, values)
        assert self._buffers is not None
        self._end = keys.shape[-2]
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, : self._end] = states

    @property
    def bytes(self) -> int:
        """What it keeps, room to spare included."""
        return sum(buffer.nbytes for buffer in self._buffers or ())


def make_cache(config: Any) -> Cache:
    """An empty cache for a model of transformers: see ``cache_of``."""
    return cache_of(config, Kept)


def seen(cache: Cache) -> int:
    """How many tokens the sequences of a cache have seen, by what ``settle`` said last."""
    return int(vars(cache).get("settled", 0))


def settle(cache: Cache, tokens: int) -> None:
    """Tell the layers, those of other ranks too, how many tokens the sequences have seen."""
    vars(cache)["settled"] = tokens
    for layer in own_layers(cache):
        layer.seen = tokens


def own_layers(cache: Cache) -> Sequence[Kept]:
    """Layers of the sequences' own keys and values, of this rank and others."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return cast(Sequence[Kept], own.layers)
