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
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from weft.errors import ModelError

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


class Standing(CacheLayerMixin):  # type: ignore[no-untyped-call]  # in transformers
    """One layer's keys and values, (sequences, heads, tokens, head_dim).

    Args:
        within: says which unit writes.
        window: of a sliding attention, in tokens; None: it sees everything.
    """

    def __init__(self, within: Within, window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # in transformers
        self.within, self.window, self.is_sliding = within, window, window is not None
        self.seen, self.unit = 0, ""
        self.buffers: tuple[Tensor, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do before the first update."""

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

    def kept(self, tokens: int) -> int:
        """How many of so many tokens are kept."""
        return tokens if self.window is None else min(tokens, self.window - 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys there will be with so many more tokens, and how many were let go before them."""
        return self.kept(self.seen) + query_length, self.seen - self.kept(self.seen)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_max_length(self) -> int:
        """No limit."""
        return -1 if self.window is None else self.window

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
    """An empty cache for a model of transformers.

    Raises:
        ModelError: a layer keeps something else than keys and values.
    """
    layers: list[Any] = []
    for number, layer in enumerate(DynamicCache(config=config.get_text_config(decoder=True)).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ModelError(
                f"layer {number} of {config.model_type} keeps a {type(layer).__name__}, not keys and values of tokens; "
                "weft generates with attention only: use transformers on one device"
            )
        layers.append(Standing(within, getattr(layer, "sliding_window", None)))
    if not config.is_encoder_decoder:
        return Cache(layers=layers)
    # Where encoder and decoder are of different depth, a cache is made for the encoder's.
    depths = (getattr(config, name, None) for name in ("num_decoder_layers", "decoder_layers"))
    depth = next((depth for depth in depths if depth), len(layers))
    own, cross = (Cache(layers=[Standing(within) for _ in range(depth)]) for _ in range(2))
    return EncoderDecoderCache(own, cross)


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
