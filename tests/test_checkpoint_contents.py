"""What checkpoints keep of optimizers, schedulers and buffers of every kind, and what they refuse to take."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import workloads
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules

import weft
from weft.capture import capture
from weft.cluster import Cluster
from weft.errors import CheckpointError
from weft.plan import Plan
from weft.planner import make_plan
from weft.runtime.optimizer import plain, restored
from weft.runtime.pool import Pool
from weft.runtime.scaling import LossScale

SAVED, STEPS = 3, 6


def of(optimizer: Any, scheduler: Any = None, model: Any = None) -> weft.Workload:
    workload = dataclasses.replace(workloads.mlp(), optimizer=optimizer, scheduler=scheduler)
    return workload if model is None else dataclasses.replace(workload, model=model)


def plan_of(workload: weft.Workload, **degrees: int) -> Plan:
    devices = 1
    for degree in degrees.values():
        devices *= degree
    return make_plan(capture(workload), Cluster.local(devices), **(degrees or {"pp": 1}))


class Warmup(schedules.LRScheduler):
    """A scheduler inside a scheduler, and a window of what was seen."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.after = schedules.ExponentialLR(optimizer, 0.5)
        self.seen: deque[float] = deque(maxlen=2)
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        super().step()
        self.seen.append(float(self.optimizer.param_groups[0]["lr"]))
        if self.last_epoch > 1:
            self.after.step()
            for group, rate in zip(self.optimizer.param_groups, self.after.get_last_lr(), strict=True):
                group["lr"] = rate * (1 + len(self.seen) + sum(self.seen))


def cosine(optimizer: torch.optim.Optimizer) -> schedules.LRScheduler:
    return schedules.CosineAnnealingLR(optimizer, 10)


def halving(optimizer: torch.optim.Optimizer) -> schedules.LRScheduler:
    return schedules.LambdaLR(optimizer, lambda step: 0.5**step)


def groups(parameters: Any, rate: Any) -> torch.optim.Optimizer:
    parameters = list(parameters)
    return torch.optim.AdamW([{"params": parameters[:3]}, {"params": parameters[3:], "lr": 3 * rate}], lr=rate)


RATES: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], Any]] = {
    "a tensor": (lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False), cosine),
    "a tensor of float64": (lambda p: torch.optim.SGD(p, lr=torch.tensor(1e-2, dtype=torch.float64)), halving),
    "a tensor in one dimension": (lambda p: torch.optim.SGD(p, lr=torch.tensor([1e-2])), halving),
    "a tensor for each group": (lambda p: groups(p, torch.tensor(1e-2)), halving),
    "numpy's": (lambda p: torch.optim.AdamW(p, lr=np.float32(1e-2)), cosine),
    "an array": (lambda p: torch.optim.SGD(p, lr=np.array(1e-2)), halving),
    "a scheduler inside another": (lambda p: torch.optim.SGD(p, lr=1e-2), Warmup),
}


@pytest.mark.parametrize("kind", RATES)
def test_a_learning_rate_of_any_kind_goes_on(pool: Pool, tmp_path: Path, kind: str) -> None:
    optimizer, scheduler = RATES[kind]
    plan = plan_of(of(optimizer, scheduler), pp=2)

    def steps(engine: Any, count: int) -> list[tuple[float, list[float]]]:
        return [
            (float(engine.step(batch)), [float(group["lr"]) for group in engine.optimizer.param_groups])
            for _, batch in zip(range(count), engine.batches(epochs=None), strict=False)
        ]

    def job() -> tuple[Any, Any, bool]:
        whole = steps(weft.parallelize(of(optimizer, scheduler), plan), STEPS)
        engine = weft.parallelize(of(optimizer, scheduler), plan)
        begun = steps(engine, SAVED)
        engine.save(tmp_path)
        engine = weft.parallelize(of(optimizer, scheduler), plan)
        rates = [group["lr"] for group in engine.optimizer.param_groups]
        engine.load(tmp_path)
        same = [
            group["lr"] is rate if isinstance(rate, Tensor) else type(group["lr"]) is type(rate)
            for group, rate in zip(engine.optimizer.param_groups, rates, strict=True)
        ]
        return whole, begun + steps(engine, STEPS - SAVED), all(same)

    for whole, resumed, same in pool.run(job, ranks=2):
        assert resumed == whole
        assert len({rates[0] for _, rates in whole}) > 2, "the scheduler changes it"
        assert same


def test_what_is_kept_and_put_back() -> None:
    """Functions and other objects are the factory's; numbers of any kind are kept, or an error."""
    now = {"rates": [torch.tensor(0.5), print], "f": print, "table": np.arange(3.0), "n": {2: 1}, "moved": None}
    kept = plain(now)
    assert kept == {"rates": [0.5, None], "table": [0.0, 1.0, 2.0], "n": {}, "moved": None}
    kept["rates"][0], kept["table"], kept["moved"] = 0.25, [3.0, 4.0, 5.0], [1, "x"]
    found = restored(now, kept)
    assert found["rates"][0] is now["rates"][0]
    assert found["rates"] == [torch.tensor(0.25), print]
    assert found["table"].tolist() == [3.0, 4.0, 5.0]
    assert found["n"] == {2: 1}
    assert (found["f"], found["moved"]) == (print, [1, "x"])
    for odd in (Fraction(1, 2), 1j, torch.tensor(1j), torch.zeros(2**17), np.zeros(2**17)):
        with pytest.raises(CheckpointError, match="decay of the scheduler is"):
            plain({"decay": odd})


@pytest.mark.parametrize(
    ("now", "wrong"),
    [
        (0.1, "x"),
        (0.1, [0.1]),
        ("x", 0.1),
        ((0.9, 0.999), [0.9]),
        ((0.9, 0.999), [0.9, "x"]),
        ([0.1], {"a": 0.1}),
        ({"a": 1}, 1),
        (torch.tensor(0.1), "x"),
        (torch.tensor(0.1), [0.1, 0.2]),
        (torch.zeros(2), [[0.1], [0.2, 0.3]]),
        (torch.tensor(1), 10**30),
        (np.float32(0.1), "0.1"),
        (np.float32(0.1), [0.1, 0.2]),
        (np.zeros(2), [None, 0.1]),
        (np.zeros(2), [[0.1], [0.2, 0.3]]),
        (np.int64(1), 10**30),
    ],
)
def test_what_does_not_fit_is_refused(now: Any, wrong: Any) -> None:
    with pytest.raises(CheckpointError, match=r"rate of the scheduler: .* go on with the optimizer and the scheduler"):
        restored({"rate": now}, {"rate": wrong})


def test_a_setting_that_cannot_be_kept_is_an_error(pool: Pool, tmp_path: Path) -> None:
    def with_fraction(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": list(parameters), "share": Fraction(1, 2), "hook": print}], lr=0.1)

    plan = plan_of(of(with_fraction))

    def job() -> str:
        engine = weft.parallelize(of(with_fraction), plan)
        engine.step(next(engine.batches()))
        with pytest.raises(CheckpointError) as caught:
            engine.save(tmp_path)
        engine.optimizer.param_groups[0]["share"] = 0.5
        engine.save(tmp_path)
        engine.load(tmp_path)
        assert engine.optimizer.param_groups[0]["hook"] is print
        return str(caught.value)

    said = pool.run(job, ranks=1)[0]
    assert said.startswith("share of a parameter group is Fraction(1, 2)")
    assert "make it an int or a float" in said


class Cached(nn.Module):
    """A table that forwards replace by one that is long enough, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 1)
        self.register_buffer("table", torch.zeros(0), persistent=False)
        self.inner.register_buffer("again", self.table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.table) < x.shape[1]:
            self.table = torch.linspace(0, 1, x.shape[1])
            self.inner.again = self.table
        return self.inner(x * self.table)


def test_a_computed_buffer_that_grew_goes_on(pool: Pool, tmp_path: Path) -> None:
    workload = of(workloads.adamw, model=Cached)
    plan = plan_of(workload)

    def job() -> tuple[list[float], list[float]]:
        engine = weft.parallelize(of(workloads.adamw, model=Cached), plan)
        batches = engine.batches()
        engine.step(next(batches))
        engine.save(tmp_path)
        whole = [float(engine.step(next(batches))) for _ in range(2)]
        engine = weft.parallelize(of(workloads.adamw, model=Cached), plan)
        engine.load(tmp_path)
        assert torch.equal(engine.model.table, torch.linspace(0, 1, 12))
        assert engine.model.inner.again is engine.model.table
        batches = engine.batches()
        return whole, [float(engine.step(next(batches))) for _ in range(2)]

    whole, resumed = pool.run(job, ranks=1)[0]
    assert resumed == whole


class Logged(torch.optim.AdamW):
    """A user's own AdamW."""


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "logged": lambda p: Logged(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


def test_another_optimizer_is_refused(pool: Pool, tmp_path: Path) -> None:
    """One that computes the same in another way is none."""
    plan = plan_of(of(OPTIMIZERS["adamw"]))

    def job() -> dict[tuple[str, str], str]:
        said = {}
        for under in ("adamw", "fused", "sgd"):
            engine = weft.parallelize(of(OPTIMIZERS[under]), plan)
            engine.step(next(engine.batches()))
            engine.save(tmp_path / under)
            for kind, optimizer in OPTIMIZERS.items():
                engine = weft.parallelize(of(optimizer), plan)
                how = {key: engine.optimizer.param_groups[0].get(key) for key in ("fused", "foreach")}
                try:
                    engine.load(tmp_path / under)
                    engine.step(next(engine.batches()))
                    assert how == {key: engine.optimizer.param_groups[0].get(key) for key in how}
                    said[under, kind] = ""
                except CheckpointError as error:
                    said[under, kind] = str(error)
        return said

    same = {"adamw", "logged", "fused", "foreach"}
    for (under, kind), said in pool.run(job, ranks=1)[0].items():
        if under == kind or {under, kind} <= same:
            assert said == "", (under, kind)
        else:
            assert "was saved with the optimizer" in said, (under, kind)


@pytest.mark.parametrize("state", [{}, {"value": "x", "clean": 0}, {"value": 0.0, "clean": 0}, {"value": 2.0}])
def test_a_loss_scale_that_is_none_is_refused(state: dict[str, Any]) -> None:
    scale = LossScale()
    scale.restore(LossScale().state())
    with pytest.raises(CheckpointError, match="loss scale"):
        scale.restore(state)
