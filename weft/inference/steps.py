"""Steps: what a model of ``transformers`` is asked for the next tokens, and how.

Shapes: B sequences, P tokens of a prompt, T new tokens, L tokens in all, S encoded tokens, D features, V tokens of the
vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from weft.errors import InputError
from weft.runtime.elastic import Like

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


class Step(NamedTuple):
    """What a model is given for the next tokens of a group.

    Attributes:
        tokens: (B, T).
        mask: (B, L), of an encoder-decoder (B, S): 0 where there is padding.
        positions: (B, T), of each token in its sequence; None for an encoder-decoder.
        encoded: (B, S, D), of an encoder-decoder.
        cache: of the tokens before; None: there are none, and nothing is kept.
    """

    tokens: Tensor
    mask: Tensor | None
    positions: Tensor | None
    encoded: Tensor | None = None
    cache: Cache | None = None

    def like(self) -> Like:
        """What is recorded in its place: a step of as many sequences and tokens with none before them."""
        device, placed = self.tokens.device, self.positions is not None
        rest, dtype = (self.encoded.shape[1:], self.encoded.dtype) if self.encoded is not None else (None, None)

        def form(sequences: int, tokens: int) -> Step:
            ids = torch.zeros(sequences, tokens, dtype=torch.long, device=device)
            encoded = None if rest is None else torch.zeros(sequences, *rest, dtype=dtype, device=device)
            return Step(ids, None, ids if placed else None, encoded)

        sequences, tokens = self.tokens.shape
        return Like(sequences, tokens, form, rest)


class Encoding(NamedTuple):
    """What an encoder is given: tokens and mask, (B, S)."""

    tokens: Tensor
    mask: Tensor


def next_token(model: nn.Module, batch: Any) -> Tensor:
    """Logits of the token after each sequence of a batch with ``input_ids``, (B, V): what a model of transformers
    predicts that is not told otherwise."""
    ids = batch["input_ids"] if not isinstance(batch, Tensor) else batch
    if model_config(model).is_encoder_decoder:
        start = ids.new_zeros(len(ids), 1)
        return last_logits(model, {"input_ids": ids, "decoder_input_ids": start, "use_cache": False})
    return last_logits(model, {"input_ids": ids, "use_cache": False})


def step_of(model: nn.Module, step: Step) -> Tensor:
    """Logits of the token after each sequence of a group, (B, V)."""
    arguments: dict[str, Any] = {"use_cache": step.cache is not None, "past_key_values": step.cache}
    if step.encoded is not None:
        from transformers.modeling_outputs import BaseModelOutput

        arguments |= {"decoder_input_ids": step.tokens, "encoder_outputs": BaseModelOutput(step.encoded)}
    else:
        arguments["input_ids"] = step.tokens
        if step.positions is not None and "position_ids" in parameters_of(model):
            arguments["position_ids"] = step.positions
    if step.mask is not None:
        arguments["attention_mask"] = step.mask
    return last_logits(model, arguments)


def encoding_of(model: nn.Module, batch: Encoding) -> Tensor:
    """What a model's encoder makes of prompts, (B, S, D)."""
    encoder: Any = model
    encoded: Tensor = encoder.get_encoder()(input_ids=batch.tokens, attention_mask=batch.mask).last_hidden_state
    return encoded


def last_logits(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """The model's logits for the last token of each sequence."""
    if "logits_to_keep" in parameters_of(model):
        arguments = {**arguments, "logits_to_keep": 1}
    logits: Tensor = model(**arguments).logits[:, -1]
    return logits


def parameters_of(model: nn.Module) -> frozenset[str]:
    """Names of the arguments of a model's forward."""
    kind: Any = type(model)
    return _parameters_of(kind)


@lru_cache(maxsize=64)
def _parameters_of(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def model_config(model: nn.Module) -> Any:
    """The configuration of a model of transformers that generates.

    Raises:
        InputError: it is not one.
    """
    config, can = getattr(model, "config", None), getattr(model, "can_generate", None)
    if config is None or can is None or not can():
        raise InputError(
            f"{type(model).__name__} is no model of transformers that generates tokens; give the Workload a predict "
            "function and use engine.predict, or `weft predict`"
        )
    return config


def checked_prompts(
    input_ids: Tensor | Sequence[Sequence[int]], mask: Tensor | None, padding: int, config: Any
) -> Encoding:
    """Prompts and their mask, both (B, P).

    Raises:
        InputError: they are not tokens of the model, or the mask is not theirs.
    """
    if not isinstance(input_ids, Tensor) and input_ids:
        longest = max(map(len, input_ids), default=0)
        left = not config.is_encoder_decoder
        pads = [[padding] * (longest - len(prompt)) for prompt in input_ids]
        rows = [[*p, *ids] if left else [*ids, *p] for p, ids in zip(pads, input_ids, strict=True)]
        ones = [[0] * len(p) + [1] * len(ids) if left else [1] * len(ids) + [0] * len(p)
                for p, ids in zip(pads, input_ids, strict=True)]  # fmt: skip
        input_ids, mask = torch.tensor(rows, dtype=torch.long).view(len(rows), -1), torch.tensor(ones)
    if not isinstance(input_ids, Tensor):
        raise InputError("input_ids has no prompt; give at least one")
    if input_ids.dim() != 2 or not input_ids.numel() or input_ids.is_floating_point():
        raise InputError(f"input_ids must be tokens of shape (B, P), at least one each; got {tuple(input_ids.shape)}")
    mask = torch.ones_like(input_ids) if mask is None else mask.to(torch.long)
    if mask.shape != input_ids.shape:
        raise InputError(f"attention_mask is of shape {tuple(mask.shape)}, input_ids of {tuple(input_ids.shape)}")
    size = config.get_text_config().vocab_size
    if bool(((input_ids < 0) | (input_ids >= size)).any()):
        raise InputError(f"input_ids has tokens outside the model's vocabulary of {size}")
    if not bool(mask.any(dim=1).all()):
        raise InputError("a prompt is empty; give each at least one token")
    if not config.is_encoder_decoder and not bool(mask[:, -1].all()):
        raise InputError("prompts of different lengths must be padded on the left; give them as lists, or turn them")
    return Encoding(input_ids, mask)
