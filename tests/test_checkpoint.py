"""Checkpoints: saved under any plan, continued under any other, on one device's trajectory, in float64."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workloads import Tokens

import weft
from weft.capture import Profile, capture
from weft.cluster import Cluster
from weft.jobs.reference import SingleDevice, in_dtype
from weft.plan import Plan
from weft.planner import make_plan
from weft.runtime.pool import Pool

KINDS: dict[str, dict[str, Any]] = {
    "one": {"pp": 1},
    "dp2": {"dp_replicate": 2},
    "shard2": {"dp_shard": 2},
    "shard3-zero1": {"dp_shard": 3, "zero": 1},
    "pp2": {"pp": 2},
    "pp3": {"pp": 3},
    "tp2": {"tp": 2},
    "pp2-tp2": {"pp": 2, "tp": 2},
    "hybrid": {"dp_replicate": 2, "dp_shard": 2},
    "all": {"pp": 2, "tp": 2, "dp_shard": 2},
}
SAVED, STEPS = 3, 6


class Noisy(Tokens):
    """Rows that are changed at random when they are read, by every generator there is."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        row = self.rows[i].clone()
        row[random.randrange(len(row))] = int(torch.randint(32, ()))
        row[np.random.randint(len(row))] = 1
        return {"input_ids": row, "labels": row}


class Block(nn.Module):
    """Statistics over the batch, and a part that learns nothing."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)
        self.statistics = nn.BatchNorm1d(12)
        self.up.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return self.statistics(x.flatten(0, 1)).view_as(x)


class Everything(nn.Module):
    """Tied weights, frozen ones, buffers that change."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 12)
        self.blocks = nn.ModuleList(Block(frozen=number == 1) for number in range(4))
        self.head = nn.Linear(12, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def next_token(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"])[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def adamw(parameters: Any) -> torch.optim.Optimizer:
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.dim() < 2], "lr": 3e-3},
        ],
        lr=1e-2,
    )


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.05, momentum=0.9, nesterov=True)


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


def everything(optimizer: Any = adamw) -> weft.Workload:
    workload = weft.Workload(
        model=Everything,
        loss=next_token,
        data=Noisy(64, 6, 32),
        optimizer=optimizer,
        scheduler=halving,
        batch_size=12,
        max_grad_norm=1.0,
    )
    return in_dtype(workload, torch.float64)


def plan_of(kind: str, profile: Profile) -> Plan:
    choices = KINDS[kind]
    devices = math.prod(value for name, value in choices.items() if name != "zero")
    return make_plan(profile, Cluster.local(devices), **{"microbatches": 2, **choices})


@pytest.mark.parametrize("optimizer", [adamw, pytest.param(sgd, marks=pytest.mark.long)])
def test_every_plan_continues_what_any_other_saved(pool: Pool, tmp_path: Path, optimizer: Any) -> None:
    profile = capture(everything(optimizer))
    plans = {kind: plan_of(kind, profile) for kind in KINDS}
    single = SingleDevice(everything(optimizer), torch.device("cpu"), plan=plans["one"])
    expected = [step.loss for step in single.steps(STEPS)]
    state = single.state()

    def saves(plan: Plan, directory: Path) -> None:
        engine = weft.parallelize(everything(optimizer), plan)
        for _, batch in zip(range(SAVED), engine.batches(epochs=None), strict=False):
            engine.step(batch)
        engine.save(directory)

    def loads(plan: Plan) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
        engine, found = weft.parallelize(everything(optimizer), plan), {}
        for kind in KINDS:
            engine.load(tmp_path / kind)
            steps = zip(range(SAVED, STEPS), engine.batches(epochs=None), strict=False)
            losses = [float(engine.step(batch)) for _, batch in steps]
            found[kind] = losses, engine.state_dict()
        return found

    for kind, plan in plans.items():
        pool.run(saves, plan, tmp_path / kind, ranks=plan.devices)
    for under, plan in plans.items():
        for kind, (losses, found) in pool.run(loads, plan, ranks=plan.devices)[0].items():
            told = f"saved under {kind}, continued under {under}"
            assert losses == pytest.approx(expected[SAVED:], rel=1e-10), told
            for name, tensor in found.items():
                difference = (tensor - state[name]).double().norm()
                assert difference <= 1e-10 * max(1.0, float(state[name].double().norm())), f"{told}: {name}"
