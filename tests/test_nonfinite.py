"""Numbers that are not finite: a step is left out as if it had not been, or training stops before it, and the code
that gave the first of them is named. In float64."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_equality import name_of, plan_for
from torch import Tensor, nn
from workloads import mlp

import weft
from weft.capture import Profile, capture
from weft.cli import run
from weft.engines import parallelize
from weft.errors import InputError, NonFiniteError
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


def workload(
    bad: str | None, model: Any = Net, compute: Any = loss, max_grad_norm: float | None = 1.0
) -> weft.Workload:
    work = weft.Workload(
        model=model,
        loss=compute,
        data=Data(bad),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5),
        batch_size=8,
        shuffle=False,
        max_grad_norm=max_grad_norm,
    )
    return in_dtype(work, torch.float64)


@functools.cache
def without_the_bad_step() -> dict[str, Tensor]:
    """What one device has after the other steps, in plain PyTorch."""
    work = workload(None)
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


@functools.cache
def profile() -> Profile:
    return capture(workload(None))


def plan_of(degrees: dict[str, int], **choices: Any) -> Plan:
    return plan_for(workload(None), degrees, profile(), microbatches=2, **choices)


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[n] - t).double().norm()) / max(1.0, float(t.double().norm())) for n, t in expected.items())


WHERE = {
    "input": ("enter", "returned NaN or infinity; the samples hold such numbers themselves"),
    "pole": ("blocks.2", "returned NaN or infinity"),
    "root": ("blocks.2", "gave a gradient that is NaN or infinity (SqrtBackward0), though the loss is finite"),
}


@pytest.mark.parametrize("bad", WHERE)
@pytest.mark.parametrize("degrees", PLANS, ids=name_of)
@pytest.mark.matrix
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
    assert relative(every[0][1], without_the_bad_step()) <= 1e-10


@pytest.mark.parametrize("bad", WHERE)
@pytest.mark.parametrize("degrees", [{"pp": 1}, {"pp": 2, "dp_replicate": 2}, {"tp": 2, "dp_shard": 2}], ids=name_of)
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


def told_by(engine: weft.Engine, batches: Any) -> tuple[list[str], str]:
    """What is said of some steps that are left out, and the last error."""
    error = ""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for batch in batches:
            try:
                engine.step(batch)
            except NonFiniteError as raised:
                error = str(raised)
    return [str(w.message) for w in told], error


def test_unless_asked_a_step_is_taken_as_in_pytorch(pool: Pool) -> None:
    plan = plan_of({"dp_replicate": 2})

    def job() -> Any:
        engine = parallelize(workload("pole"), plan)
        for _, batch in zip(range(2), engine.batches(), strict=False):
            engine.step(batch)
        finite = [bool(t.isfinite().all()) for t in engine.state_dict().values()]
        try:
            engine.nonfinite = "sometimes"
            engine.step(batch)
        except InputError as error:
            return finite, engine.skipped, str(error)

    finite, skipped, said = pool.run(job, ranks=2)[0]
    assert not all(finite)
    assert skipped == 0
    assert said == "nonfinite must be one of ignore, skip, stop, got 'sometimes'"


class Chance(nn.Module):
    """A unit whose outputs depend on random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(12, 12), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.tanh(self.linear(x)))


@pytest.mark.parametrize("recompute", [None, "full", "selective"])
def test_the_step_that_is_run_again_is_the_same(pool: Pool, recompute: str | None) -> None:
    def compute(model: nn.Module, batch: Any) -> Tensor:
        x, y, pole, _ = batch
        return F.mse_loss(model(x + torch.rand_like(x)).mean(-1, keepdim=True) / (1 - pole), y)

    def build() -> weft.Workload:
        return workload("pole", lambda: nn.Sequential(*(Chance() for _ in range(4))), compute)

    choices = {"recompute": recompute} if recompute else {}
    plan = plan_for(build(), {"pp": 2, "dp_replicate": 2}, microbatches=2, **choices)

    def job() -> Any:
        engine, seen = parallelize(build(), plan), []
        engine.nonfinite = "skip"
        for block in engine.model:
            block.register_forward_hook(lambda module, args, output: seen.append(output))
        batches = engine.batches()
        engine.step(next(batches))
        seen.clear()
        told, _ = told_by(engine, [next(batches)])
        real = [float(output.sum()) for output in seen if type(output) is Tensor]
        return told, real

    every = pool.run(job, ranks=4)
    loss = "the loss is NaN or infinity, though no unit's output is (microbatch 1 of replica 1, rank 3)"
    assert every[0][0] == [f"step 2 was left out: {loss}"]
    for _, seen in every:
        assert len(seen) >= 8  # two blocks, two microbatches, twice
        assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Scale(), Scale()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x) + self.first(x)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


CASES = {
    "sums": "second.weight has a gradient that overflows where microbatches and replicas are added",
    "norm": "the norm of the gradients overflows",
    "count": "the mean loss is NaN or infinity, though no microbatch's is: their sum overflows, or their counts add to",
    "loss": "the loss is NaN or infinity, though no unit's output is (microbatch 0 of replica 0, rank 0)",
    "glue": "the loss gave a gradient that is NaN or infinity (SqrtBackward0), though the loss is finite (microbatch 0",
}


@pytest.mark.parametrize("case", CASES)
def test_where_no_unit_is_to_blame(pool: Pool, case: str) -> None:
    def compute(model: nn.Module, batch: Any) -> Any:
        total = model(torch.ones(len(batch[0]), 1)).sum()
        if case == "glue":
            return total.sqrt() + 1
        if case == "loss":
            return total + math.inf
        return total * (1e308 / 2 if case == "sums" else 1e200), int(case != "count")

    def build() -> weft.Workload:
        return workload(None, Weight, compute, None)

    plan = plan_for(build(), {"dp_replicate": 2}, microbatches=2)

    def job() -> Any:
        engine = parallelize(build(), plan)
        engine.nonfinite = "stop"
        return told_by(engine, [next(engine.batches())])[1]

    every = pool.run(job, ranks=2)
    assert every[0] == every[1]
    assert every[0].startswith(f"step 1: {CASES[case]}")


@pytest.mark.parametrize("spike", [1e4, math.inf])
def test_an_overflow_of_float16_is_no_reason_to_stop(pool: Pool, spike: float, tmp_path: Path) -> None:
    """The scale is halved, and the step counted; a loss that is infinite itself no scale makes finite."""

    def build() -> weft.Workload:
        work = mlp(batch_size=8, samples=32)
        work.data.y[3] += spike
        return dataclasses.replace(work, shuffle=False)

    plan = dataclasses.replace(plan_for(build(), {"pp": 2}), precision="fp16")

    def job() -> Any:
        engine = parallelize(build(), plan)
        engine.nonfinite = "stop"
        _, error = told_by(engine, [b for _, b in zip(range(2), engine.batches(), strict=False)])
        engine.save(tmp_path)
        again = parallelize(build(), plan)
        again.load(tmp_path)
        return error, engine.skipped, again.skipped

    error, skipped, kept = pool.run(job, ranks=2)[0]
    assert skipped == kept == (1 if spike < math.inf else 0)
    assert error.partition(",")[0] == ("" if spike < math.inf else "step 1: the loss is NaN or infinity")


TARGET = """
import torch, weft
from torch import nn

class Points:
    def __len__(self):
        return 16
    def __getitem__(self, i):
        return torch.full((4,), float("nan") if i == 13 else i / 16), torch.zeros(1)

def workload():
    return weft.Workload(
        model=lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
        loss=lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
        data=Points(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters),
        batch_size=4,
        shuffle=False,
    )
"""


@pytest.mark.long
def test_training_from_the_command_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("target.py").write_text(TARGET)
    names = {}
    exec(TARGET, names)
    plan_for(names["workload"](), {"dp_replicate": 2}).save(Path("plan.json"))
    command = ["train", "target.py", "--plan", "plan.json", "--check-replicas", "2"]
    assert run([*command, "--nonfinite", "skip", "--checkpoint", "kept", "--steps", "4", "--json"]) == 0
    said = capfd.readouterr()
    data = json.loads(said.out, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert [loss is None for loss in data["losses"]] == [False, False, False, True]
    assert data["skipped"] == 1
    blamed = "0 returned NaN or infinity; the samples hold such numbers themselves (microbatch 0 of replica 0, rank 0)"
    assert f"warning: step 4 was left out: {blamed}" in said.err
    assert run([*command, "--checkpoint", "stopped", "--checkpoint-every", "2"]) == 1
    said = capfd.readouterr()
    assert said.err.splitlines()[-1].startswith(f"weft: step 4: {blamed}; nothing was changed. Look at")
    assert [path.name for path in Path("stopped").iterdir()] == ["step-00000002"]
    assert run([*command, "--nonfinite", "never"]) == 2
    assert "nonfinite must be one of ignore, skip, stop, got 'never'" in capfd.readouterr().err
