"""Plans for inference, measured in turns: what each generates in a second and how long its first token takes, in the
same processes as the others, beside what was predicted of a cluster measured there.

A race is a request (sequences, tokens of a prompt, new ones) in some surroundings, and the plans that run it. Every
process makes an engine of each plan; then they take turns, in an order that changes from round to round, so that a
disturbance hits no plan alone. Times are medians of the faster half of the rounds, since disturbances only add. Before
each round the machine is measured again, and predictions are medians over these. A plan that took much longer than the
best in its first round sits out the others.

    first token    from the call of ``generate`` until the last stages have the first token of every sequence
    tokens/s       new tokens of all sequences by the seconds of the whole call, the prompts' included
    token          seconds from token to token after the first, until every sequence has its last
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from inference_rows import VALUES, Request, Row, Scenario, Turn
from prediction_cases import PLAIN, SLOW_LINK, Surroundings
from transformers import LlamaConfig, LlamaForCausalLM

import weft
from weft.capture import capture_inference
from weft.capture.inference import Tokens
from weft.capture.profile import Generation
from weft.cluster import Cluster, measure
from weft.inference.engine import InferenceEngine
from weft.planner import choose_inference, estimate_inference
from weft.runtime.pool import Pool

DEVICES = 2
GROUPS = (1, 2, 4)
"""Groups in flight of the plans that a choice is compared with."""

SITS_OUT = 1.5
"""A plan that takes so many times as long as the best, for the batch and from token to token, is measured once."""

WITHIN = 0.05
"""A choice is right where no plan is faster by more, as for training."""


class Model(NamedTuple):
    """A Llama's sizes."""

    layers: int = 8
    hidden: int = 256
    heads: int = 8


def workload(model: Model, batch: int) -> weft.Workload:
    """The Llama, with random weights."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=model.hidden,
        intermediate_size=4 * model.hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.heads // 2,
        max_position_embeddings=1024,
    )
    sample = {"input_ids": torch.zeros(8, dtype=torch.long)}
    return weft.Workload(model=lambda: LlamaForCausalLM(config), data=[sample], batch_size=batch)


def costs_of(model: Model, request: Request) -> Generation:
    """What a request costs."""
    found = capture_inference(
        workload(model, request.batch), tokens=Tokens(prompt=request.prompt, new_tokens=request.new)
    )
    assert isinstance(found, Generation)
    return found


# -- in every process -------------------------------------------------------------------------------------------------


def once(engine: InferenceEngine, request: Request) -> Turn:
    """One call, on the slowest process."""
    ids = torch.randint(3, 1000, (request.batch, request.prompt), generator=torch.Generator().manual_seed(0))
    seen: dict[int, float] = {}
    last = 0.0

    def told(tokens: dict[int, int]) -> None:
        nonlocal last
        last = time.perf_counter()
        for sequence in tokens:
            seen.setdefault(sequence, last)

    dist.barrier()
    began = time.perf_counter()
    engine.generate(ids, max_new_tokens=request.new, eos_token_id=[], on_tokens=told)
    total = time.perf_counter() - began
    # The other stages hear of a token when they have time to.
    chooses = engine.grid.stage == engine.plan.pp - 1
    told_s = (max(seen.values()) - began, last - began) if chooses else (0.0, 0.0)
    found = torch.tensor([*told_s, total], dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return Turn(*found.tolist())


def in_turns(
    model: Model, request: Request, plans: Sequence[weft.Plan], rounds: int
) -> tuple[list[list[Turn]], list[Cluster]]:
    """Every plan's rounds, and the cluster as it was before each but the first."""
    engines = [weft.parallelize(workload(model, request.batch), plan, purpose="inference") for plan in plans]
    for engine in engines:  # the first call makes recordings and connections
        engine.generate(torch.ones(request.batch, request.prompt, dtype=torch.long), max_new_tokens=2, eos_token_id=[])
    found: list[list[Turn]] = [[] for _ in plans]
    clusters: list[Cluster] = []
    runs = list(range(len(plans)))
    for number in range(rounds):
        if number:
            clusters.append(measure())
        for index in runs[:: -1 if number % 2 else 1]:
            found[index].append(once(engines[index], request))
        if number == 0:
            runs = contenders([turns[0] for turns in found])
    return found, clusters


def contenders(firsts: Sequence[Turn]) -> list[int]:
    """The plans that a first round leaves a chance."""
    batch, token = min(t.total_s for t in firsts), min(t.last_s - t.first_s for t in firsts)
    return [
        index
        for index, turn in enumerate(firsts)
        if turn.total_s <= SITS_OUT * batch or turn.last_s - turn.first_s <= SITS_OUT * token
    ]


# -- running it -------------------------------------------------------------------------------------------------------


def measured_in(pool: Pool, ranks: int = DEVICES) -> Cluster:
    """What the processes of a pool compute on."""
    cluster: Cluster = pool.run(measure, ranks=ranks)[0]
    return cluster


def race(
    pool: Pool, model: Model, request: Request, plans: Sequence[weft.Plan], cluster: Cluster, rounds: int, name: str
) -> list[Row]:
    """Some plans for a request, in the processes of a pool in the surroundings of this name."""
    costs, ranks = costs_of(model, request), plans[0].devices
    turns, clusters = pool.run(partial(in_turns, model, request, plans, rounds), ranks=ranks)[0]
    return [
        Row(
            request=request,
            surroundings=name,
            plan=plan,
            predicted=[estimate_inference(costs, each, plan) for each in (cluster, *clusters)],
            turns=own,
        )
        for plan, own in zip(plans, turns, strict=True)
    ]


def scenario(pool: Pool, model: Model, request: Request, surroundings: Surroundings, rounds: int) -> Scenario:
    """Weft's choices beside every other plan, in the processes of a pool in these surroundings."""
    costs, cluster = costs_of(model, request), measured_in(pool)
    choices = {objective: choose_inference(costs, cluster, objective=objective).plan for objective in VALUES}
    plans = distinct([*choices.values(), *possible(costs, cluster)])
    rows = race(pool, model, request, plans, cluster, rounds, surroundings.name)
    names = {objective: rows[distinct_index(plans, plan)].name for objective, plan in choices.items()}
    one = choose_inference(costs, cluster.with_devices(1), microbatches=1).plan
    alone = race(pool, model, request, [one], cluster.with_devices(1), rounds, surroundings.name)[0]
    return Scenario(request=request, surroundings=surroundings.name, rows=rows, chosen=names, alone=alone)


def possible(costs: Generation, cluster: Cluster) -> list[weft.Plan]:
    """Every way to divide the model over two processes, with some numbers of groups."""
    found = []
    for degrees in ({"dp_replicate": 2}, {"pp": 2}, {"tp": 2}):
        for groups in GROUPS:
            if groups * degrees.get("dp_replicate", 1) <= costs.prefill.batch_size:
                found.append(choose_inference(costs, cluster, microbatches=groups, **degrees).plan)
    return found


def distinct(plans: Sequence[weft.Plan]) -> list[weft.Plan]:
    """Each once."""
    return [plan for index, plan in enumerate(plans) if distinct_index(plans, plan) == index]


def distinct_index(plans: Sequence[weft.Plan], plan: weft.Plan) -> int:
    """The first that is the same, whatever its reasons."""

    def key(plan: weft.Plan) -> object:
        return plan.stages, tuple(plan.degrees.values()), plan.microbatches, plan.shares

    return [key(other) for other in plans].index(key(plan))


SCENARIOS = [
    (Request(batch, prompt, 32), surroundings)
    for surroundings in (PLAIN, SLOW_LINK)
    for batch in (1, 32)
    for prompt in (32, 256)
]
