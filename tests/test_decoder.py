"""Continuous batching: requests come and go, and each gets the tokens that it gets alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from generative import GENERATIVE, VOCABULARY
from test_equality import plan_for

import weft
from weft.inference.caches import Kept
from weft.inference.decoder import make_decoder
from weft.inference.sampling import Sampling
from weft.runtime.pool import Pool
from weft.serving.decoder import Request

KINDS: dict[str, tuple[dict[str, int], int]] = {  # degrees, groups of requests
    "one": ({}, 1),
    "one, two groups": ({}, 2),
    "pp=2": ({"pp": 2}, 2),
    "pp=3": ({"pp": 3}, 2),
    "tp=2": ({"tp": 2}, 1),
    "dp=2 x pp=2": ({"dp_replicate": 2, "pp": 2}, 2),
}


def requests(count: int) -> list[Request]:
    generator = random.Random(5)
    return [
        Request(
            id=i,
            prompt=tuple(generator.randrange(VOCABULARY) for _ in range(generator.randint(1, 24))),
            max_new_tokens=generator.randint(1, 30),
            sampling=Sampling(do_sample=i % 3 == 0, seed=i),
        )
        for i in range(count)
    ]


def run_requests(name: str, plan: weft.Plan, count: int, at_once: int) -> dict[int, list[int]]:
    """All requests, so many at once at most; each joins as another leaves."""
    engine = weft.parallelize(GENERATIVE[name](), plan, purpose="inference")
    decoder = make_decoder(engine, capacity_tokens=10_000)
    waiting, under_way = requests(count), {}
    found: dict[int, list[int]] = {}
    while waiting or under_way:
        joining = [waiting.pop(0) for _ in range(min(len(waiting), at_once - len(under_way), 3))]
        decoder.join(joining)
        under_way |= {request.id: request for request in joining}
        step = decoder.step()
        assert set(step) == set(under_way)
        for request, token in step.items():
            found.setdefault(request, []).append(token)
        done = [i for i, request in under_way.items() if len(found[i]) == request.max_new_tokens]
        decoder.leave(done)
        for each in done:
            del under_way[each]
    assert all(batch.cache is None for batches in decoder._batches for batch in batches)
    return found


def one_by_one(name: str, plan: weft.Plan, count: int) -> dict[int, list[int]]:
    engine = weft.parallelize(GENERATIVE[name](), plan, purpose="inference")
    found = {}
    for r in requests(count):
        settings: Any = {"do_sample": r.sampling.do_sample, "seed": r.sampling.seed, "max_new_tokens": r.max_new_tokens}
        found[r.id] = engine.generate([r.prompt], eos_token_id=(), **settings).sequences[0, len(r.prompt) :].tolist()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.matrix
def test_requests_come_and_go(pool: Pool, name: str, kind: str):
    alone = pool.run(one_by_one, name, plan_for(GENERATIVE[name](), {}), 20, ranks=1)[0]
    degrees, groups = KINDS[kind]
    plan = plan_for(GENERATIVE[name](), degrees, microbatches=groups)
    for found in pool.run(run_requests, name, plan, 20, 7, ranks=plan.devices):
        assert found == alone


def test_a_layer_keeps_what_its_window_needs():
    generator = torch.Generator().manual_seed(0)
    for window in (None, 4):
        layer, whole = Kept(window), torch.zeros(2, 1, 0, 3)
        for tokens in (7, 1, 1, 2, 40, 1):
            new = torch.randn(2, 1, tokens, 3, generator=generator)
            length, gone = layer.get_mask_sizes(tokens)
            keys, values = layer.update(new, new)
            whole = torch.cat([whole, new], dim=2)
            assert keys.shape[2] == length == whole.shape[2] - gone
            assert torch.equal(keys, whole[:, :, gone:])
            assert torch.equal(values, keys)
        room = 1.5 * (40 + 3) + 32 if window else 1.5 * whole.shape[2] + 32
        assert layer.bytes <= 2 * 2 * 3 * 4 * room


@pytest.mark.parametrize(
    ("name", "kind", "what"), [("t5", {}, "encoder-decoder"), ("llama", {"dp_shard": 2}, "dp_shard")]
)
def test_what_cannot_be_served_is_refused(pool: Pool, name: str, kind: dict[str, int], what: str):
    plan = plan_for(GENERATIVE[name](), kind)

    def job() -> str:
        try:
            make_decoder(weft.parallelize(GENERATIVE[name](), plan, purpose="inference"))
        except weft.WeftError as error:
            return str(error)
        return ""

    assert what in pool.run(job, ranks=plan.devices)[0]
