"""A stage's forward is over with its last call, unless what comes after leaves something behind."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import workloads
from test_averaging import verified
from test_equality import plan_for
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import weft
from weft.runtime.pool import Pool

REACHED = itertools.count()
HISTORY: list[int] = []
DEEP = {"all": [{"times": 0}]}


def counting(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch[0])
    next(REACHED)  # a counter that nobody can look into
    return F.mse_loss(out, batch[1])


def appending(model: nn.Module, batch: Any) -> Tensor:
    loss = counting(model, batch)
    HISTORY.append(0)
    return loss


def counting_deep(model: nn.Module, batch: Any) -> Tensor:
    loss = counting(model, batch)
    DEEP["all"][0]["times"] += 1
    return loss


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.leave = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.leave(x)


class Counter(Chain):
    """Says at the end of a forward what the next one does first."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x / (1 + self.times % 3))
        self.times += 1
        return out


class ClassCounter(Chain):
    """Counts in its class."""

    times = 0

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        type(self).times += 1
        return out


class Buffered(Chain):
    """Counts in a buffer, at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("times", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x / (1 + self.times))
        self.times += 1
        return out


class Checkpointed(Chain):
    """Computes every layer again in the backward, by the user's own hand."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(checkpoint(layer, x, use_reentrant=False))
        return self.leave(x)


def chain(model: type[nn.Module] = Chain, loss: Callable[..., Tensor] = counting) -> weft.Workload:
    units = [*(f"layers.{i}" for i in range(4)), "leave"]
    return dataclasses.replace(workloads.mlp(), model=model, loss=loss, units=units)


def forwards(build: Callable[[], weft.Workload], plan: weft.Plan) -> int:
    """How often this rank came to the end of the loss in 5 steps."""
    engine = weft.parallelize(build(), plan)
    batch = build().sample_batch(8)
    before = next(REACHED)
    for _ in range(5):
        engine.step(batch)
    return next(REACHED) - before - 1


@pytest.mark.parametrize("degrees", [{"pp": 2}, {"pp": 2, "dp_shard": 2}], ids=["pp", "pp-dp_shard"])
def test_only_the_last_stage_goes_on_to_the_loss(pool: Pool, degrees: dict[str, int]) -> None:
    plan = plan_for(chain(), degrees, microbatches=2)
    reached = pool.run(forwards, chain, plan, ranks=plan.devices)
    each = plan.devices // 2
    assert reached == [1] * each + [10] * each  # the first forward of all shows that it leaves nothing


@pytest.mark.parametrize(
    "build",
    [
        lambda: chain(Counter),
        lambda: chain(ClassCounter),
        lambda: chain(Buffered),
        lambda: chain(loss=appending),
        lambda: chain(loss=counting_deep),
    ],
    ids=["attribute", "class", "buffer", "list", "deep"],
)
def test_what_a_forward_leaves_behind_is_left_on_all_stages(pool: Pool, build: Callable[[], weft.Workload]) -> None:
    plan = plan_for(build(), {"pp": 2})
    assert pool.run(forwards, build, plan, ranks=2) == [5, 5]


@pytest.mark.parametrize(
    "build", [chain, lambda: chain(Counter), lambda: chain(Buffered)], ids=["", "attribute", "buffer"]
)
@pytest.mark.parametrize("degrees", [{"pp": 2}, {"pp": 3}, {"pp": 2, "dp_shard": 2}], ids=["pp2", "pp3", "pp2-shard2"])
def test_equals_one_device(pool: Pool, build: Callable[[], weft.Workload], degrees: dict[str, int]) -> None:
    result = verified(pool, build, degrees, steps=4)
    assert result.ok, result


def test_equals_one_device_where_the_user_checkpoints_every_layer(pool: Pool) -> None:
    for degrees in ({"pp": 2}, {"pp": 3}):
        result = verified(pool, lambda: chain(Checkpointed), degrees, steps=4, microbatches=2)
        assert result.ok, result
