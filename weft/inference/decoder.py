"""Decoder: continuous batching, one more token for every request that takes part, and requests that come and go.

The requests of a replica are in as many batches as the plan has groups, which follow one another through the pipeline.
A batch is padded on the left, so that all its sequences end together: who joins is padded to the others' length, or the
others to theirs, and when the longest has left, what only it had is cut off.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from weft.errors import InputError, PlanError
from weft.inference.caches import make_cache, own_layers, seen, settle
from weft.inference.engine import InferenceEngine
from weft.inference.generation import Generator
from weft.inference.sampling import Sampling, choose
from weft.inference.steps import Step
from weft.runtime.forwards import Evaluation

SHARE = 0.25
"""Of the memory that is free when the decoder is made, what its caches may take where nobody says."""


class Wanted(Protocol):
    """What a request says (``serving.decoder.Request``)."""

    @property
    def id(self) -> int: ...
    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def positions(self) -> int: ...
    @property
    def sampling(self) -> Sampling: ...


@dataclass
class Row:
    """A request that takes part."""

    request: Wanted
    generated: int = 0


@dataclass
class Batch:
    """Requests that are computed together, on every rank of a replica.

    Attributes:
        rows: in order.
        ids: (B, 1) the last token of each, not yet in the cache.
        mask: (B, L) of the tokens in the cache.
        cache: of this rank's layers.
        waiting: those who join with the next step.
    """

    rows: list[Row] = field(default_factory=list)
    ids: Tensor = field(default_factory=lambda: torch.zeros(0, 1, dtype=torch.long))
    mask: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    cache: Any = None
    waiting: list[Row] = field(default_factory=list)

    @property
    def load(self) -> int:
        """Slots that its requests take at their longest."""
        return sum(row.request.positions for row in (*self.rows, *self.waiting))

    def join(self, other: Batch) -> None:
        """Take another batch's requests."""
        if not self.rows:
            self.rows, self.ids, self.mask, self.cache = other.rows, other.ids, other.mask, other.cache
            return
        length = max(self.mask.shape[1], other.mask.shape[1])
        for each in (self, other):
            missing = length - each.mask.shape[1]
            each.mask = F.pad(each.mask, (missing, 0))
            for layer in own_layers(each.cache):
                layer.lengthen(missing)
        for mine, theirs in zip(own_layers(self.cache), own_layers(other.cache), strict=True):
            mine.append(theirs)
        settle(self.cache, length)
        self.rows, self.ids = [*self.rows, *other.rows], torch.cat([self.ids, other.ids])
        self.mask = torch.cat([self.mask, other.mask])

    def leave(self, ids: Collection[int]) -> None:
        """Let go of some requests."""
        self.waiting = [row for row in self.waiting if row.request.id not in ids]
        kept = [n for n, row in enumerate(self.rows) if row.request.id not in ids]
        if len(kept) == len(self.rows):
            return
        if self.cache is None:  # on another replica
            self.rows = [self.rows[n] for n in kept]
            return
        if not kept:
            self.rows, self.ids, self.mask, self.cache = [], self.ids[:0], self.mask[:0], None
            return
        rows = torch.tensor(kept, device=self.mask.device)
        self.rows, self.ids, self.mask = [self.rows[n] for n in kept], self.ids[rows], self.mask[rows]
        padding = int(self.mask.any(dim=0).to(torch.long).argmax())  # columns that are padding in every row
        self.mask = self.mask[:, padding:]
        for layer in own_layers(self.cache):
            layer.select(rows)
            layer.shorten(padding)
        settle(self.cache, self.mask.shape[1])


class BatchedDecoder:
    """A ``serving.decoder.Decoder`` on the ranks of a job.

    Args:
        generator: of the job's model.
        capacity_tokens: slots of all caches together.

    Raises:
        PlanError: the plan shards parameters over replicas, which would have to go in step.
        InputError: the model is an encoder-decoder.
    """

    def __init__(self, generator: Generator, capacity_tokens: int) -> None:
        if generator.plan.dp_shard > 1:
            raise PlanError("requests come and go for each replica by itself; serve with dp_shard=1")
        if generator.config.is_encoder_decoder:
            raise InputError("an encoder-decoder cannot be served yet; use `weft generate`")
        text = generator.config.get_text_config()
        self.generator, self.capacity_tokens = generator, capacity_tokens
        self.vocabulary: int = text.vocab_size
        self.max_length: int = text.max_position_embeddings
        plan = generator.plan
        self._batches = [[Batch() for _ in range(plan.microbatches)] for _ in range(plan.replicas)]

    def join(self, requests: Sequence[Wanted]) -> None:
        """These take part from the next step on, each in the batch that has least to do."""
        for request in requests:
            batch = min((b for batches in self._batches for b in batches), key=lambda b: b.load)
            batch.waiting.append(Row(request))

    def leave(self, ids: Collection[int]) -> None:
        """These take part no longer; their cache is let go."""
        for batches in self._batches:
            for batch in batches:
                batch.leave(ids)

    def step(self) -> dict[int, int]:
        """One more token for every request that takes part, by id, the same on every rank."""
        generator, replica = self.generator, self.generator.grid.replica
        with Evaluation(generator.model):
            found = self._step(self._batches[replica])
        # On other replicas the same requests move on; what they were given is told below.
        everybody = [[[*batch.rows, *batch.waiting] for batch in batches] for batches in self._batches]
        for number, batches in enumerate(self._batches):
            for batch in batches:
                if number != replica:
                    batch.rows, batch.waiting = [*batch.rows, *batch.waiting], []
        tokens = self._told(found, everybody)
        for batches in self._batches:
            for batch in batches:
                for row in batch.rows:
                    row.generated += 1
        return tokens

    def _step(self, batches: Sequence[Batch]) -> Tensor:
        """The next tokens of this replica's requests, in the order of its batches and their rows."""
        generator, sends = self.generator, []
        begun: list[tuple[Batch, Batch | None, Tensor | None]] = []
        for batch in batches:
            new = self._new(batch) if batch.waiting else None
            parts = [part for part in (batch if batch.rows else None, new) if part is not None]
            chosen = [self._chosen(part) for part in parts]
            tokens = torch.cat([c for c in chosen if c is not None]) if generator.is_last and chosen else None
            if tokens is not None:
                sends += generator.send(tokens)
            begun.append((batch, new, tokens))
        found = []
        for batch, new, tokens in begun:
            count = len(batch.rows) + (len(new.rows) if new else 0)
            if not count:
                continue
            if tokens is None:
                tokens = generator.receive(count)
            old = len(batch.rows)
            batch.ids = tokens[:old, None]
            if new is not None:
                new.ids = tokens[old:, None]
                batch.join(new)
                batch.waiting = []
            found.append(tokens)
        generator.sent(sends)
        generator.finish()
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.long)

    def _new(self, batch: Batch) -> Batch:
        """Those who wait, with their prompts for a first step."""
        device = self.generator.grid.device
        prompts = [list(row.request.prompt) for row in batch.waiting]
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        return Batch(batch.waiting, ids, mask, make_cache(self.generator.config))

    def _chosen(self, batch: Batch) -> Tensor | None:
        """The next tokens of a batch, on the last stage."""
        before = seen(batch.cache)
        if before:
            batch.mask = F.pad(batch.mask, (0, batch.ids.shape[1]), value=1)
        positions = (batch.mask.cumsum(dim=-1) - 1).clamp(min=0)[:, before:]
        logits = self.generator.step(Step(batch.ids, batch.mask, positions, None, batch.cache))
        if not self.generator.is_last:
            return None
        places = [row.generated for row in batch.rows]
        return choose(logits, [row.request.sampling for row in batch.rows], [0] * len(places), places)

    def _told(self, mine: Tensor, everybody: list[list[list[Row]]]) -> dict[int, int]:
        """Every request's token, of all replicas."""
        ids = [[row.request.id for rows in batches for row in rows] for batches in everybody]
        every = [mine]
        if len(ids) > 1:
            most = max(map(len, ids))
            padded = F.pad(mine, (0, most - len(mine)))
            every = [torch.empty_like(padded) for _ in ids]
            if most:
                dist.all_gather(every, padded, group=self.generator.grid.group("dp_replicate"))
        return {
            request: int(token)
            for theirs, tokens in zip(ids, every, strict=True)
            for request, token in zip(theirs, tokens.tolist(), strict=False)
        }


def make_decoder(engine: InferenceEngine, capacity_tokens: int | None = None) -> BatchedDecoder:
    """A decoder of an engine's model; all ranks call it.

    Args:
        engine: of this rank.
        capacity_tokens: slots of the cache of all requests together; None: what a share of the free memory holds.
    """
    generator = engine.inferring.generator
    if capacity_tokens is None:
        capacity_tokens = _capacity(engine)
    return BatchedDecoder(generator, capacity_tokens)


def _capacity(engine: InferenceEngine) -> int:
    """Slots that a share of the free memory holds, the same on every rank."""
    text, plan = engine.inferring.generator.config.get_text_config(), engine.plan
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * heads * size * next(engine.model.parameters()).itemsize * text.num_hidden_layers
    if engine.grid.device.type == "cpu":
        free = psutil.virtual_memory().available // dist.get_world_size()
    else:
        free = torch.accelerator.get_memory_info()[0]
    slots = torch.tensor(int(SHARE * free / (per_token / (plan.pp * plan.tp))) * plan.replicas)
    slots = slots.to(engine.grid.device)
    dist.all_reduce(slots, op=dist.ReduceOp.MIN)
    return max(1, int(slots))
