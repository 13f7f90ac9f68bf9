"""Generation under a plan gives the tokens that transformers gives on one device."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from generative import GENERATIVE, PROMPTS, by_transformers, t5
from test_equality import plan_for
from torch import Tensor

import weft
from weft.capture.recorder import Recording
from weft.inference.generation import Generation
from weft.inference.sampling import Sampling, draw, uniform
from weft.inference.steps import Step, step_of
from weft.runtime.elastic import Elastic
from weft.runtime.forwards import Forwards
from weft.runtime.pool import Pool

TOKENS = 64
PLANS: dict[str, tuple[dict[str, int], int]] = {  # degrees, groups of sequences
    "one": ({}, 1),
    "pp=2": ({"pp": 2}, 2),
    "pp=3": ({"pp": 3}, 3),
    "tp=2": ({"tp": 2}, 1),
    "pp=2 x tp=2": ({"pp": 2, "tp": 2}, 2),
    "dp=2 x pp=2": ({"dp_replicate": 2, "pp": 2}, 2),
    "dp_shard=2": ({"dp_shard": 2}, 1),
}
DRAWN = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 3}


def plan_of(name: str, kind: str) -> weft.Plan:
    degrees, groups = PLANS[kind]
    return plan_for(GENERATIVE[name](), degrees, microbatches=groups)


def generate(name: str, plan: weft.Plan, settings: dict[str, Any]) -> Generation:
    engine = weft.parallelize(GENERATIVE[name](), plan, purpose="inference")
    return engine.generate(PROMPTS, pad_token_id=0, **settings)


@lru_cache(maxsize=8)
def expected(name: str) -> Tensor:
    return by_transformers(GENERATIVE[name](), TOKENS)


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("name", GENERATIVE)
@pytest.mark.matrix
def test_greedy_tokens_are_those_of_transformers(pool: Pool, name: str, kind: str):
    plan = plan_of(name, kind)
    for found in pool.run(generate, name, plan, {"max_new_tokens": TOKENS, "eos_token_id": ()}, ranks=plan.devices):
        assert found.sequences.tolist() == expected(name).tolist()
        assert found.lengths == (TOKENS,) * len(PROMPTS)


@pytest.mark.parametrize("kind", ["pp=3", "pp=2 x tp=2", "dp=2 x pp=2"])
def test_a_seed_gives_the_same_tokens_under_every_plan(pool: Pool, kind: str):
    settings = {"max_new_tokens": 24, "eos_token_id": (), **DRAWN}
    alone = pool.run(generate, "llama", plan_of("llama", "one"), settings, ranks=1)[0]
    plan = plan_of("llama", kind)
    for found in pool.run(generate, "llama", plan, settings, ranks=plan.devices):
        assert found.sequences.tolist() == alone.sequences.tolist()
    other = pool.run(generate, "llama", plan_of("llama", "one"), {**settings, "seed": 4}, ranks=1)[0]
    assert other.sequences.tolist() != alone.sequences.tolist()


@pytest.mark.parametrize("kind", ["one", "pp=2", "dp=2 x pp=2", "dp_shard=2"])
def test_a_sequence_ends_with_its_stop_token(pool: Pool, kind: str):
    greedy = expected("gpt2")
    stop = int(greedy[2, -60])  # what the third prompt comes to early
    plan = plan_of("gpt2", kind)
    theirs = by_transformers(GENERATIVE["gpt2"](), TOKENS, eos_token_id=stop)
    for found in pool.run(generate, "gpt2", plan, {"max_new_tokens": TOKENS, "eos_token_id": stop}, ranks=plan.devices):
        assert found.sequences.tolist() == theirs.tolist()
        ends = [row[longest:].tolist() for row in theirs for longest in [max(map(len, PROMPTS))]]
        assert found.lengths == tuple(row.index(stop) + 1 if stop in row else len(row) for row in ends)


def told(name: str, plan: weft.Plan) -> tuple[list[dict[int, int]], Generation]:
    engine = weft.parallelize(GENERATIVE[name](), plan, purpose="inference")
    news: list[dict[int, int]] = []
    found = engine.generate(PROMPTS, max_new_tokens=5, eos_token_id=(), on_tokens=news.append)
    return news, found


def test_tokens_are_told_as_they_come(pool: Pool):
    for news, found in pool.run(told, "llama", plan_of("llama", "pp=2"), ranks=2):
        assert len(news) == 2 * 5
        rows = [[new[row] for new in news if row in new] for row in range(len(PROMPTS))]
        assert rows == found.sequences[:, -5:].tolist()


def while_training(plan: weft.Plan) -> list[Any]:
    workload = GENERATIVE["llama"]()
    engine = weft.parallelize(workload, plan)
    found = []
    for batch in engine.batches():
        engine.step(batch)
        tokens = engine.generate(PROMPTS, max_new_tokens=8, eos_token_id=()).sequences.tolist()
        found.append((tokens, all(m.training for m in engine.model.modules())))
    return found[:3]


@pytest.mark.long
def test_an_engine_that_trains_generates_too(pool: Pool):
    alone = pool.run(while_training, plan_of("llama", "one"), ranks=1)[0]
    assert all(training for _, training in alone)
    assert alone[0] != alone[2]
    for found in pool.run(while_training, plan_of("llama", "pp=2 x tp=2"), ranks=4):
        assert found == alone


def refused(settings: dict[str, Any]) -> str:
    engine = weft.parallelize(GENERATIVE["llama"](), plan_of("llama", "one"), purpose="inference")
    prompts = settings.pop("prompts", PROMPTS)
    try:
        engine.generate(prompts, **settings)
    except weft.InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"prompts": [[1, 64]]}, "outside the model's vocabulary of 64"),
        ({"prompts": [[1], []]}, "a prompt is empty"),
        ({"prompts": []}, "input_ids"),
        ({"prompts": torch.ones(2, 3)}, "input_ids"),
    ],
)
def test_what_cannot_be_is_refused(pool: Pool, settings: dict[str, Any], what: str):
    assert what in pool.run(refused, settings, ranks=1)[0]


def test_a_model_that_generates_nothing_is_refused(pool: Pool):
    from workloads import mlp

    def job() -> str:
        try:
            weft.parallelize(mlp(), plan_for(mlp(), {}), purpose="inference").generate([[1]])
        except weft.InputError as error:
            return str(error)
        return ""

    assert "no model of transformers" in pool.run(job, ranks=1)[0]


def test_tokens_are_drawn_with_their_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])
    sampling = Sampling(do_sample=True, temperature=0.7, top_k=4, top_p=0.9)
    draws = [int(draw(logits, sampling, uniform(1, 0, place))) for place in range(4000)]
    wanted = (logits / 0.7).softmax(0)
    wanted[3] = 0  # top_k
    order = wanted.argsort(descending=True)
    kept = order[: int((wanted[order].cumsum(0) < 0.9 * wanted.sum()).sum()) + 1]
    shares = torch.zeros(5).index_add(0, torch.tensor(draws), torch.full((4000,), 1 / 4000))
    expectation = torch.zeros(5).index_copy(0, kept, wanted[kept] / wanted[kept].sum())
    assert shares.tolist() == pytest.approx(expectation.tolist(), abs=0.03)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "gpt2"])
def test_recordings_of_any_size_follow_from_a_few(name: str):
    workload, plan = GENERATIVE[name](), plan_of(name, "pp=2")
    recordings = Forwards.recordings_of(step_of, workload, plan)

    def record(sequences: int, tokens: int) -> Recording:
        ids = torch.zeros(sequences, tokens, dtype=torch.long)
        return recordings.longest(Step(ids, None, ids, None))

    made: list[tuple[int, int]] = []
    elastic = Elastic(lambda b, t: made.append((b, t)) or record(b, t), plan)
    for size in [(1, 1), (2, 1), (9, 1), (1, 2), (4, 33), (1, 9), (6, 5)]:
        mine, theirs = elastic.of(*size).recording, record(*size)
        assert [call.name for call in mine.calls] == [call.name for call in theirs.calls]
        assert [call.leaves for call in mine.calls] == [call.leaves for call in theirs.calls]
    assert len(made) == 6


def test_an_encoder_may_be_less_deep_than_its_decoder(pool: Pool):
    """transformers' own generate makes a cache for the encoder's depth; without a cache there is nothing to make."""
    workload = t5(layers=1)
    torch.manual_seed(workload.seed)
    model: Any = workload.model().eval()
    ids, found = torch.tensor([[7, 3, 22, 40]]), torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(9):
            logits = model(input_ids=ids, decoder_input_ids=found, use_cache=False).logits
            found = torch.cat([found, logits[:, -1:].argmax(-1)], dim=1)

    def job(plan: weft.Plan) -> list[list[int]]:
        engine = weft.parallelize(t5(layers=1), plan, purpose="inference")
        tokens: list[list[int]] = engine.generate(ids, max_new_tokens=9, eos_token_id=()).sequences.tolist()
        return tokens

    for degrees in ({}, {"pp": 2}):
        plan = plan_for(workload, degrees)
        assert pool.run(job, plan, ranks=plan.devices) == [found.tolist()] * plan.devices
