"""Plans for inference: what forwards cost and hold, rounds of a pipeline, and what is chosen where."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicCache

import weft
from weft.capture import Generation, capture_inference
from weft.capture.inference import Tokens
from weft.cli import run
from weft.cluster import Cluster
from weft.errors import InputError, MemoryLimitError, PlanError
from weft.planner import Constraints, choose_inference, estimate_inference, space
from weft.planner.forwards import Forwards, Task
from weft.planner.ranking import Search, candidates
from weft.planner.rounds import Lap, Pipe, least_s, least_token_s, simulate
from weft.planner.space import Candidate, Degrees
from weft.planner.work import Work

PROMPT, NEW = 24, 8
EXAMPLE = str(Path(__file__).parents[1] / "examples" / "code_lm.py")
SMALL = [EXAMPLE, "layers=2", "hidden=32", "heads=2", "context=16", "batch_size=4"]


def llama(hidden: int = 64, layers: int = 4, wide: int = 128) -> LlamaForCausalLM:
    sizes = {"hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=256, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, **sizes)
    )


def gemma() -> Gemma2ForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 16}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=256, max_position_embeddings=512, **sizes, **heads))


def t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=256, decoder_start_token_id=0, **sizes))


def wide() -> LlamaForCausalLM:
    return llama(hidden=8192, layers=8, wide=65536).to(torch.bfloat16)


@cache
def generation(model=llama, batch: int = 8, precision: str = "float32") -> Generation:
    workload = weft.Workload(model=model, data=[0], batch_size=batch)
    found = capture_inference(workload, precision, tokens=Tokens(prompt=PROMPT, new_tokens=NEW))
    assert isinstance(found, Generation)
    return found


def machine(devices: int = 4, memory: str = "1GiB") -> Cluster:
    return Cluster.local(devices, memory)


def forwards(what: Generation, cluster: Cluster) -> Forwards:
    return Forwards(Task.of(what), cluster)


def possible(what: Generation, cluster: Cluster) -> list[Candidate]:
    degrees, _ = space.possible(what.prefill, cluster.devices, Constraints(dp_shard=1))
    costs = forwards(what, cluster)
    return [c for each in degrees for c in candidates(costs, each, Constraints())]


# -- what it holds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [llama, gemma])
def test_weights_and_cache_are_those_of_real_tensors(model):
    real, batch = model().eval(), 3
    cache = DynamicCache(config=real.config)
    with torch.no_grad():
        for tokens in (PROMPT, *[1] * NEW):
            real(input_ids=torch.zeros(batch, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    held = sum(t.nbytes for t in [*real.parameters(), *real.buffers()])
    what = generation(model, batch)
    one = choose_inference(what, machine(1)).estimate.memory[0]
    assert (one["weights"], one["cache"]) == (pytest.approx(held, abs=64), kept)
    for degrees, share in ((Degrees(pp=2), 1), (Degrees(tp=2), 2)):
        costs = forwards(what, machine(2))
        candidate = Candidate(degrees, 1, "gpipe")
        stages = [room.held.terms for room in costs.holder.rooms(candidate, costs.cut(candidate))]
        assert sum(stage["cache"] for stage in stages) * share == kept


def test_a_cache_of_an_encoders_tokens_is_of_the_prompt():
    what = generation(t5, 2)
    own, cross = ([kept for kept in what.kept if kept.cross is which] for which in (False, True))
    assert len(own) == len(cross) == 3
    assert {kept.bytes(what.prompt, what.length) for kept in own} == {2 * 64 * 4 * NEW}
    assert {kept.bytes(what.prompt, what.length) for kept in cross} == {2 * 64 * 4 * PROMPT}


def test_the_cache_has_room_for_what_it_says():
    what, cluster = generation(), machine(2, "64MiB")
    estimate = choose_inference(what, cluster, pp=1, tp=1).estimate
    assert estimate.cache_tokens // what.length == estimate.cache_requests
    for sequences, fits in ((estimate.cache_requests // 2 * 2, True), (estimate.cache_requests + 8, False)):
        # Of the cache alone: with more sequences in a group a forward needs more, too.
        task = Task(replace(what.prefill, batch_size=sequences), what)
        costs = Forwards(task, cluster)
        few = Candidate(Degrees(dp_replicate=2), sequences // 8, "gpipe")
        held = costs.holder.rooms(few, costs.cut(few))[0].held
        others = sum(v for k, v in held.terms.items() if k in ("activations", "buffers")) - sum(
            v for k, v in estimate.memory[0].items() if k in ("activations", "buffers")
        )
        assert (held.bytes - others * (1 + cluster.device.allocator_share) <= held.limit) is fits


def test_a_step_of_decoding_reads_all_weights_once_and_the_cache():
    what = generation()
    read = sum(op.bytes.fixed for call in what.decode.calls for op in call.forward if op.kind == "matmul")
    matrices = [p for n, p in what.decode.parameters.items() if len(p.shape) == 2 and "embed" not in n]
    assert read == pytest.approx(sum(p.bytes for p in matrices), rel=0.01)
    attention = [op for call in what.decode.calls for op in call.forward if op.kind == "attention"]
    length = PROMPT + NEW // 2 + 1
    assert len(attention) == 4
    assert attention[0].bytes.per_sample >= 256 * length
    assert all(op.group == what.kept[i].group != -1 for i, op in enumerate(attention))


def test_what_tensor_parallelism_divides_of_a_prompt_it_divides_of_a_token():
    for precision in ("float32", "bf16"):
        what = generation(llama, 8, precision)
        divided = [
            [sum(op.group != -1 for op in call.forward if op.kind == "matmul") for call in profile.calls]
            for profile in (what.prefill, what.decode)
        ]
        assert divided[0] == divided[1] == [0, 7, 7, 7, 7, 0, 1, 0]
        sizes = [[g.forward_bytes.per_sample for g in p.tensor_groups[1:3]] for p in (what.prefill, what.decode)]
        item = 4 if precision == "float32" else 2
        assert sizes == [[PROMPT * 64 * item] * 2, [64 * item] * 2]


# -- rounds -----------------------------------------------------------------------------------------------------------


def pipe(first: list[float], then: list[float], travel: float = 0.0, back: float = 0.0) -> Pipe:
    stages = range(len(first))
    edges = {(s, s + 1): travel for s in stages[:-1]}
    laps = (Lap(tuple(Work(seconds) for seconds in own), edges) for own in (first, then))
    return Pipe(*laps, dict.fromkeys(stages[:-1], back), tuple((0, 1, 1.0) for _ in stages))


def by_hand(p: Pipe, groups: int, rounds: int) -> tuple[float, float]:
    """When all groups have been through round 0, and through all of them."""
    stages = len(p.first.works)
    free, chosen, first = [0.0] * stages, [0.0] * groups, 0.0
    for r in range(rounds):
        lap = p.first if r == 0 else p.then
        for group in range(groups):
            arrived = 0.0
            for s in range(stages):
                told = chosen[group] + p.back[s] if r and s < stages - 1 else chosen[group]
                free[s] = max(free[s], arrived, told) + lap.seconds[s]
                arrived = free[s] + lap.transfers.get((s, s + 1), 0.0)
            chosen[group] = free[-1]
        if r == 0:
            first = free[-1]
    return first, free[-1]


@pytest.mark.parametrize("cores", [None, {0: 8.0}])
@pytest.mark.parametrize("seed", range(8))
def test_rounds_are_what_following_each_group_gives(seed: int, cores: dict[int, float] | None):
    draw = random.Random(seed)
    stages, groups, rounds = draw.randint(1, 4), draw.randint(1, 6), draw.randint(1, 40)
    first, then = ([draw.uniform(0.1, 1) * size for _ in range(stages)] for size in (5, 1))
    p = pipe(first, then)
    (ended,) = simulate([p], groups, rounds, cores)
    assert (ended.first_s, ended.end_s) == pytest.approx(by_hand(p, groups, rounds), rel=1e-9)
    assert ended.end_s == pytest.approx(ended.spent[-1].end_s)
    assert least_s(p, groups, rounds) <= ended.end_s * (1 + 1e-12)
    if rounds > 1:
        assert least_token_s(p, groups, rounds) <= (ended.end_s - ended.first_s) / (rounds - 1) * (1 + 1e-12)


def test_a_group_alone_goes_around_and_several_wait_for_the_slowest_stage():
    p = pipe([3.0, 3.0], [1.0, 2.0], travel=0.25, back=0.5)
    alone, full = simulate([p], 1, 11, None)[0], simulate([p], 4, 11, None)[0]
    assert (alone.first_s, alone.end_s - alone.first_s) == (6.25, pytest.approx(10 * (1 + 2 + 0.25 + 0.5)))
    # A receive is posted when it is needed, so the slowest stage waits for each tensor while it travels.
    assert full.end_s - full.first_s == pytest.approx(10 * 4 * (2.0 + 0.25), rel=0.02)


def test_stages_that_share_a_core_take_turns():
    p = pipe([1.0, 1.0], [1.0, 1.0])
    (two,), (one,) = (simulate([p], 2, 21, {0: cores}) for cores in (2.0, 1.0))
    assert (one.end_s - one.first_s) / (two.end_s - two.first_s) == pytest.approx(2, rel=0.03)


# -- estimates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", [machine(), Cluster.parse("h100-sxm:1x4")], ids=["processes", "accelerators"])
def test_the_numbers_add_up(cluster: Cluster):
    what = generation()
    costs = forwards(what, cluster)
    for candidate in possible(what, cluster):
        ends = costs.cut(candidate)
        found = costs.estimate(candidate, ends)
        assert sum(found.time.values()) == pytest.approx(found.batch_s)
        assert found.first_token_s + (NEW - 1) * found.token_s == pytest.approx(found.batch_s)
        assert found.tokens_per_s == pytest.approx(8 * NEW / found.batch_s)
        for room, terms in zip(costs.holder.rooms(candidate, ends), found.memory, strict=True):
            assert sum(terms.values()) == pytest.approx(room.held.bytes)
        assert all(0 <= share <= 1 + 1e-9 for share in found.busy)
        assert costs.floor(candidate, token=False) <= costs.bound(candidate, ends) * (1 + 1e-9)
        assert costs.bound(candidate, ends) <= found.batch_s * (1 + 1e-9)
        assert costs.floor(candidate, token=True) <= costs.token_bound(candidate, ends) * (1 + 1e-9)
        assert costs.token_bound(candidate, ends) <= found.token_s * (1 + 1e-9)


@pytest.mark.parametrize("objective", ["throughput", "latency"])
@pytest.mark.parametrize("cluster", [machine(), Cluster.parse("h100-sxm:2x4")], ids=["processes", "accelerators"])
def test_the_search_finds_what_looking_at_everything_finds(objective: str, cluster: Cluster):
    what = generation(llama, 16)
    costs = forwards(what, cluster)
    degrees, _ = space.possible(what.prefill, cluster.devices, Constraints(dp_shard=1))
    search = Search(costs, Constraints(), degrees, objective)
    every = [(c.degrees.kind, search.score(costs.estimate(c, costs.cut(c)))) for c in search.candidates]
    best = {kind: min(score for k, score in every if k == kind) for kind in {kind for kind, _ in every}}
    found = [(w.candidate.degrees.kind, search.score(w.estimate)) for w in search]
    assert [score for _, score in found] == pytest.approx(sorted(best.values()))
    assert dict(found) == pytest.approx(best)
    assert search.simulated < len(search.candidates)
    one = choose_inference(what, cluster, objective=objective).estimate
    assert search.score(one) == (one.token_s if objective == "latency" else one.batch_s)


def test_a_plan_is_estimated_as_it_was_chosen():
    for cluster, what in ((machine(), generation()), (machine(2), generation(t5, 4))):
        for fixed in ({}, {"pp": 2}):
            choice = choose_inference(what, cluster, **fixed)
            assert estimate_inference(what, cluster, choice.plan) == choice.estimate
            assert choice.plan.batch_size == what.batch_size


def test_steps_of_a_decoder_run_where_its_prompts_did():
    what = generation(t5, 4)
    costs = forwards(what, machine(2))
    assert costs._then_ends((4, 7, 10)) == (0, 3, 6)
    ends = (4, 10)  # the encoder; the decoder
    assert [call.name for call in what.prefill.calls[:4]][-1] == "encoder.final_layer_norm"
    (lap,) = (p.then for p in costs._lines(Candidate(Degrees(pp=2), 2, "gpipe"), ends))
    assert lap.works[0].compute_s < lap.works[1].compute_s / 50
    assert sum(costs.estimate(Candidate(Degrees(pp=2), 2, "gpipe"), ends).time.values()) > 0


# -- choices ----------------------------------------------------------------------------------------------------------


def linked(cluster: Cluster, bytes_per_s: float, latency_s: float) -> Cluster:
    links = (replace(link, bytes_per_s=bytes_per_s, latency_s=latency_s, collectives=()) for link in cluster.links)
    return replace(cluster, links=tuple(links))


def test_a_model_that_fits_is_copied_and_the_plan_says_by_how_much_that_is_better():
    choice = choose_inference(generation(llama, 32), machine(2))
    assert choice.plan.describe() == "dp_replicate=2"
    ahead = choice.estimate.tokens_per_s / choice.alternatives[0][1].tokens_per_s - 1
    assert f"2 copies of the model beat splitting it: {ahead:.1%} (tokens/s)" in choice.plan.explain()


@pytest.mark.parametrize(("objective", "what"), [("throughput", "rate"), ("latency", "time per output token")])
def test_where_one_device_is_faster_than_several_the_plan_says_by_how_much(objective: str, what: str):
    one, slow = generation(llama, 1), linked(machine(2), 1e6, 1e-3)
    choice = choose_inference(one, slow, objective=objective)
    alone = choose_inference(one, machine(1), objective=objective).estimate
    spent = [e.token_s if objective == "latency" else e.batch_s for e in (choice.estimate, alone)]
    assert spent[0] > spent[1]
    told = f"One device by itself would be {spent[0] / spent[1]:.2f} times as fast ({what})"
    assert told in choice.plan.explain()
    # Copies of a large batch are faster than one, and one device has no others to be compared with.
    for other in (choose_inference(generation(llama, 32), machine(2)), choose_inference(one, machine(1))):
        assert "One device by itself" not in other.plan.explain()
    assert "One device by itself" not in choose_inference(one, slow, objective="memory").plan.explain()


def test_a_model_that_does_not_fit_is_split_and_the_plan_says_so():
    what = generation(wide)
    cluster = Cluster.parse("h100-sxm:1x4").with_memory(20 * 2**30)
    choice = choose_inference(what, cluster)
    assert choice.plan.pp * choice.plan.tp > 1
    assert choice.plan.dp_shard == 1
    assert "One device cannot hold the model, so it has to be split." in choice.plan.explain()
    assert {"one device", "dp_replicate=4"} <= {refused.what for refused in choice.refused}
    with pytest.raises(MemoryLimitError, match=r"the least that would do is .*--batch"):
        choose_inference(what, cluster.with_memory(2 * 2**30))


def test_sharded_copies_are_the_last_resort():
    what, cluster = generation(wide), Cluster.parse("h100-sxm:1x4").with_memory(20 * 2**30)
    assert choose_inference(what, cluster, pp=1, tp=1).plan.dp_shard == 4
    roomy = cluster.with_memory(70 * 2**30)
    free = choose_inference(what, roomy, pp=1, tp=1)
    assert free.plan.describe() == "dp_replicate=4"
    assert all(plan.dp_shard == 1 for plan, _ in free.alternatives)
    sharded = choose_inference(what, roomy, pp=1, tp=1, dp_shard=4).estimate
    assert sharded.time["data_parallel"] > 0.3 * sharded.batch_s  # all weights for every token


def test_latency_asks_for_tensor_parallelism_where_links_are_fast_and_not_where_they_are_slow():
    what, fast = generation(wide), Cluster.parse("h100-sxm:1x4")
    assert choose_inference(what, fast, objective="latency").plan.tp == 4
    slow = choose_inference(what, linked(fast, 1e8, 1e-3), objective="latency")
    assert slow.plan.tp == 1
    assert "(time per output token)" in slow.plan.explain()


def test_the_least_memory_and_the_least_cost():
    what, cluster = generation(llama, 16), machine()
    least = choose_inference(what, cluster, objective="memory")
    others = [max(e.peak_memory_bytes) for _, e in least.alternatives]
    fastest = choose_inference(what, cluster)
    assert max(least.estimate.peak_memory_bytes) <= min([*others, max(fastest.estimate.peak_memory_bytes)])
    cheapest = choose_inference(what, Cluster.parse("h100-sxm:1x8"), objective="cost", price=2.5)
    assert cheapest.cost is not None
    assert cheapest.plan.devices == 1  # nothing scales as well as not having to
    per_token = 2.5 * cheapest.estimate.batch_s / 3600 / (16 * NEW)
    assert cheapest.cost.to_json()["per_token"] == pytest.approx(per_token)
    assert "per million tokens" in cheapest.plan.explain()


# -- what is asked for ------------------------------------------------------------------------------------------------


def test_a_workload_predicts_if_it_says_what_unless_tokens_are_asked_for():
    batch = {"input_ids": torch.zeros(16, dtype=torch.long)}
    work = weft.Workload(
        model=llama, data=[batch], batch_size=4, predict=lambda model, b: model(**b, use_cache=False).logits[:, -1]
    )
    assert not isinstance(capture_inference(work), Generation)
    asked = capture_inference(work, tokens=Tokens(new_tokens=4))
    assert isinstance(asked, Generation)
    assert (asked.prompt, asked.new_tokens) == (512, 4)
    plain = capture_inference(replace(work, predict=None), batch_size=2)
    assert isinstance(plain, Generation)
    assert (plain.batch_size, plain.prompt, plain.new_tokens) == (2, 512, 128)
    plan = weft.plan(work, machine(2), purpose="inference", batch=8)
    assert plan.batch_size == 8
    assert "samples/s of each device" in plan.explain()


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"purpose": "serving"}, PlanError, "'serving' is unknown; choose from training, inference"),
        ({"prompt": 4}, PlanError, "prompt=4 is of a plan for inference"),
        ({"purpose": "inference", "batch": 0}, PlanError, "batch must be a whole number"),
        ({"purpose": "inference", "objective": "time"}, PlanError, "choose from throughput, latency, memory, cost"),
        ({"purpose": "inference", "recompute": "full"}, PlanError, "recompute is for training"),
        ({"purpose": "inference", "objective": "cost"}, PlanError, "add --price"),
        ({"purpose": "inference", "prompt": 1000, "new_tokens": 100}, InputError, "the model has 1024 positions"),
    ],
)
def test_what_cannot_be_asked_is_told(asked: dict, error: type[Exception], said: str):
    with pytest.raises(error, match=said):
        weft.plan(weft.Workload(model=llama, data=[0], batch_size=4), machine(2), **asked)
    linear = weft.Workload(model=lambda: torch.nn.Linear(2, 2), data=[0], batch_size=4)
    with pytest.raises(InputError, match="give it predict="):
        weft.plan(linear, machine(2), purpose="inference")


def test_the_command_plans_for_inference(capfd: pytest.CaptureFixture[str], tmp_path: Path):
    saved = tmp_path / "plan.json"
    assert run(["plan", *SMALL, "--purpose", "inference", "--devices", "2", "--save", str(saved)]) == 0
    said = capfd.readouterr().out
    assert "Plan for inference: " in said
    assert weft.Plan.load(saved).devices == 2
    assert run(["plan", *SMALL, "--purpose", "inference", "--devices", "2", "--batch", "8", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["request"] == {"batch": 8, "prompt": 0, "new_tokens": 0}
    assert found["estimate"]["samples_per_s"] > 0
    assert run(["plan", *SMALL, "--purpose", "inference", "--prompt", "4"]) == 2
    assert "give it predict=" in capfd.readouterr().err
