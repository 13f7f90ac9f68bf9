"""Tensor parallelism from plans written by hand: every style equals one device, pieces come together again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensor_models as models
import torch
import workloads
from test_equality import name_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import weft
from weft.capture.initial import build_fake
from weft.capture.recorder import record
from weft.capture.units import find_units
from weft.errors import CheckpointError, PlanError
from weft.jobs.verify import Verification, verify_here
from weft.plan import Plan, TensorStyle
from weft.runtime.division import Division
from weft.runtime.pieces import boxes
from weft.runtime.pool import Pool


def plan_of(workload: weft.Workload, tensor: models.Styles, **degrees: int) -> Plan:
    fake = build_fake(workload.model, 0)
    units = find_units(fake.model, workload.units)
    recording = record(fake.model, units, workload.loss, workload.sample_batch(2), backward=False)
    calls = [call.name for call in recording.calls[:-1]]
    pp = degrees.get("pp", 1)
    cuts = [len(calls) * stage // pp for stage in range(pp + 1)]
    stages = tuple(tuple(calls[a:b]) for a, b in itertools.pairwise(cuts))
    return Plan(stages=stages, tensor=tensor, batch_size=workload.batch_size, microbatches=2, **degrees)


def verified(pool: Pool, build: Callable[[], weft.Workload], tensor: models.Styles, **degrees: int) -> Verification:
    plan = plan_of(build(), tensor, **degrees)

    def job() -> Any:
        return verify_here(build(), plan, steps=2, dtype="float64")

    return pool.run(job, ranks=plan.devices)[0]


HYBRIDS = [{"tp": 2}, {"tp": 2, "dp_shard": 2}, {"tp": 2, "dp_replicate": 2}, {"pp": 2, "tp": 2}, {"tp": 4}]


@pytest.mark.parametrize("degrees", HYBRIDS, ids=name_of)
def test_fused_heads_experts_and_an_odd_tied_vocabulary(pool: Pool, degrees: dict[str, int]) -> None:
    result = verified(pool, models.language, models.LANGUAGE, **degrees)
    assert result.ok, result
    if degrees["tp"] == 4:
        assert max(result.parameter_bytes) < 0.35 * sum(p.nbytes for p in models.Language().double().parameters())


@pytest.mark.parametrize("degrees", [{"dp_shard": 2}, {"dp_shard": 2, "dp_replicate": 2}, {"pp": 2, "dp_shard": 2}])
def test_three_experts_on_two_ranks_are_cut_evenly(pool: Pool, degrees: dict[str, int]) -> None:
    result = verified(pool, models.language, {}, **degrees)
    assert result.ok, result
    if "pp" not in degrees:
        assert max(result.parameter_bytes) < 0.52 * sum(p.nbytes for p in models.Language().double().parameters())


@pytest.mark.parametrize("degrees", HYBRIDS[:4], ids=name_of)
def test_convolutions_gathers_and_weights_stored_transposed(pool: Pool, degrees: dict[str, int]) -> None:
    result = verified(pool, models.picture, models.PICTURE, **degrees)
    assert result.ok, result


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"tp": 2, "dp_shard": 2}], ids=name_of)
def test_queries_keys_and_values_in_one_transposed_matrix(pool: Pool, degrees: dict[str, int]) -> None:
    result = verified(pool, workloads.gpt2, models.gpt2_styles(), **degrees)
    assert result.ok, result


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"tp": 2, "dp_shard": 2}], ids=name_of)
def test_low_rank_adapters_beside_frozen_projections(pool: Pool, degrees: dict[str, int]) -> None:
    result = verified(pool, models.lora, models.lora_styles(), **degrees)
    assert result.ok, result


@pytest.mark.parametrize("degrees", [{"tp": 4}, {"tp": 4, "dp_shard": 2}, {"tp": 4, "dp_replicate": 2}], ids=name_of)
def test_more_ranks_than_rows_or_channels(pool: Pool, degrees: dict[str, int]) -> None:
    for build, styles in ((lambda: models.language(vocabulary=5), models.LANGUAGE), (models.picture, models.PICTURE)):
        result = verified(pool, build, styles, **degrees)
        assert result.ok, result


def test_recomputing_inside_the_model(pool: Pool) -> None:
    result = verified(pool, lambda: models.language(scaled=False, recompute=True), models.LANGUAGE, tp=2)
    assert result.ok, result


def test_the_test_can_fail(pool: Pool) -> None:
    """A gradient that should be summed over the ranks and is not, stretches divided as if they were one."""
    forgotten = {k: v for k, v in models.LANGUAGE.items() if k != "blocks.1.attention.norm"}
    result = verified(pool, models.language, forgotten, tp=2)
    assert result.gradient_error > 1e-3
    assert result.worst_gradient == "blocks.1.attention.norm"
    assert result.loss_error < 1e-3
    fused = {**models.LANGUAGE, "blocks.0.attention.fused": TensorStyle("colwise")}
    assert verified(pool, models.language, fused, tp=2).loss_error > 1e-6


def test_the_gradient_of_a_shared_input_is_summed_once(pool: Pool) -> None:
    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += str(func) == "_c10d_functional.all_reduce.default"
            return func(*args, **(kwargs or {}))

    layers = {
        f"model.layers.{i}.{name}": TensorStyle(style)
        for i in range(4)
        for style, names in {
            "colwise": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"],
            "rowwise": ["self_attn.o_proj", "mlp.down_proj"],
        }.items()
        for name in names
    }
    plan = dataclasses.replace(plan_of(workloads.llama(), layers, tp=2), microbatches=3)

    def job() -> tuple[int, list[Any]]:
        engine = weft.parallelize(workloads.llama(), plan)
        batches = engine.batches()
        with Counting() as counting:
            engine.step(next(batches))
        return counting.count

    # each of 3 microbatches and 4 layers: two results that leave, two gradients of inputs that entered
    assert pool.run(job, ranks=2) == [3 * 4 * 4] * 2


MORE = [{"pp": 2}, {"dp_shard": 2}, {"pp": 1}, {"tp": 4}, {"tp": 2, "dp_shard": 2}]


@pytest.mark.parametrize("degrees", MORE, ids=name_of)
@pytest.mark.matrix
def test_a_checkpoint_goes_from_any_plan_to_any_plan(pool: Pool, tmp_path: Path, degrees: dict[str, int]) -> None:
    divided = plan_of(models.language(), models.LANGUAGE, tp=2)
    tensor = models.LANGUAGE if degrees.get("tp", 1) > 1 else {}
    other = plan_of(models.language(), tensor, **degrees)

    def steps(engine: weft.Engine, count: int) -> list[float]:
        batches = engine.batches(epochs=None)
        return [float(engine.step(next(batches))) for _ in range(count)]

    def whole(plan: Plan) -> Any:
        engine = weft.parallelize(models.language(), plan)
        return steps(engine, 6), engine.state_dict()

    def begin(plan: Plan, folder: Path) -> None:
        engine = weft.parallelize(models.language(), plan)
        steps(engine, 2)
        engine.save(folder)

    def go_on(plan: Plan, folder: Path, count: int) -> Any:
        engine = weft.parallelize(models.language(), plan)
        engine.load(folder)
        losses = steps(engine, count)
        engine.save(folder)
        return losses, engine.state_dict()

    expected, state = pool.run(whole, divided, ranks=2)[0]
    pool.run(begin, divided, tmp_path, ranks=2)
    there, _ = pool.run(go_on, other, tmp_path, 2, ranks=other.devices)[0]
    back, ours = pool.run(go_on, divided, tmp_path, 2, ranks=2)[0]
    assert there + back == pytest.approx(expected[2:], rel=1e-5)
    for name, tensor_ in state.items():
        torch.testing.assert_close(ours[name], tensor_, rtol=1e-3, atol=1e-5)


def test_optimizer_state_of_another_shape_is_refused(pool: Pool, tmp_path: Path) -> None:
    def factored() -> weft.Workload:
        return dataclasses.replace(
            models.picture(), optimizer=lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2)
        )

    plan = plan_of(factored(), models.PICTURE, tp=2)

    def job() -> None:
        engine = weft.parallelize(factored(), plan)
        engine.step(next(engine.batches()))
        engine.save(tmp_path)

    with pytest.raises(CheckpointError, match=r"keeps 'row_var' of shape .*; use an optimizer whose state"):
        pool.run(job, ranks=2)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("parts", [(12,), (4, 6, 2), (7, 5), (11, 1)])
@pytest.mark.parametrize("degree", [2, 3, 4])
def test_pieces_join_to_the_whole_and_boxes_cover_it(dim: int, parts: tuple[int, ...], degree: int) -> None:
    shape = [3, 3, 3]
    shape[dim] = 12
    whole = torch.arange(108.0).view(shape)
    every = [Division(dim, parts, rank, degree) for rank in range(degree)]
    pieces = [d.cut(whole) for d in every]
    assert torch.equal(every[0].join(pieces), whole)
    covered = torch.zeros_like(whole)
    for d, piece in zip(every, pieces, strict=True):
        assert d.whole(piece.shape) == whole.shape
        assert piece.shape[dim] == d.length()
        for box in boxes(piece, d):
            place = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.values.shape, strict=True))
            assert torch.equal(whole[place], box.values)
            covered[place] += 1
    assert torch.equal(covered, torch.ones_like(whole))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 1)
        self.b.weight = self.a.weight
        self.table = nn.Embedding(4, 4, max_norm=1.0)
        self.count, self.grouped, self.norm = 3, nn.Conv1d(4, 4, 1, groups=2), nn.LayerNorm((12, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)))


WRONG = {
    "the same tensor is divided once": (
        {"a": TensorStyle("colwise_gather")},
        r"divides a\.weight but leaves b\.weight",
    ),
    "and in two ways": (
        {"a": TensorStyle("colwise_gather"), "b": TensorStyle("rowwise")},
        r"a\.weight and b\.weight in different ways",
    ),
    "divided and summed": (
        {
            "a": TensorStyle("colwise_gather"),
            "b": TensorStyle("colwise_gather"),
            "b.weight": TensorStyle("sum_gradient"),
        },
        "sums the gradient of b.weight, the same tensor",
    ),
    "no such module": ({"d": TensorStyle("colwise")}, "'d', which this model does not have"),
    "no such parameter": ({"c.scale": TensorStyle("sum_gradient")}, "'c.scale', which is no parameter"),
    "no projection": ({"norm": TensorStyle("rowwise")}, "LayerNorm is no projection"),
    "no embedding": ({"c": TensorStyle("embedding_rowwise")}, "c as embedding_rowwise, but it is a Linear"),
    "a norm of rows": ({"table": TensorStyle("embedding_rowwise")}, "max_norm rules out"),
    "groups": ({"grouped": TensorStyle("colwise_gather")}, "a convolution in groups"),
    "an odd count": ({"count": TensorStyle("share")}, "number count, but 3 is not divisible by tp=2"),
    "no number": ({"a.weight": TensorStyle("share")}, r"divides the number a\.weight, but it is"),
    "an odd size": ({"c": TensorStyle("colwise")}, r"divides c\.weight, but 1 is not divisible by tp=2"),
    "wrong parts": ({"c": TensorStyle("rowwise", parts=(4, 4))}, "parts of 4, 4, which add to 8, but .* has 12"),
    "no such dimension": ({"c.weight": TensorStyle("shard", dim=2)}, r"divides dimension 2 of c\.weight, which has 2"),
    "a convolution is not transposed": (
        {"grouped": TensorStyle("colwise_transposed")},
        r"but its weight is \[out, in\]",
    ),
}


def test_what_cannot_be_divided_is_refused(pool: Pool) -> None:
    workload = dataclasses.replace(workloads.mlp(), model=Tied)
    plans = {name: plan_of(workload, styles, tp=2) for name, (styles, _) in WRONG.items()}

    def job() -> dict[str, str]:
        said = {}
        for name, plan in plans.items():
            try:
                weft.parallelize(workload, plan)
            except PlanError as error:
                said[name] = str(error)
        return said

    said = pool.run(job, ranks=2)[0]
    for name, (_, message) in WRONG.items():
        assert "\n" not in said.get(name, ""), name
        with pytest.raises(PlanError, match=message):
            raise PlanError(said.get(name, f"nothing for {name}"))


def test_a_style_is_no_word() -> None:
    with pytest.raises(PlanError, match=r"tensor\['up'\] must be a TensorStyle, got 'colwise'"):
        Plan(stages=(("up",),), tp=2, tensor={"up": "colwise"}, batch_size=2)  # type: ignore[dict-item]  # the point
