"""What tensor parallelism divides: what the search finds, that it refuses what is not exact, and that plans equal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import tensor_models
import torch
import torch.nn.functional as F
import workloads
from capture_models import CASES, Case, llama
from test_equality import plan_for
from torch import Tensor, nn

import weft
from weft.capture import capture
from weft.capture.groups import Group
from weft.capture.initial import build_fake
from weft.capture.recorder import record
from weft.capture.sharding import Divided, RefusedError, reshaped
from weft.capture.tensor import tensor_groups
from weft.capture.units import find_units
from weft.jobs.verify import verify_here
from weft.plan import TensorStyle
from weft.runtime.pool import Pool


def names(group: Any) -> dict[str, str]:
    """Names of modules and of their styles."""
    return {name: style.name for name, style in group.styles.items()}


def groups_of(case: Case) -> tuple[list[Group], dict[str, str]]:
    fake = build_fake(case.model, 0)
    recording = record(fake.model, find_units(fake.model), case.loss, case.batch(2))
    groups, refused = tensor_groups(recording, fake.model)
    return groups, dict(refused)


def pairs_of(case: Case) -> tuple[list[Group], dict[str, str]]:
    """Groups of more than one module."""
    groups, refused = groups_of(case)
    return [
        group for group in groups if not {"rowwise", "rowwise_transposed"}.isdisjoint(names(group).values())
    ], refused


TIED = Case(lambda: llama(tie_word_embeddings=True), CASES["llama"].loss, CASES["llama"].batch)


def test_what_is_divided_in_the_example() -> None:
    groups, refused = pairs_of(CASES["example"])
    first, second = groups[:2]
    assert len(groups) == 6
    assert names(first) == {
        "blocks.0.attention.query": "colwise",
        "blocks.0.attention.key": "colwise",
        "blocks.0.attention.value": "colwise",
        "blocks.0.attention.out": "rowwise",
    }
    assert first.sizes == (("heads", 2), ("features", 16))
    assert first.dims["blocks.0.attention.out.weight"] == 1
    assert first.dims["blocks.0.attention.query.bias"] == 0
    assert "blocks.0.attention.out.bias" not in first.dims
    assert names(second) == {"blocks.0.mlp.0": "colwise", "blocks.0.mlp.2": "rowwise"}
    activation = 2 * 12 * 16 * 4
    assert (second.forward_bytes, second.backward_bytes) == (activation, activation)
    assert (first.forward_bytes, first.backward_bytes) == (activation, activation)
    assert groups[-1].unit == "blocks.2"
    assert refused == {}
    paired = {name for group in groups for name in group.styles}
    whole = [group for group in groups_of(CASES["example"])[0] if paired.isdisjoint(group.styles)]
    assert {name: style for group in whole for name, style in names(group).items()} == {
        "token": "embedding_rowwise",
        "position": "embedding_rowwise",
        "head": "colwise_gather",
    }
    assert all(not group.sizes and group.uneven for group in whole)


def test_shared_heads_and_vocabulary() -> None:
    groups, _ = groups_of(CASES["llama"])
    attention = next(g for g in groups if "model.layers.1.self_attn.q_proj" in g.styles)
    assert attention.sizes[:2] == (("heads", 4), ("key/value heads", 2))
    styles = {name: style for group in groups for name, style in names(group).items()}
    assert styles["lm_head"] == "colwise_gather"
    assert styles["model.embed_tokens"] == "embedding_rowwise"
    assert styles["model.layers.2.mlp.down_proj"] == "rowwise"


def test_fused_transposed_weights_and_the_number_that_splits_them() -> None:
    groups, _ = groups_of(CASES["gpt2"])
    styles = {name: style for group in groups for name, style in group.styles.items()}
    assert {n: s for n, s in styles.items() if n.startswith("transformer.h.1.attn")} == {
        "transformer.h.1.attn.c_attn": TensorStyle("colwise_transposed", parts=(16, 16, 16)),
        "transformer.h.1.attn.c_proj": TensorStyle("rowwise_transposed"),
        "transformer.h.1.attn.split_size": TensorStyle("share"),
    }
    dims = {name: dim for group in groups for name, dim in group.dims.items()}
    assert dims["transformer.h.0.attn.c_attn.weight"] == 1
    assert dims["transformer.h.0.mlp.c_proj.weight"] == 0
    assert styles["transformer.wte"] == TensorStyle("embedding_rowwise")


def test_a_plan_written_by_hand_is_found() -> None:
    """Fused grouped heads, their counts in numbers, a norm of each head, fused experts, a tied odd vocabulary."""
    workload = tensor_models.language()
    fake = build_fake(workload.model, 0)
    recording = record(fake.model, find_units(fake.model), workload.loss, workload.sample_batch(2))
    groups, _ = tensor_groups(recording, fake.model)
    assert {name: style for group in groups for name, style in group.styles.items()} == tensor_models.LANGUAGE


def test_experts_of_a_mixture() -> None:
    groups, refused = groups_of(CASES["mixtral"])
    experts = next(group for group in groups if "model.layers.0.mlp.experts" in group.styles)
    assert experts.styles == {
        "model.layers.0.mlp.experts": TensorStyle("reduce"),
        "model.layers.0.mlp.experts.gate_up_proj": TensorStyle("shard", parts=(24, 24), dim=1),
        "model.layers.0.mlp.experts.down_proj": TensorStyle("shard", dim=2),
    }
    assert experts.sizes == (("features", 24),)
    assert "model.layers.0.mlp.gate" in refused


def test_single_projections_are_gathered_where_nothing_else_can_be_divided() -> None:
    groups, _ = groups_of(CASES["mlp"])
    assert [names(group) for group in groups] == [{name: "colwise_gather"} for name in ("0", "2")]


class Block(nn.Module):
    """Two projections, with whatever a subclass does between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.ones(16))
        self.gate = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.between(self.up(x), x))

    def between(self, y: Tensor, x: Tensor) -> Tensor:
        return y.relu()


class Constant(Block):
    def between(self, y: Tensor, x: Tensor) -> Tensor:
        return y.view(-1, 4, 4).transpose(1, 2).transpose(1, 2).reshape(-1, 16)


class Mean(Block):
    """Runs on shares, and computes another number."""

    def between(self, y: Tensor, x: Tensor) -> Tensor:
        return y / y.shape[-1] ** 0.5


class Sized(Block):
    """Does something else on fewer features."""

    def between(self, y: Tensor, x: Tensor) -> Tensor:
        return y.relu() if y.shape[-1] > 8 else y.sigmoid()


class Noisy(Block):
    def between(self, y: Tensor, x: Tensor) -> Tensor:
        return y * torch.rand_like(y)


class Normed(Block):
    def between(self, y: Tensor, x: Tensor) -> Tensor:
        return y / y.mean(-1, keepdim=True)


class Gated(Block):
    def between(self, y: Tensor, x: Tensor) -> Tensor:
        return y * self.gate(x)


class Dropped(Block):
    def between(self, y: Tensor, x: Tensor) -> Tensor:
        return nn.functional.dropout(y, 0.5)


class Functional(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.linear(x, self.up.weight, self.up.bias))


class Reversed(Block):
    def between(self, y: Tensor, x: Tensor) -> Tensor:
        return y.flip(-1)


@pytest.mark.parametrize(
    "block", [Constant, Mean, Sized, Noisy, Normed, Gated, Dropped, Functional, Reversed], ids=lambda b: b.__name__
)
def test_what_is_not_exact_is_no_pair(block: type[Block]) -> None:
    case = CASES["mlp"]
    plain, _ = pairs_of(case._replace(model=lambda: nn.Sequential(Block(), Block())))
    assert names(plain[0]) == {"0.up": "colwise", "0.down": "rowwise"}
    groups, _ = groups_of(case._replace(model=lambda: nn.Sequential(block(), block())))
    styles = {name: style for group in groups for name, style in names(group).items()}
    singles = {"0.up": "colwise_gather", "0.down": "colwise_gather"}
    expected = {"0.down": "colwise_gather"} if block is Functional else singles
    assert {name: style for name, style in styles.items() if name.startswith("0.")} == expected


class Opened(nn.Module):
    """Multiplies by two weights of its own; ``end`` is what it does with the result."""

    def __init__(self, end: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.enter, self.leave = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(16, 8))
        self.end = end

    def forward(self, x: Tensor) -> Any:
        return self.end((x @ self.enter).relu() @ self.leave, x)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda y, x: y + x, "aten.add adds a whole value to one whose sum is not made yet"),
        (lambda y, x: y.tanh(), "aten.tanh works on a value whose sum is not made yet"),
        (lambda y, x: y + 1.0, "aten.add works on a value whose sum is not made yet"),
        (lambda y, x: y * y, "aten.mul works on a value whose sum is not made yet"),
        (lambda y, x: 1.0 / y, "aten.reciprocal works on a value whose sum is not made yet"),
    ],
    ids=["whole addend", "nonlinear", "constant", "square", "reciprocal"],
)
def test_partial_values_meet_linear_operations_only(end: Callable[[Tensor, Tensor], Any], reason: str) -> None:
    class Whole(nn.Module):
        def __init__(self, end: Callable[[Tensor, Tensor], Any]) -> None:
            super().__init__()
            self.inner = Opened(end)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    case = CASES["mlp"]
    linear, _ = groups_of(case._replace(model=lambda: nn.Sequential(Whole(lambda y, x: 2 * y.view(-1, 2, 4)), Flat())))
    assert names(linear[0]) == {"0.inner": "reduce", "0.inner.enter": "shard", "0.inner.leave": "shard"}
    groups, refused = groups_of(case._replace(model=lambda: nn.Sequential(Whole(end), Flat())))
    assert all("0.inner" not in group.styles for group in groups)
    assert reason in refused["0.inner"]


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.flatten(1))


def test_weights_shared_with_a_whole_module_stay_whole() -> None:
    class Other(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight.t()).softmax(-1)

    def tied() -> nn.Module:
        first = Block()
        return nn.Sequential(first, Block(), Other(first.up.weight))

    groups, refused = pairs_of(CASES["mlp"]._replace(model=tied))
    assert [group.unit for group in groups] == ["1"]
    assert "shared with a module that is not divided alike" in refused["0.up"]


def test_weights_shared_with_a_module_divided_alike_are_divided_at_the_same_degrees() -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(Block(), Block(), nn.Linear(8, 16))
        model[2].weight = model[0].up.weight
        return model

    groups, _ = groups_of(CASES["mlp"]._replace(model=tied))
    first, last = groups[0], groups[-1]
    assert names(first) == {"0.up": "colwise", "0.down": "rowwise"}
    assert names(last) == {"2": "colwise_gather"}
    assert first.sizes == last.sizes == (("features", 16),)
    assert first.uneven == last.uneven == (16,)


@pytest.mark.parametrize(
    ("before", "divided", "after", "expected"),
    [
        ((2, 6, 32), (2, 1), (2, 6, 4, 8), (2, 1)),
        ((2, 6, 4, 8), (2, 1), (2, 6, 32), (2, 1)),
        ((2, 4, 6, 8), (1, 1), (8, 6, 8), (0, 2)),
        ((8, 6, 8), (0, 2), (2, 4, 6, 8), (1, 1)),
        ((12, 32), (1, 1), (2, 6, 1, 32), (3, 1)),
        ((2, 2, 3, 5), (1, 1), (2, 6, 5), (1, 1)),
        ((2, 6, 5), (1, 3), (2, 3, 2, 5), (2, 1)),
        ((6, 4), (1, 1), (3, 8), (1, 2)),
        ((6, 4), (1, 1), (8, 3), None),
    ],
)
def test_reshapes_carry_a_divided_dimension(
    before: tuple[int, ...], divided: tuple[int, int], after: tuple[int, ...], expected: tuple[int, int] | None
) -> None:
    """A share of the reshaped tensor is the reshape of the share, for every way to say it with two ranks."""
    dim, repeats = divided
    state = Divided(dim, (before[dim] // repeats,) * repeats)
    if expected is None:
        with pytest.raises(RefusedError, match="unevenly"):
            reshaped(before, state, after)
        return
    result = reshaped(before, state, after)
    assert (result.dim, len(result.stretches)) == expected
    if all(n % 2 == 0 for n in (*state.stretches, *result.stretches)):
        whole = torch.arange(torch.Size(before).numel()).reshape(before)
        local = list(after)
        local[result.dim] //= 2
        assert torch.equal(share(whole, state).reshape(local), share(whole.reshape(after), result))


def share(whole: Tensor, state: Divided) -> Tensor:
    """The first of two ranks' share."""
    stretches = whole.split(list(state.stretches), state.dim)
    return torch.cat([x.narrow(state.dim, 0, x.shape[state.dim] // 2) for x in stretches], state.dim)


def test_reshapes_carry_uneven_stretches() -> None:
    state = Divided(2, (32, 16, 16))
    heads = reshaped((2, 6, 64), state, (2, 6, 16, 4))
    assert heads.place == (2, (8, 4, 4))
    whole = torch.arange(2 * 6 * 64).reshape(2, 6, 64)
    assert torch.equal(share(whole, state).reshape(2, 6, 8, 4), share(whole.reshape(2, 6, 16, 4), heads))
    assert reshaped((2, 6, 16, 4), heads, (2, 6, 64)) == state
    assert reshaped((2, 48), Divided(1, (16, 16, 16)), (2, 3, 4, 4)).place == (2, (4,))


class Table(nn.Module):
    """Attention with a bias of every head, looked up in a table; heads and width are numbers."""

    def __init__(self, width: int = 16, heads: int = 4, tokens: int = 6) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn(2 * tokens - 1, heads))
        self.norm = nn.LayerNorm(width // heads)
        self.heads, self.width = heads, width
        self.register_buffer("index", torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :] + tokens - 1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = self.norm(q) @ self.norm(k).transpose(-1, -2) * (self.width // 4) ** -0.5
        bias = self.table[self.index.view(-1)].view(t, t, -1).permute(2, 0, 1).unsqueeze(0)
        y = (scores + bias).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).reshape(b, t, -1))


class Patches(nn.Module):
    """Convolutions, a transposed one, an odd width, dropout between projections, a tower nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv1d(2, 16, 1)
        self.up = nn.ConvTranspose1d(16, 9, 1)
        self.join = nn.Linear(9, 16)
        self.blocks = nn.ModuleList(Table() for _ in range(2))
        self.idle = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16))
        self.end = nn.Sequential(nn.Linear(16, 24), nn.Dropout(0.5), nn.Linear(24, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.cut(x.view(-1, 2, 6)).tanh()).transpose(1, 2)
        x = self.join(x)
        for block in self.blocks:
            x = block(x)
        return self.end(x.mean(1))


def patches() -> weft.Workload:
    return weft.Workload(
        model=Patches,
        loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        data=workloads.Points(64, 12),
        optimizer=workloads.adamw,
        batch_size=8,
    )


def test_a_table_of_heads_and_what_stands_alone() -> None:
    profile = capture(patches())
    styles = {name: str(style) for group in profile.tensor_groups for name, style in group.styles}
    assert {name: style for name, style in styles.items() if name.startswith("blocks.1")} == {
        "blocks.1.qkv": "colwise in parts of 16, 16, 16",
        "blocks.1.out": "rowwise",
        "blocks.1.table": "shard on dimension 1",
        "blocks.1.norm.weight": "sum_gradient",
        "blocks.1.norm.bias": "sum_gradient",
        "blocks.1.heads": "share",
    }
    alone = ("cut", "up", "join", "idle.0", "idle.1", "end.0")
    assert {name: styles[name] for name in alone} == dict.fromkeys(alone, "colwise_gather")
    assert profile.divided_share(2) == pytest.approx(0.96, abs=0.01)


@pytest.mark.parametrize("build", [tensor_models.language, patches], ids=["language", "patches"])
@pytest.mark.parametrize("degrees", [{"tp": 2}, {"tp": 4}, {"pp": 2, "tp": 2}], ids=str)
@pytest.mark.matrix
def test_what_is_found_equals_one_device(
    pool: Pool, build: Callable[[], weft.Workload], degrees: dict[str, int]
) -> None:
    plan = plan_for(build(), degrees, microbatches=2)
    assert plan.tensor

    def job() -> Any:
        return verify_here(build(), plan, steps=2, dtype="float64")

    result = pool.run(job, ranks=math.prod(degrees.values()))[0]
    assert result.ok, result


class Standardized(nn.Conv1d):
    """Standardizes its weight by output channel, whose number it keeps: on shares it would mix halves of channels."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv1d(x, weight.reshape_as(self.weight), self.bias)


def test_the_inside_of_a_module_with_code_of_its_own_is_compared() -> None:
    def pictures(samples: int) -> dict[str, Tensor]:
        return {"x": torch.rand(samples, 8, 4), "y": torch.zeros(samples)}

    case = Case(lambda: nn.Sequential(Standardized(8, 12, 1), nn.Conv1d(12, 9, 1)), CASES["mlp"].loss, pictures)
    groups, _ = groups_of(case)
    assert [(names(g), g.sizes, g.uneven) for g in groups] == [
        ({"0": "colwise_gather", "0.out_channels": "share"}, (("outputs", 12),), ()),
        ({"1": "colwise_gather"}, (), (9,)),
    ]


class Gauged(Block):
    """Multiplies the features between by a number that other modules have, too."""

    def __init__(self, gauge: nn.Parameter) -> None:
        super().__init__()
        self.gauge = gauge

    def between(self, y: Tensor, x: Tensor) -> Tensor:
        return y * self.gauge


class Whole(nn.Module):
    def __init__(self, gauge: nn.Parameter) -> None:
        super().__init__()
        self.gauge = gauge

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gauge


def test_a_gradient_is_summed_if_all_of_it_is_partial() -> None:
    def model(last: type[nn.Module]) -> nn.Module:
        gauge = nn.Parameter(torch.ones(1))
        return nn.Sequential(Gauged(gauge), Gauged(gauge), last(gauge))

    groups, _ = pairs_of(CASES["mlp"]._replace(model=lambda: model(Gauged)))
    assert [group.styles[f"{group.unit}.gauge"].name for group in groups] == ["sum_gradient"] * 3
    groups, refused = pairs_of(CASES["mlp"]._replace(model=lambda: model(Whole)))
    assert not groups
    assert "0.gauge is shared with" in refused["0.up"]
