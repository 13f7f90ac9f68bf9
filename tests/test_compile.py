"""Compiled units: the same gradients, one compilation for repeated blocks, and a way on where it fails."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
import workloads
from test_equality import plan_for
from torch import Tensor, nn

import weft
from weft.engines import parallelize
from weft.jobs.noise import REACH, rounding
from weft.plan import Plan
from weft.runtime.compiled import Compiled
from weft.runtime.pool import Pool


class Block(nn.Module):
    """Little to compile, and a draw."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.drop = nn.LayerNorm(12), nn.Linear(12, 12), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.tanh(self.linear(self.norm(x))))


class Stubborn(nn.Module):
    """A block that no compiler takes: see ``failing``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.linear(x))


class Net(nn.Module):
    def __init__(self, block: type[nn.Module], layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.head = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def work(block: type[nn.Module] = Block, layers: int = 6) -> weft.Workload:
    return dataclasses.replace(workloads.mlp(), model=lambda: Net(block, layers))


@pytest.fixture(scope="module")
def patient() -> Any:
    """Processes with time to compile."""
    with Pool(2, device="cpu", timeout_s=280) as processes:
        yield processes


def compare(plan: Plan) -> Any:
    """Largest relative difference of a gradient between compiled and eager, and graphs compiled, inside a job."""
    from torch._dynamo.utils import counters

    counters.clear()
    found = []
    for compile in (True, False):
        engine = parallelize(work(), dataclasses.replace(plan, compile=compile))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            for _, batch in zip(range(2), engine.batches(), strict=False):
                engine.step(batch)
        assert not [w for w in caught if "uncompiled" in str(w.message)]
        found.append(engine.gradients())
    ours, theirs = found
    worst = max((float((ours[n] - g).norm() / g.norm()) for n, g in theirs.items()), default=0.0)
    return worst, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("degrees", "recompute", "precision"),
    [
        ({"pp": 2}, "full", "float32"),
        ({"dp_shard": 2}, None, "bf16"),
        ({"dp_shard": 2}, None, "float32"),
        ({"dp_replicate": 2}, "selective", "float32"),
    ],
    ids=["pp2-full", "dp_shard2-bf16", "dp_shard2", "dp_replicate2-selective"],
)
def test_gradients_are_those_of_the_eager_units(
    patient: Pool, degrees: dict[str, int], recompute: str | None, precision: str
) -> None:
    plan = plan_for(work(), degrees, microbatches=2, recompute=recompute)
    plan = dataclasses.replace(plan, precision=precision)
    for worst, graphs in patient.run(compare, plan):
        # In bf16 compiled code rounds less often than eager code: that is noise, and counts as it does for plans.
        assert worst <= (1e-5 if precision == "float32" else 2 * REACH * rounding(precision))
        # Six blocks and a head; the first block's input needs no gradient, which is a graph of its own.
        assert graphs <= 4


def test_blocks_share_what_was_compiled() -> None:
    model, shared = Net(Block, 5), {}
    made = [Compiled(f"blocks.{i}", block, shared) for i, block in enumerate(model.blocks)]
    assert len(shared) == 1
    assert len({id(unit._shared) for unit in made}) == 1


def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the compiler fail as its back end does."""
    from torch._dynamo.exc import BackendCompilerFailed

    def compiled(function: Any, **options: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            raise BackendCompilerFailed(failing, RuntimeError("no such instruction\nmore of it"), None)

        return run

    monkeypatch.setattr(torch, "compile", compiled)


def test_what_does_not_compile_runs_as_it_is_after_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch)
    model, shared = Net(Stubborn, 3), {}
    units = [Compiled(f"blocks.{i}", block, shared) for i, block in enumerate(model.blocks)]
    x = torch.randn(2, 12)
    with pytest.warns(
        RuntimeWarning, match=r"blocks\.0 and units like it run uncompiled: .*BackendCompilerFailed: .*"
    ) as told:
        results = [unit(x) for unit in units for _ in range(2)]
    assert len(told) == 1
    assert torch.equal(results[0], model.blocks[0](x))


def test_errors_of_the_model_stay_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    unit = Compiled("head", nn.Linear(12, 1), {})
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        unit(torch.randn(2, 5))


def test_what_weft_put_inside_a_unit_is_not_compiled() -> None:
    block = Block()
    inside = Compiled("a", nn.Linear(12, 12), {}).__call__  # any function of weft's own
    block.linear.forward = inside
    Compiled("blocks.0", block, {})
    assert block.linear.forward is not inside
    assert block.linear.forward._torchdynamo_disable
    assert torch.equal(block.linear.forward(torch.ones(1, 12)), inside(torch.ones(1, 12)))
