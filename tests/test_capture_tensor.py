import copy
import threading
from typing import Any

import pytest
import torch
from capture_models import CASES, Case, llama
from torch import Tensor, nn

from weft.capture.groups import Group
from weft.capture.initial import build_fake
from weft.capture.recorder import record
from weft.capture.sharding import Divided, RefusedError, _reshaped
from weft.capture.tensor import tensor_groups
from weft.capture.units import find_units


def names(group: Any) -> dict[str, str]:
    """Names of modules and of their styles."""
    return {name: style.name for name, style in group.styles.items()}


def groups_of(case: Case) -> tuple[list[Group], dict[str, str]]:
    fake = build_fake(case.model, 0)
    recording = record(fake.model, find_units(fake.model), case.loss, case.batch(2))
    groups, refused = tensor_groups(recording, fake.model)
    return groups, dict(refused)


class Team:
    """Ranks as threads: each runs the model with its shares of the groups' features; rows add up what all have."""

    def __init__(self, model: nn.Module, groups: list[Group], degree: int) -> None:
        self.barrier = threading.Barrier(degree, timeout=30)
        self.parts: list[Any] = [None] * degree
        self.models = [copy.deepcopy(model) for _ in range(degree)]
        for rank, mine in enumerate(self.models):
            for group in groups:
                for name, style in group.styles.items():
                    self.divide(mine.get_submodule(name), style.name, rank, degree)

    def all_gather(self, rank: int, value: Tensor) -> list[Tensor]:
        self.parts[rank] = value
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        return parts

    def divide(self, module: nn.Module, style: str, rank: int, degree: int) -> None:
        weight = module.weight if style.endswith("_transposed") else module.weight.t()  # [in, out]
        bias = getattr(module, "bias", None)

        def column(x: Tensor) -> Tensor:
            out = x @ weight.chunk(degree, 1)[rank]
            return out if bias is None else out + bias.chunk(degree)[rank]

        def row(x: Tensor) -> Tensor:
            out = sum(self.all_gather(rank, x @ weight.chunk(degree, 0)[rank]))
            return out if bias is None else out + bias

        def gathered(x: Tensor) -> Tensor:
            return torch.cat(self.all_gather(rank, column(x)), -1)

        def rows_of_table(x: Tensor) -> Tensor:
            table = module.weight.chunk(degree)[rank]
            local = x - rank * len(table)
            mine = (local >= 0) & (local < len(table))
            return sum(self.all_gather(rank, table[local * mine] * mine[..., None]))

        run = {"colwise": column, "rowwise": row, "colwise_gather": gathered, "embedding_rowwise": rows_of_table}
        module.forward = run[style.removesuffix("_transposed")]

    def losses(self, case: Case) -> list[Tensor]:
        results: list[Any] = [None] * len(self.models)

        def run(rank: int) -> None:
            with torch.no_grad():
                loss = case.loss(self.models[rank], case.batch(2))
            results[rank] = loss[0] if isinstance(loss, tuple) else loss

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(self.models))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


TIED = Case(lambda: llama(tie_word_embeddings=True), CASES["llama"].loss, CASES["llama"].batch)


EXACT = ("example", "llama, mask", "llama, tied", "gpt2", "gemma2", "vit", "mixtral", "mlp", "bert")


@pytest.mark.parametrize("name", EXACT)
def test_groups_are_exact(name: str) -> None:
    case = TIED if name == "llama, tied" else CASES[name]
    groups, _ = groups_of(case)
    assert groups
    assert all(size % 2 == 0 for group in groups for _, size in group.sizes)
    torch.manual_seed(0)
    # The CPU has no grouped product of float64.
    dtype, tolerance = (torch.float32, 1e-5) if name == "mixtral" else (torch.float64, 1e-12)
    model = case.model().to(dtype)
    batch = {key: x.to(dtype) if x.is_floating_point() else x for key, x in case.batch(2).items()}
    case = case._replace(batch=lambda samples: batch)
    with torch.no_grad():
        loss = case.loss(model, batch)
    expected = loss[0] if isinstance(loss, tuple) else loss
    for result in Team(model, groups, 2).losses(case):
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=0)


def test_what_is_divided_in_the_example() -> None:
    groups, refused = groups_of(CASES["example"])
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
    assert refused == {"head": "its features leave the unit"}


def test_shared_heads_and_the_models_own_plan() -> None:
    groups, _ = groups_of(CASES["llama"])
    attention = next(g for g in groups if "model.layers.1.self_attn.q_proj" in g.styles)
    assert attention.sizes[:2] == (("heads", 4), ("key/value heads", 2))
    styles = {name: style for group in groups for name, style in names(group).items()}
    assert styles["lm_head"] == "colwise_gather"
    assert styles["model.embed_tokens"] == "embedding_rowwise"
    assert styles["model.layers.2.mlp.down_proj"] == "rowwise"


def test_transposed_weights() -> None:
    groups, refused = groups_of(CASES["gpt2"])
    assert names(groups[0]) == {
        "transformer.h.0.mlp.c_fc": "colwise_transposed",
        "transformer.h.0.mlp.c_proj": "rowwise_transposed",
    }
    assert groups[0].dims == {
        "transformer.h.0.mlp.c_fc.weight": 1,
        "transformer.h.0.mlp.c_fc.bias": 0,
        "transformer.h.0.mlp.c_proj.weight": 0,
    }
    assert "several projections are fused into one" in refused["transformer.h.0.attn.c_attn"]


def test_single_projections_are_gathered_where_nothing_else_can_be_divided() -> None:
    groups, _ = groups_of(CASES["mlp"])
    assert [names(group) for group in groups] == [{name: "colwise_gather"} for name in ("0", "2", "4")]


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


class Normed(Block):
    def between(self, y: Tensor, x: Tensor) -> Tensor:
        return y / y.mean(-1, keepdim=True)


class Scaled(Block):
    def between(self, y: Tensor, x: Tensor) -> Tensor:
        return y * self.scale


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
    ("block", "reason"),
    [
        (Constant, "does not run on 1/2 of the features"),
        (Normed, "runs over the divided dimension"),
        (Scaled, "whose gradient would be partial"),
        (Gated, "whose gradient would be partial"),
        (Dropped, "draws random numbers"),
        (Functional, "does not run on 1/2 of the features"),
        (Reversed, "not known to be exact"),
    ],
)
def test_what_is_not_exact_is_refused(block: type[Block], reason: str) -> None:
    case = CASES["mlp"]
    plain, _ = groups_of(case._replace(model=lambda: nn.Sequential(Block(), Block())))
    assert names(plain[0]) == {"0.up": "colwise", "0.down": "rowwise"}
    groups, refused = groups_of(case._replace(model=lambda: nn.Sequential(block(), block())))
    assert not groups
    assert reason in refused["0.up"]


def test_weights_shared_with_a_whole_module_stay_whole() -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(Block(), Block(), nn.Linear(8, 16))
        model[2].weight = model[0].up.weight
        return model

    groups, refused = groups_of(CASES["mlp"]._replace(model=tied))
    assert [group.unit for group in groups] == ["1"]
    assert "shared with a module that is not divided alike" in refused["0.up"]


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
    state = Divided(*divided, frozenset())
    if expected is None:
        with pytest.raises(RefusedError, match="unevenly"):
            _reshaped(before, state, after)
        return
    result = _reshaped(before, state, after)
    assert result[:2] == expected
    if before[state.dim] // state.outer % 2 == 0 and after[result.dim] // result.outer % 2 == 0:
        whole = torch.arange(torch.Size(before).numel()).reshape(before)
        local = list(after)
        local[result.dim] //= 2
        assert torch.equal(share(whole, state).reshape(local), share(whole.reshape(after), result))


def share(whole: Tensor, state: Divided) -> Tensor:
    """The first of two ranks' share."""
    stretches = whole.unflatten(state.dim, (state.outer, -1))
    return stretches.narrow(state.dim + 1, 0, stretches.shape[state.dim + 1] // 2).flatten(state.dim, state.dim + 1)
