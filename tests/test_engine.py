"""The engine in the user's own loop: errors, warnings, checkpoints, models larger than a process may hold."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import workloads
from test_equality import plan_for
from torch import nn

import weft
from weft.checkpoint.index import Index
from weft.errors import BatchError, CheckpointError, LossError, PlanError, WorkerError
from weft.jobs.reference import SingleDevice
from weft.plan import Plan
from weft.runtime.pool import Pool
from weft.runtime.totals import local


def test_a_global_batch_in_the_users_own_loop(pool: Pool) -> None:
    plan = plan_for(workloads.mlp(), {"pp": 2, "dp_replicate": 2}, microbatches=2)

    def job() -> list[float]:
        workload = workloads.mlp()
        engine = weft.parallelize(workload, plan)
        batch = workload.sample_batch(8)
        return [float(engine.step(batch)) for _ in range(3)]

    losses = pool.run(job, ranks=4)
    assert losses[0] == losses[1] == losses[2] == losses[3]
    workload = workloads.mlp()
    torch.manual_seed(workload.seed)
    model = workload.model()
    optimizer = workload.optimizer(weft.Parameters(model.named_parameters()))
    for expected in losses[0]:
        loss = workload.loss(model, workload.sample_batch(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert expected == pytest.approx(loss.item(), rel=1e-5)


def test_one_process_is_a_job_of_one() -> None:
    workload = workloads.mlp()
    plan = plan_for(workload, {"pp": 1})
    engine = weft.parallelize(workload, plan)
    try:
        losses = [float(engine.step(batch)) for batch in engine.batches()]
        single = SingleDevice(workload, torch.device("cpu"), plan=plan)
        assert losses == pytest.approx([step.loss for step in single.steps(len(losses))], rel=1e-5)
        state = engine.state_dict()
        assert list(state) == [name for name, _ in single.model.named_parameters()]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "degrees",
    [{"pp": 2}, {"dp_shard": 2}, {"dp_replicate": 2}, {"tp": 2}, {"pp": 2, "dp_shard": 2}],
    ids=lambda d: "-".join(f"{k}{v}" for k, v in d.items()),
)
@pytest.mark.matrix
def test_a_resumed_run_continues_exactly(pool: Pool, tmp_path: Path, degrees: dict[str, int]) -> None:
    plan = plan_for(workloads.gpt2(), degrees, microbatches=2)

    def whole() -> list[float]:
        engine = weft.parallelize(workloads.gpt2(), plan)
        batches = engine.batches(epochs=None)
        return [float(engine.step(next(batches))) for _ in range(6)]

    def first_half() -> list[float]:
        engine = weft.parallelize(workloads.gpt2(), plan)
        batches = engine.batches(epochs=None)
        losses = [float(engine.step(next(batches))) for _ in range(3)]
        engine.save(tmp_path)
        return losses

    def second_half() -> list[float]:
        engine = weft.parallelize(workloads.gpt2(), plan)
        engine.load(tmp_path)
        batches = engine.batches(epochs=None)
        return [float(engine.step(next(batches))) for _ in range(3)]

    expected = pool.run(whole, ranks=plan.devices)[0]
    assert pool.run(first_half, ranks=plan.devices)[0] == expected[:3]
    assert pool.run(second_half, ranks=plan.devices)[0] == expected[3:]
    assert Index.load(tmp_path / "step-00000003").step == 3


def test_a_checkpoint_of_another_model_is_refused(pool: Pool, tmp_path: Path) -> None:
    plan, other = plan_for(workloads.mlp(), {"pp": 2}), plan_for(workloads.skips(), {"pp": 2})
    pool.run(lambda: weft.parallelize(workloads.mlp(), plan).save(tmp_path), ranks=2)
    with pytest.raises(CheckpointError, match="checkpoint of another model"):
        pool.run(lambda: weft.parallelize(workloads.skips(), other).load(tmp_path), ranks=2)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        pool.run(lambda: weft.parallelize(workloads.mlp(), plan).load(tmp_path / "elsewhere"), ranks=2)


def run_with(pool: Pool, plan: Plan, **changes: Any) -> Any:
    def job() -> Any:
        workload = dataclasses.replace(workloads.mlp(), **changes)
        engine = weft.parallelize(workload, plan)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for batch in engine.batches():
                engine.step(batch)
        return [str(warning.message) for warning in caught]

    return pool.run(job, ranks=plan.devices)


def test_a_loss_that_is_no_scalar_is_refused(pool: Pool) -> None:
    plan = plan_for(workloads.mlp(), {"pp": 2})
    with pytest.raises(LossError, match=r"must return a scalar .*\(sum, count\)"):
        run_with(pool, plan, loss=lambda model, batch: (model(batch[0]) - batch[1]).square())


def test_a_batch_that_cannot_be_divided_is_refused(pool: Pool) -> None:
    plan = plan_for(workloads.mlp(), {"pp": 2})

    def job() -> None:
        engine = weft.parallelize(workloads.mlp(), plan)
        engine.step((torch.zeros(8, 12), torch.zeros(5, 1)))

    with pytest.raises(BatchError, match="8 samples in dimension 0 and batch"):
        pool.run(job, ranks=2)


class Exploding(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 0.0


def test_a_nan_at_the_first_step_names_the_unit(pool: Pool) -> None:
    def model() -> nn.Module:
        exploding = nn.Sequential(nn.Linear(24, 16), Exploding())
        return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), exploding, nn.Linear(16, 1))

    plan = plan_for(dataclasses.replace(workloads.mlp(), model=model, units=["0", "2", "3"]), {"pp": 3})
    caught = run_with(pool, plan, model=model, units=["0", "2", "3"])
    assert len(caught[0]) == 1
    assert caught[0][0].startswith("step 0: 2 returned NaN or infinity")
    assert not caught[1]


def test_a_plan_for_another_model_is_refused(pool: Pool) -> None:
    plan = plan_for(workloads.skips(), {"pp": 2})
    with pytest.raises(PlanError, match="do not list this model's 4 calls"):
        run_with(pool, plan)


def test_a_plan_for_other_devices_is_refused(pool: Pool) -> None:
    plan = plan_for(workloads.mlp(), {"pp": 2})

    def job() -> None:
        weft.parallelize(workloads.mlp(), plan)

    with pytest.raises(PlanError, match="for 2 devices but the job has 3 processes"):
        pool.run(job, ranks=3)


WIDTH, LAYERS = 512, 48
"""48 MiB of weights: gradients and momentum make it 144 MiB."""


def large() -> weft.Workload:
    return dataclasses.replace(
        workloads.mlp(),
        model=lambda: nn.Sequential(
            nn.Linear(12, WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)), nn.Linear(WIDTH, 1)
        ),
    )


@pytest.mark.parametrize("degrees", [{"pp": 4}, {"dp_shard": 4}], ids=["pp4", "dp_shard4"])
@pytest.mark.long
def test_a_model_larger_than_a_process_may_hold(degrees: dict[str, int]) -> None:
    limit = 96 * 2**20  # two thirds of what one device needs
    plan = plan_for(large(), degrees)
    alone = plan_for(large(), {"pp": 1})

    def job(plan: Plan) -> tuple[float, int]:
        engine = weft.parallelize(large(), plan)
        batches = engine.batches(epochs=None)
        loss = 0.0
        for _ in range(2):
            loss = float(engine.step(next(batches)))
        return loss, sum(local(held.parameter).nbytes for held in engine.part.held)

    results = weft.launch(job, plan, devices=4, memory=limit, device="cpu")
    total = sum(p.numel() * 4 for p in large().model().parameters())
    assert total * 3 > limit
    assert all(held < 0.35 * total for _, held in results)
    with pytest.raises(WorkerError, match="out of memory"):
        weft.launch(job, alone, devices=1, memory=limit, device="cpu")
