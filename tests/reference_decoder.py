"""Decoders in one process, to serve by and to compare with: a tiny Llama, and one that counts."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import torch

from weft.serving.decoder import Request

VOCABULARY = 256


class CountingDecoder:
    """The next token is the last one plus 1: quick, and seen at a glance."""

    def __init__(self, *, vocabulary: int = VOCABULARY, max_length: int = 256, capacity_tokens: int = 2048) -> None:
        self.vocabulary, self.max_length, self.capacity_tokens = vocabulary, max_length, capacity_tokens
        self.step_s = 0.0
        self.last: dict[int, int] = {}

    def join(self, requests: Sequence[Request]) -> None:
        for request in requests:
            assert request.id not in self.last
            self.last[request.id] = request.prompt[-1]

    def leave(self, ids: Collection[int]) -> None:
        for id in ids:
            del self.last[id]

    def step(self) -> dict[int, int]:
        assert self.last
        if self.step_s:
            time.sleep(self.step_s)
        self.last = {id: (token + 1) % self.vocabulary for id, token in self.last.items()}
        return dict(self.last)


class ReferenceDecoder:
    """A tiny Llama of random weights that decodes one request after the other, each with a cache of its own."""

    def __init__(self, *, max_length: int = 256, capacity_tokens: int = 4096, layers: int = 2) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=max_length,
            initializer_range=0.3,  # or greedy tokens repeat themselves at once
        )
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(config).eval()
        self.vocabulary, self.max_length, self.capacity_tokens = VOCABULARY, max_length, capacity_tokens
        self.requests: dict[int, Request] = {}
        self.tokens: dict[int, list[int]] = {}
        self.caches: dict[int, object] = {}
        self.generators: dict[int, torch.Generator] = {}

    def join(self, requests: Sequence[Request]) -> None:
        from transformers import DynamicCache

        for request in requests:
            self.requests[request.id] = request
            self.tokens[request.id] = list(request.prompt)
            self.caches[request.id] = DynamicCache()
            self.generators[request.id] = torch.Generator().manual_seed(request.sampling.seed)
        assert sum(request.positions for request in self.requests.values()) <= self.capacity_tokens

    def leave(self, ids: Collection[int]) -> None:
        for id in ids:
            for kept in (self.requests, self.tokens, self.caches, self.generators):
                del kept[id]

    @torch.inference_mode()
    def step(self) -> dict[int, int]:
        found = {}
        for id, request in self.requests.items():
            cache, tokens = self.caches[id], self.tokens[id]
            unseen = tokens[cache.get_seq_length() :]
            logits_V = self.model(torch.tensor([unseen]), past_key_values=cache).logits[0, -1]
            found[id] = self.choose(request, logits_V)
            tokens.append(found[id])
        return found

    def choose(self, request: Request, logits_V: torch.Tensor) -> int:
        if not request.sampling.do_sample:
            return int(logits_V.argmax())
        chances_V = (logits_V / request.sampling.temperature).softmax(-1)
        if request.sampling.top_k:
            chances_V[chances_V.topk(request.sampling.top_k).values.min() > chances_V] = 0
        sorted_V, order_V = chances_V.sort(descending=True)
        chances_V[order_V[sorted_V.cumsum(-1) - sorted_V > request.sampling.top_p * sorted_V.sum()]] = 0
        return int(torch.multinomial(chances_V, 1, generator=self.generators[request.id]))


def alone(decoder: CountingDecoder | ReferenceDecoder, request: Request) -> list[int]:
    """The tokens of one request by itself, the one that ends it included."""
    decoder.join([request])
    tokens: list[int] = []
    while len(tokens) < request.max_new_tokens and not (tokens and tokens[-1] in request.stop_token_ids):
        tokens.append(decoder.step()[request.id])
    decoder.leave([request.id])
    return tokens
