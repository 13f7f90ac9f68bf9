"""What inference costs: profiles of forwards alone.

    predict     what ``Workload.predict`` computes for a batch                                     capture_forward
    generate    of a model of ``transformers``: a forward of the prompts, then one for each token  capture_generation

A forward's Profile is that of a training step without backward, gradients and optimizer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from weft.capture.capture import parameters_of, sample_batch, tensor_group
from weft.capture.forward import Function, as_loss, evaluated
from weft.capture.initial import FakeModel, build_fake
from weft.capture.isolation import seldom_collecting
from weft.capture.lengths import PLAIN, Lengths
from weft.capture.lines import SAMPLES
from weft.capture.merging import Found, Merge
from weft.capture.profile import NO_GROUP, Affine, Generation, Kept, Profile
from weft.capture.recorder import record
from weft.capture.recording import Recording
from weft.capture.tensor import groups_at_both
from weft.capture.units import find_units
from weft.errors import InputError, ModelError
from weft.precision import in_precision
from weft.workload import Workload

PROMPT, NEW_TOKENS = 512, 128
"""Tokens of a prompt, and after it, where nobody says."""

Pair = tuple[Recording, Recording]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """How many tokens a generation is planned for; None: what is usual, or as many as the model takes.

    Attributes:
        prompt: of each prompt.
        new_tokens: after it.
    """

    prompt: int | None = None
    new_tokens: int | None = None

    @classmethod
    def asked(cls, prompt: int | None, new_tokens: int | None) -> Tokens | None:
        """These numbers; None where nobody asked for any."""
        return None if prompt is None and new_tokens is None else cls(prompt=prompt, new_tokens=new_tokens)

    def within(self, config: Any) -> tuple[int, int]:
        """Both numbers, for a model with this configuration.

        Raises:
            InputError: its positions end before.
        """
        most = getattr(config.get_text_config(), "max_position_embeddings", None)
        if most is None or config.is_encoder_decoder:
            return self.prompt or PROMPT, self.new_tokens or NEW_TOKENS
        new = self.new_tokens or min(NEW_TOKENS, max(1, (most - (self.prompt or 0)) // (1 if self.prompt else 4)))
        prompt = self.prompt or min(PROMPT, most - new)
        if prompt < 1 or prompt + new > most:
            raise InputError(
                f"the model has {most} positions, and {prompt} tokens of a prompt with {new} new ones take "
                f"{prompt + new}; lower one of them"
            )
        return prompt, new


def generates(workload: Workload) -> bool:
    """Whether a workload's model is one of ``transformers`` that generates tokens."""
    return can_generate(build_fake(workload.model, workload.seed).model)


def can_generate(model: nn.Module) -> bool:
    """Whether a model is one of ``transformers`` that generates tokens."""
    can = getattr(model, "can_generate", None)
    return bool(can is not None and can() and getattr(model, "config", None) is not None)


@seldom_collecting()
def capture_inference(
    workload: Workload,
    precision: str = "float32",
    *,
    tokens: Tokens | None = None,
    batch_size: int | None = None,
) -> Profile | Generation:
    """What inference with a workload costs: its ``predict`` for a batch, or generating.

    Args:
        workload: what is computed.
        precision: of its operations, one of ``plan.PRECISIONS``.
        tokens: generate so many; None: predict if the workload says what, else generate.
        batch_size: samples of a batch, sequences at once; None: the workload's.

    Raises:
        InputError: there is neither a ``predict`` nor a model of ``transformers`` that generates.
        ModelError: the model cannot be run on fake tensors, or keeps something else than keys and values.
        BatchError: the batch does not have its samples in dimension 0.
    """
    began = time.perf_counter()
    if batch_size is not None:
        workload = replace(workload, batch_size=batch_size)
    fake = build_fake(workload.model, workload.seed)
    evaluated(fake.model)
    forwards = _Forwards(fake, workload, precision, find_units(fake.model, workload.units))
    if tokens is None and workload.predict is not None:
        batches = [sample_batch(workload, samples) for samples in SAMPLES]
        profile = forwards.predict(workload.predict, batches)
        return replace(profile, capture_s=time.perf_counter() - began)
    if not can_generate(fake.model):
        raise InputError(
            f"{type(fake.model).__name__} is no model of transformers that generates tokens, and this Workload does "
            "not say what to predict; give it predict=lambda model, batch: ..."
        )
    found = _Generating(forwards, *(tokens or Tokens()).within(fake.model.config)).generation()
    return replace(found, prefill=replace(found.prefill, capture_s=time.perf_counter() - began))


@dataclass(slots=True)
class _Forwards:
    """Makes profiles of forwards of one model."""

    fake: FakeModel
    workload: Workload
    precision: str
    units: list[str]

    @property
    def lower(self) -> bool:
        return self.precision != "float32"

    def record(self, functions: Sequence[Function], batches: Sequence[Any], precision: str) -> Pair:
        """A recording at both SAMPLES, of a function for each."""
        found: list[Recording] = []
        for function, batch in zip(functions, batches, strict=True):
            loss = in_precision(replace(self.workload, loss=as_loss(function)), precision).loss
            alike = found[0].alike if found else ()
            found.append(record(self.fake, self.units, loss, batch, backward=False, alike=alike))
            self.units = list(found[-1].units)
        small, large = found
        if [c.name for c in small.calls] != [c.name for c in large.calls]:
            raise ModelError(
                f"the model calls its units in another order for {SAMPLES[0]} samples than for {SAMPLES[1]}; "
                "which units run must not depend on the batch"
            )
        return small, large

    def predict(self, function: Function, batches: Sequence[Any]) -> Profile:
        """The profile of a function of the model."""
        pair = plain = self.record([function] * 2, batches, self.precision)
        if self.lower:
            plain = self.record([function] * 2, batches, "float32")
        tensors = [t for t in tree_leaves(batches[1]) if isinstance(t, Tensor)]
        tokens = max((t.shape[1] for t in tensors if t.dim() == 2 and not t.is_floating_point()), default=0)
        merge = Merge(self.fake, *pair, plain)
        return self.profile(merge, sum(t.nbytes for t in tensors) // SAMPLES[1], tokens)

    def at_length(self, plain: Pair, pair: Pair, lengths: Mapping[int, int], tokens: int) -> Profile:
        """The profile of a forward with a cache, whose groups were found without one."""
        merge = Merge(self.fake, *pair, pair, found=self._carried(plain, pair, lengths))
        return self.profile(merge, 8 * tokens, tokens)

    def _carried(self, plain: Pair, pair: Pair, lengths: Mapping[int, int]) -> Found:
        found, refused = groups_at_both(*plain, self.fake.model)
        both = zip(*found, strict=True) if found else ((), ())
        ways = [Lengths(p, o, lengths, self.lower).groups(g) for p, o, g in zip(plain, pair, both, strict=True)]
        return list(zip(*ways, strict=True)), refused

    def profile(self, merge: Merge, sample_bytes: int, tokens: int) -> Profile:
        """The profile of merged recordings."""
        groups = [tensor_group(*pair) for pair in merge.groups]
        return Profile(
            calls=merge.calls(),
            parameters=parameters_of(self.fake, [group for group, _ in merge.groups]),
            tensor_groups=tuple(replace(group, backward_bytes=Affine(0, 0)) for group in groups),
            tensor_refused=tuple(merge.refused),
            optimizer_state_bytes=0.0,
            optimizer_passes=0.0,
            batch_size=self.workload.batch_size,
            sample_bytes=sample_bytes,
            capture_s=0.0,
            precision=self.precision,
            sample_tokens=tokens,
        )


@dataclass(slots=True)
class _Generating:
    """Makes the profiles of generating so many tokens after prompts of so many."""

    forwards: _Forwards
    prompt: int
    new_tokens: int

    def generation(self) -> Generation:
        from weft.capture.standing import Within, cache_after, filled, standing_cache

        forwards, model, mode = self.forwards, self.forwards.fake.model, self.forwards.fake.mode
        encodes = bool(self.config.is_encoder_decoder)
        plain = forwards.record([self._plain] * 2, [self._prompts(samples, PLAIN[0]) for samples in SAMPLES], "float32")

        within, caches = Within(), list[Any]()

        def prefill(model: nn.Module, batch: Any) -> Tensor:
            caches.append(standing_cache(self.config, within))
            return self._next(model, batch, caches[-1])

        prompts = [self._prompts(samples, self.prompt) for samples in SAMPLES]
        with within.watching(model, forwards.units):
            first = forwards.record([prefill] * 2, prompts, forwards.precision)
        cache = next(c for c in reversed(caches) if len(filled(c)) == max(len(filled(c)) for c in caches))

        # Halfway a sequence is as long as it is on average.
        length = (1 if encodes else self.prompt) + self.new_tokens // 2

        def following(samples: int) -> Function:
            made = cache_after(cache, mode, samples, length, self.prompt)
            return lambda model, batch: self._next(model, batch, made)

        steps = [self._step(first, samples) for samples in SAMPLES]
        then = forwards.record([following(samples) for samples in SAMPLES], steps, forwards.precision)

        lengths = {PLAIN[0]: self.prompt, PLAIN[1]: 1} if encodes else {PLAIN[0]: self.prompt}
        prefilled = forwards.at_length(plain, first, lengths, self.prompt)
        decoded = forwards.at_length(plain, then, dict.fromkeys(PLAIN, 1), 1)
        kept = tuple(
            Kept(own.unit, own.token_bytes, own.window, own.cross, _group_of(prefilled, own.unit))
            for own in filled(cache)
        )
        return Generation(prefilled, decoded, kept, self.prompt, self.new_tokens, encodes)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.forwards.fake.model.config

    def _prompts(self, samples: int, tokens: int) -> dict[str, Tensor]:
        ids = {"input_ids": torch.zeros(samples, tokens, dtype=torch.long)}
        return ids | ({"decoder_input_ids": ids["input_ids"][:, :1]} if self.config.is_encoder_decoder else {})

    def _step(self, first: Pair, samples: int) -> dict[str, Tensor]:
        """What a step of decoding is given beside the cache: a token of every sequence, and what was encoded."""
        one = torch.zeros(samples, 1, dtype=torch.long)
        if not self.config.is_encoder_decoder:
            return {"input_ids": one}
        text = self.config.get_text_config()
        return {"decoder_input_ids": one, "encoded": torch.zeros(samples, self.prompt, text.hidden_size)}

    def _plain(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if "decoder_input_ids" in batch:
            ids = batch["decoder_input_ids"]
            batch = {**batch, "decoder_input_ids": ids.expand(len(ids), PLAIN[1])}
        return self._logits(model, {**batch, "use_cache": False})

    def _next(self, model: nn.Module, batch: dict[str, Tensor], cache: Any) -> Tensor:
        batch = dict(batch)
        if (encoded := batch.pop("encoded", None)) is not None:
            from transformers.modeling_outputs import BaseModelOutput

            return self._logits(
                model,
                {**batch, "encoder_outputs": BaseModelOutput(encoded), "use_cache": True, "past_key_values": cache},
            )
        return self._logits(model, {**batch, "use_cache": True, "past_key_values": cache})

    def _logits(self, model: nn.Module, arguments: dict[str, Any]) -> Tensor:
        """The next token of every sequence."""
        if "logits_to_keep" in signature(type(model).forward).parameters:
            arguments = {**arguments, "logits_to_keep": 1}
        logits: Tensor = model(**arguments).logits
        return logits[:, -1].argmax(-1)


def _group_of(profile: Profile, unit: str) -> int:
    """The tensor group that divides the attention of a unit."""
    operations = [op for call in profile.calls if call.unit == unit for op in call.forward if op.group != NO_GROUP]
    attention = [op.group for op in operations if op.kind == "attention"]
    heads = [op.group for op in operations if any("heads" in what for what, _ in profile.tensor_groups[op.group].sizes)]
    return next(iter((*attention, *heads)), NO_GROUP)
