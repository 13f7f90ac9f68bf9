"""Experts in the planner: which parameters they are, how ``ep`` divides them, what that costs. Sharding over ``cp``."""

from dataclasses import replace

import pytest
import torch
from published_models import workload
from published_run import Run, Shape
from transformers import MixtralConfig, MixtralForCausalLM

import weft
from weft.capture import capture
from weft.planner.communication import Mesh, Path, collective_s
from weft.planner.compute import Division
from weft.planner.evaluate import Evaluator
from weft.planner.experts import Experts
from weft.planner.space import Candidate, Degrees, refuse
from weft.planner.stages import Stages
from weft.planner.system import WEFT

MOE = Shape(
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=4,
    head_size=16,
    ffn=96,
    vocab=256,
    seq_len=32,
    experts=4,
    top_k=2,
    expert_ffn=48,
    gated=True,
    norm="rms",
    positions="rope",
    bias=False,
    tied=False,
)
EXPERTS_BYTES = 2 * 4 * 3 * 64 * 48 * 2  # layers, experts, matrices, each in bfloat16
CLUSTER = weft.Cluster.preset("h100-sxm", nodes=2, devices_per_node=8)


def profile_of(shape=MOE):
    common = dict(source="", row=1, model="", tier="A", framework="megatron", dtype="bf16", micro_batch=1)
    run = Run(**common, shape=shape, global_batch=32, gpu="h100", gpus=1, gpus_per_node=1, dp=1)
    return capture(workload(run))


@pytest.fixture(scope="module")
def profile():
    return profile_of()


def test_experts_are_told_by_how_they_compute(profile):
    found = Experts.of(profile)
    assert set(found.counts.values()) == {4}
    assert {name.rpartition(".")[2] for name in found.names} == {"ups", "downs"}
    assert not Experts.of(profile_of(replace(MOE, experts=0))).counts


def test_experts_of_transformers_are_told():
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    work = weft.Workload(
        model=lambda: MixtralForCausalLM(config),
        loss=lambda model, batch: model(input_ids=batch, labels=batch).loss,
        data=[torch.zeros(16, dtype=torch.long)] * 8,
        optimizer=lambda parameters: torch.optim.AdamW(parameters),
        batch_size=8,
    )
    found = Experts.of(capture(work))
    assert set(found.counts.values()) == {4}
    assert len(found.names) == 4


@pytest.mark.parametrize(
    ("degrees", "reason"),
    [
        (Degrees(dp_shard=4, ep=4), None),
        (Degrees(dp_shard=2, tp=2, ep=4, etp=1), None),
        (Degrees(dp_shard=3, ep=3), "4 experts are not divisible by 3"),
        (Degrees(dp_shard=2, ep=4), "4 parts of experts for 2 devices of a stage"),
    ],
)
def test_degrees_that_experts_cannot_be_divided_by_are_refused(profile, degrees, reason):
    assert refuse(profile, degrees, None) == reason
    if degrees.ep > 1 and reason is None:
        assert refuse(profile_of(replace(MOE, experts=0)), degrees, None) == "this model has no experts"


def test_a_rank_holds_its_part_of_the_experts(profile):
    stages = Stages(profile, CLUSTER, WEFT)
    every = (0, len(profile.calls))

    def held(degrees):
        return stages.holding(degrees, [every])

    whole, parts = held(Degrees(dp_replicate=8)), held(Degrees(dp_replicate=8, ep=4))
    assert whole.trainable - parts.trainable == EXPERTS_BYTES * 3 / 4
    assert (sum(whole.experts.values()), sum(parts.experts.values())) == (0, EXPERTS_BYTES / 4)
    # Of 8 sharding ranks 2 keep the same experts: their state is divided by as much as everyone's.
    sharded = held(Degrees(dp_shard=8, ep=4))
    assert sharded.trainable_shard == pytest.approx(held(Degrees(dp_shard=8)).trainable_shard)
    # With whole experts on ranks that divide other layers, a rank keeps as much as with halves of twice as many.
    assert held(Degrees(tp=2, dp_replicate=4, ep=4, etp=1)).experts == held(Degrees(tp=2, dp_replicate=4, ep=2)).experts


def test_tokens_travel_to_their_experts_and_back(profile):
    stages = Stages(profile, CLUSTER, WEFT)
    block = next(i for i, call in enumerate(profile.calls) if call.name == "layers.1")
    costs = stages._calls[0]
    rows = 3 * 32 * 2 * 64 * 2  # samples, tokens, experts of each, hidden size, bytes
    cost = costs.of(block, Division(3, ep=4))
    assert (cost.forward_routed, cost.backward_routed) == (2 * rows, 2 * rows)
    again = costs.of(block, Division(3, ep=4), "full")
    assert again.backward_routed == 4 * rows
    assert costs.of(block, Division(3)).forward_routed == 0
    assert costs.of(block, Division(3, 2, True, 1, 4, 1)).forward_routed == rows
    # Whole experts have nothing to sum over the ranks of tp.
    assert len(costs.of(block, Division(3, 2, True, 1, 4, 1)).forward_reduced) == 1
    assert len(costs.of(block, Division(3, 2, True, 1, 2, 2)).forward_reduced) == 2


def test_an_all_to_all_takes_its_slowest_level():
    inner, outer = CLUSTER.links
    inside = Path.of(CLUSTER, 4, 1)
    assert collective_s("all_to_all", 1e9, inside) == pytest.approx(inner.latency_s + 3 / 4 * 1e9 / inner.bytes_per_s)
    across = Path.of(CLUSTER, 16, 1)
    assert collective_s("all_to_all", 1e9, across) == pytest.approx(outer.latency_s + 1e9 / 2 / outer.bytes_per_s)


def test_gradients_of_experts_are_averaged_by_the_ranks_that_keep_them():
    mesh = Mesh(CLUSTER, Degrees(dp_replicate=2, dp_shard=4, tp=2, ep=2, etp=1), 4)
    names = ("dp_shard", "dp_replicate", "ep", "expert_shard", "expert_replicate")
    assert [mesh.ranks(name) for name in names] == [4, 2, 2, 4, 2]


def test_estimates_with_experts_divided_hold_less_and_talk_more(profile):
    evaluator = Evaluator(profile, CLUSTER)
    ends = (len(profile.calls) - 1,)

    def found(degrees):
        return evaluator.estimate(Candidate(degrees, 2, "1f1b"), ends)

    one, other = found(Degrees(dp_replicate=16)), found(Degrees(dp_replicate=16, ep=4))
    assert other.peak_memory_bytes[0] < one.peak_memory_bytes[0]
    assert other.time["tensor_parallel"] > one.time["tensor_parallel"] == 0


def test_trees_reduce_between_nodes_however_few_ranks_a_node_has():
    one, two = Path.of(CLUSTER, 2, 8), Path.of(CLUSTER, 8, 1)
    assert one.tree_s == CLUSTER.links[1].latency_s
    assert two.tree_s == float("inf")


def test_ranks_that_divide_sequences_shard_the_state_where_no_replicas_do(profile):
    degrees = Degrees(cp=8)
    every = [(0, len(profile.calls))]
    alone = Stages(profile, CLUSTER, WEFT).holding(Degrees(), every).trainable
    assert Stages(profile, CLUSTER, WEFT).holding(degrees, every).trainable_shard == pytest.approx(alone / 8, rel=0.01)
    copies = Stages(profile, CLUSTER, replace(WEFT, context_shards=False))
    assert copies.holding(degrees, every).trainable_shard == alone
    assert (copies.mesh(degrees).ranks("dp_shard"), copies.mesh(degrees).ranks("dp_replicate")) == (1, 8)
