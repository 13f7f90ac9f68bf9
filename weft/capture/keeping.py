"""Keeping: caches of ``transformers`` whose layers keep the keys and values of tokens in a way of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from weft.errors import ModelError


class Keeping(CacheLayerMixin):  # type: ignore[no-untyped-call]  # in transformers
    """What a forward asks of one layer besides its keys and values: how much it has seen.

    Args:
        window: of a sliding attention, in tokens; None: it sees everything.
    """

    def __init__(self, window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # in transformers
        self.window, self.seen = window, 0
        self.is_sliding = window is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do before the first update."""

    def kept(self, tokens: int) -> int:
        """How many of so many tokens are kept for the next ones."""
        return tokens if self.window is None else min(tokens, self.window - 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys there will be with so many more tokens, and how many were let go before them."""
        kept = self.kept(self.seen)
        return kept + query_length, self.seen - kept

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_max_length(self) -> int:
        """No limit."""
        return -1 if self.window is None else self.window


def cache_of(config: Any, layer: Callable[[int | None], Keeping]) -> Cache:
    """An empty cache for a model of transformers.

    Args:
        config: the model's.
        layer: makes one, with this window.

    Raises:
        ModelError: a layer keeps something else than keys and values.
    """
    layers: list[Any] = []
    for number, usual in enumerate(DynamicCache(config=config.get_text_config(decoder=True)).layers):
        if type(usual) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ModelError(
                f"layer {number} of {config.model_type} keeps a {type(usual).__name__}, not keys and values of tokens; "
                "weft generates with attention only: use transformers on one device"
            )
        layers.append(layer(getattr(usual, "sliding_window", None)))
    if not config.is_encoder_decoder:
        return Cache(layers=layers)
    # Where encoder and decoder are of different depth, a cache is made for the encoder's.
    depths = (getattr(config, name, None) for name in ("num_decoder_layers", "decoder_layers"))
    depth = next((depth for depth in depths if depth), len(layers))
    own, cross = (Cache(layers=[layer(None) for _ in range(depth)]) for _ in range(2))
    return EncoderDecoderCache(own, cross)
