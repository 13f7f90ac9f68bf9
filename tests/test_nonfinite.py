"""Numbers that are not finite: a step is left out as if it had not been, or training stops before it, and the code
that gave the first of them is named. In float64."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_equality import name_of, plan_for
from torch import Tensor, nn

import weft
from weft.engines import parallelize
from weft.errors import NonFiniteError
from weft.jobs.reference import in_dtype
from weft.plan import Plan
from weft.runtime.pool import Pool

PLANS = [
    {"pp": 1},
    {"pp": 2},
    {"tp": 2},
    {"dp_replicate": 2},
    {"dp_shard": 2},
    {"pp": 2, "dp_replicate": 2},
]
BAD_STEP, STEPS = 1, 4
BAD_SAMPLE = 8 * BAD_STEP + 7  # of the last replica, in the last microbatch


class Data:
    """Points; one sample is bad in a way of its own: ``input`` is NaN, ``pole`` is divided by, ``root`` is taken."""

    def __init__(self, bad: str | None) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x, self.y = (torch.randn(32, n, generator=generator) for n in (12, 1))
        self.pole, self.root = torch.zeros(2, 32, 1)
        if bad is not None:
            which = {"input": self.x, "pole": self.pole, "root": self.root}[bad]
            which[BAD_SAMPLE, 0] = math.nan if bad == "input" else 1.0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        return self.x[i], self.y[i], self.pole[i], self.root[i]


class Block(nn.Module):
    """Statistics over the batch, and two places where a sample may go wrong. No biases before statistics: gradients
    that are zero but for rounding are a trajectory of their own under AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(12, 12, bias=False), nn.BatchNorm1d(12)

    def forward(self, x: Tensor, pole: Tensor, root: Tensor) -> Tensor:
        x = self.norm(self.linear(x))
        return x + torch.sqrt((x * (1 - root)).square() + 1e-3 * (1 - root)) / (1 - pole)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(12, 12, bias=False), nn.Linear(12, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor, pole: Tensor, root: Tensor) -> Tensor:
        x = self.enter(x)
        for number, block in enumerate(self.blocks):
            here = float(number == 2)
            x = block(x, here * pole, here * root)
        return self.leave(x)


def loss(model: nn.Module, batch: Any) -> Tensor:
    x, y, pole, root = batch
    return F.mse_loss(model(x, pole, root), y)


def workload(bad: str | None) -> weft.Workload:
    work = weft.Workload(
        model=Net,
        loss=loss,
        data=Data(bad),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5),
        batch_size=8,
        shuffle=False,
        max_grad_norm=1.0,
    )
    return in_dtype(work, torch.float64)


def without_the_bad_step(work: weft.Workload) -> dict[str, Tensor]:
    """What one device has after the other steps, in plain PyTorch."""
    torch.manual_seed(work.seed)
    model = work.model()
    optimizer = work.optimizer(model.parameters())
    scheduler = work.scheduler(optimizer)
    for step in [s for s in range(STEPS) if s != BAD_STEP]:
        optimizer.zero_grad()
        for first in (8 * step, 8 * step + 4):
            (work.loss(model, work.batch_of(range(first, first + 4))) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model.state_dict()


def plan_of(degrees: dict[str, int]) -> Plan:
    return plan_for(workload(None), degrees, microbatches=2)


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[n] - t).double().norm()) / max(1.0, float(t.double().norm())) for n, t in expected.items())


WHERE = {
    "input": ("enter", "returned NaN or infinity; the samples hold such numbers themselves"),
    "pole": ("blocks.2", "returned NaN or infinity"),
    "root": ("blocks.2", "gave a gradient that is NaN or infinity (SqrtBackward0), though the loss is finite"),
}


@pytest.mark.parametrize("bad", WHERE)
@pytest.mark.parametrize("degrees", PLANS, ids=name_of)
def test_a_step_is_left_out_as_if_it_had_not_been(pool: Pool, degrees: dict[str, int], bad: str) -> None:
    plan = plan_of(degrees)

    def job() -> Any:
        engine = parallelize(workload(bad), plan)
        engine.nonfinite = "skip"
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            losses = [float(engine.step(b)) for _, b in zip(range(STEPS), engine.batches(), strict=False)]
        return losses, engine.state_dict(), engine.skipped, engine.step_count, [str(w.message) for w in told]

    every = pool.run(job, ranks=plan.devices)
    replica = plan.replicas - 1
    for rank, (losses, _, skipped, steps, told) in enumerate(every):
        assert [math.isfinite(x) for x in losses] == [step != BAD_STEP or bad == "root" for step in range(STEPS)]
        assert (skipped, steps) == (1, STEPS)
        unit, what = WHERE[bad]
        place = f"(microbatch 1 of replica {replica}, rank "
        assert [text.partition(place)[0] for text in told] == [f"step 2 was left out: {unit} {what} "] * (rank == 0)
    assert relative(every[0][1], without_the_bad_step(workload(None))) <= 1e-10


@pytest.mark.parametrize("bad", WHERE)
@pytest.mark.parametrize("degrees", PLANS, ids=name_of)
def test_training_stops_with_everything_as_it_was(pool: Pool, degrees: dict[str, int], bad: str) -> None:
    plan = plan_of(degrees)

    def job() -> Any:
        engine = parallelize(workload(bad), plan)
        engine.nonfinite = "stop"
        batches = engine.batches()
        engine.step(next(batches))
        before = engine.state_dict()
        error = None
        try:
            engine.step(next(batches))
        except NonFiniteError as raised:
            error = raised
        state = [float(s["step"]) for s in engine.optimizer.state.values()]
        return before, engine.state_dict(), error, (engine.step_count, engine.scheduler.last_epoch, *set(state))

    every = pool.run(job, ranks=plan.devices)
    for _, _, error, counts in every:
        assert (error.step, error.unit, error.what) == (2, *WHERE[bad])
        assert counts == (1, 1, 1.0)
    before, after = every[0][:2]
    assert all(torch.equal(before[n], after[n]) for n in before)
