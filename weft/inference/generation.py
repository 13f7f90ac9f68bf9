"""Generation: tokens one by one, by a model of ``transformers`` that is divided over devices.

The sequences are divided over the replicas, and those of a replica into groups, all of which are in flight: while one
stage computes a group's next token, the others are at other groups'. Every rank keeps the cache of its own layers. The
last stage chooses the tokens and sends them back to the earlier ones:

    stage 0   a0 b0 .. a1 b1 .. a2        a, b: groups of sequences; 0, 1, 2: the prompt, then token by token
    stage 1      a0 b0 .. a1 b1 ..

So every rank of a replica knows all tokens of its sequences, and with them which are done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import InputError
from weft.inference.sampling import Sampling, choose
from weft.inference.steps import Encoding, Step, checked_prompts, encoding_of, model_config, step_of
from weft.plan import Plan
from weft.runtime.batches import layout
from weft.runtime.ending import Function
from weft.runtime.forwards import Evaluation, Forwards
from weft.runtime.grid import Grid
from weft.runtime.shared import share

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

OnTokens = Callable[[dict[int, int]], None]
"""Told of new tokens, by the number of their sequence."""


class Generation(NamedTuple):
    """What was generated.

    Attributes:
        sequences: (B, P + N), as transformers has them: prompts with what follows; of an encoder-decoder what follows
            its start token. After a stop token there is padding.
        lengths: how many tokens were generated for each, its stop token included.
    """

    sequences: Tensor
    lengths: tuple[int, ...]


class Stops(NamedTuple):
    """Tokens that end a sequence, and what is put after them."""

    tokens: frozenset[int]
    padding: int


@dataclass
class Group:
    """Sequences that are generated together, on one stage.

    Attributes:
        rows: their numbers in the whole batch.
        samplings: how each one's tokens are chosen.
        ids: (B, T) tokens that the model is given next.
        mask: (B, L); None: there is no padding.
        positions: (B, T) of ``ids`` in their sequences; None for an encoder-decoder.
        cache: of this stage's layers.
        encoded: (B, S, D), of an encoder-decoder.
        chosen: tokens so far, a (B) each.
        over: (B), sequences that met a stop token.
        begun: whether the model was given the prompts.
    """

    rows: Sequence[int]
    samplings: Sequence[Sampling]
    ids: Tensor
    mask: Tensor | None
    positions: Tensor | None
    cache: Cache
    encoded: Tensor | None
    over: Tensor
    chosen: list[Tensor] = field(default_factory=list)
    begun: bool = False

    def step(self) -> Step:
        """What the model is given next."""
        return Step(self.ids, self.mask, self.positions, self.encoded, self.cache)

    def take(self, tokens: Tensor, stops: Stops) -> None:
        """The tokens that follow; what was over gets padding."""
        if stops.tokens:
            tokens = torch.where(self.over, stops.padding, tokens)
            for stop in stops.tokens:
                self.over = self.over | (tokens == stop)
        self.chosen.append(tokens)
        self.ids = tokens[:, None]
        if self.positions is not None:
            self.positions = self.positions[:, -1:] + 1
            if self.mask is not None:
                self.mask = F.pad(self.mask, (0, 1), value=1)


class Generator:
    """Generates with the model of one job.

    Args:
        model: the user's.
        plan, grid: of the job.
        forwards: makes what computes a function of the model.

    Raises:
        InputError: the model generates no tokens.
    """

    def __init__(self, model: nn.Module, plan: Plan, grid: Grid, forwards: Callable[[Function], Forwards]) -> None:
        self.model, self.plan, self.grid = model, plan, grid
        self.config = model_config(model)
        self.is_last = grid.stage == plan.pp - 1
        self._next = forwards(step_of)
        self._encode = forwards(encoding_of) if self.config.is_encoder_decoder else None

    def generate(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        *,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Generation:
        """Tokens after each of some prompts. All ranks call it with the same arguments and get the same result.

        Args:
            input_ids: (B, P) prompts, shorter ones padded (on the left, but for an encoder-decoder) with
                ``attention_mask``; or a list of prompts of any lengths.
            attention_mask: (B, P), 0 where there is padding; None: there is none.
            max_new_tokens: tokens of each sequence at most.
            do_sample, temperature, top_k, top_p, seed: as ``Sampling``; the same seed gives the same tokens under every
                plan.
            eos_token_id: one or several that end a sequence; None: the model's own.
            pad_token_id: what follows the end of a sequence; None: the model's own, or else its end's.
            on_tokens: told of new tokens as they come, on the ranks of the replica that generates them.

        Raises:
            InputError: prompts or settings that cannot be.
        """
        sampling = Sampling(do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        stops = self._stops(eos_token_id, pad_token_id)
        prompts = checked_prompts(input_ids, attention_mask, stops.padding, self.config)
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        total = len(prompts.tokens)
        ranges = layout(total, self.plan.portions, max(1, min(self.plan.microbatches, total)))
        # Replicas that gather their parameters from each other go in step.
        together = self.plan.dp_shard > 1
        mine = [r for r in ranges[self.grid.replica] if len(r) or together]
        with Evaluation(self.model):
            groups = [self._group(prompts, samples, sampling) for samples in mine]
            with self._next.alike():
                self._generate(groups, max_new_tokens, stops, to_the_end=together, on_tokens=on_tokens)
        self.finish()
        found = [(list(g.rows), torch.stack(g.chosen, dim=1)) for g in groups if g.rows]
        return self._joined(prompts, share(found, self.grid), stops)

    def _stops(self, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None) -> Stops:
        own = getattr(self.model, "generation_config", None) or self.config
        ends = own.eos_token_id if eos_token_id is None else eos_token_id
        every = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
        padding = own.pad_token_id if pad_token_id is None else pad_token_id
        return Stops(every, padding if padding is not None else min(every, default=0))

    def _group(self, prompts: Encoding, samples: range, sampling: Sampling) -> Group:
        from weft.inference.caches import make_cache

        device = self.grid.device
        part = slice(samples.start, samples.stop) if len(samples) else slice(0, 1)
        ids, mask = prompts.tokens[part].to(device), prompts.mask[part].to(device)
        positions, encoded = None, None
        if self._encode is not None:
            encoded = self._encoded(Encoding(ids, mask))
            ids = torch.full((len(ids), 1), self._start(), device=device)
        else:
            positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        over = torch.zeros(len(ids), dtype=torch.bool, device=device)
        return Group(
            list(samples),
            [sampling] * len(ids),
            ids,
            None if bool(mask.all()) else mask,
            positions,
            make_cache(self.config),
            encoded,
            over,
        )

    def _start(self) -> int:
        """The token that a decoder begins with."""
        own = getattr(self.model, "generation_config", None) or self.config
        start = own.decoder_start_token_id
        return int(start if start is not None else own.bos_token_id)

    def _encoded(self, batch: Encoding) -> Tensor:
        """What the encoder makes of a batch, on every stage."""
        assert self._encode is not None
        encoded = self._encode.run(batch)
        self._encode.finish()
        if self.plan.pp == 1:
            assert isinstance(encoded, Tensor)
            return encoded
        group, last = self.grid.group("pp"), self.plan.pp - 1
        told: list[Any] = [(tuple(encoded.shape), encoded.dtype) if self.is_last else None]
        dist.broadcast_object_list(told, group=group, group_src=last, device=torch.device("cpu"))
        shape, dtype = told[0]
        value = encoded.contiguous() if self.is_last else torch.empty(shape, dtype=dtype, device=self.grid.device)
        dist.broadcast(value, group=group, group_src=last)
        return value

    def _generate(
        self, groups: Sequence[Group], tokens: int, stops: Stops, *, to_the_end: bool, on_tokens: OnTokens | None
    ) -> None:
        """Generate for the groups of this replica, all in flight."""
        sends: deque[list[tuple[dist.Work, Tensor]]] = deque()

        def is_over(group: Group) -> bool:
            return len(group.chosen) == tokens or (not to_the_end and bool(stops.tokens) and bool(group.over.all()))

        def take(group: Group, chosen: Tensor) -> None:
            group.take(chosen, stops)
            if on_tokens is not None and group.rows:
                on_tokens(dict(zip(group.rows, group.chosen[-1].tolist(), strict=True)))

        for _ in range(tokens):
            for group in groups:
                if is_over(group):
                    continue
                if group.begun and not self.is_last:
                    take(group, self.receive(len(group.ids)))
                    if is_over(group):
                        continue
                logits = self.step(group.step())
                group.begun = True
                if self.is_last:
                    rows = group.rows or [0]
                    chosen = choose(logits, group.samplings, rows, [len(group.chosen)] * len(rows))
                    sends.append(self.send(chosen))
                    take(group, chosen)
                    if len(sends) > len(groups):  # what this group was sent before has brought its last step about
                        self.sent(sends.popleft())
        for group in groups:
            if not self.is_last and not is_over(group):
                take(group, self.receive(len(group.ids)))
        for oldest in sends:
            self.sent(oldest)

    def step(self, step: Step) -> Tensor:
        """Logits of the next token of every sequence, (B, V); of no use but on the last stage. The cache has seen the
        step's tokens afterwards."""
        from weft.inference.caches import seen, settle

        logits: Tensor = self._next.run(step, like=step.like())
        assert step.cache is not None
        settle(step.cache, seen(step.cache) + step.tokens.shape[1])
        return logits

    def receive(self, count: int) -> Tensor:
        """The tokens that the last stage has chosen for so many sequences."""
        tokens = torch.empty(count, dtype=torch.long, device=self.grid.device)
        dist.recv(tokens, group=self.grid.gradients, group_src=self.plan.pp - 1)
        return tokens

    def send(self, tokens: Tensor) -> list[tuple[dist.Work, Tensor]]:
        """Tell the earlier stages which tokens were chosen; what to wait for."""
        earlier, group = range(self.plan.pp - 1), self.grid.gradients
        works = [(dist.isend(tokens, group=group, group_dst=stage), tokens) for stage in earlier]
        return cast(list[tuple[dist.Work, Tensor]], works)

    def sent(self, sends: Sequence[tuple[dist.Work, Tensor]]) -> None:
        """Wait until what ``send`` began is over."""
        for work, _ in sends:
            work.wait()

    def finish(self) -> None:
        """Wait until all that stages send has left."""
        self._next.finish()

    def _joined(self, prompts: Encoding, every: list[list[tuple[list[int], Tensor]]], stops: Stops) -> Generation:
        """The result, of what each replica's groups have."""
        total = len(prompts.tokens)
        of_rows: dict[int, list[int]] = {}
        for groups in every:
            for rows, chosen in groups:
                of_rows |= dict(zip(rows, chosen.tolist(), strict=True))
        ended = [next((n + 1 for n, t in enumerate(of_rows[r]) if t in stops.tokens), None) for r in range(total)]
        lengths = tuple(len(of_rows[r]) if end is None else end for r, end in enumerate(ended))
        new = torch.full((total, max(lengths)), stops.padding)
        for row, length in enumerate(lengths):
            new[row, :length] = torch.tensor(of_rows[row][:length])
        before = torch.full((total, 1), self._start()) if self._encode is not None else prompts.tokens.cpu()
        return Generation(torch.cat([before, new], dim=1), lengths)
