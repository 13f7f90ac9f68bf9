"""Training under a plan means what it means on one device: statistics over the batch, random draws, buffers, frozen
parameters, groups of them, schedules of rates, losses that call the model in their own way, batches of any form."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import workloads
from test_averaging import verified
from test_equality import name_of, plan_for
from torch import nn

import weft
from weft.errors import InputError, PlanError
from weft.jobs.verify import verify_here
from weft.runtime.batches import divide
from weft.runtime.pool import Pool

REPLICAS = [
    {"dp_replicate": 2},
    {"dp_shard": 2},
    {"pp": 2},
    {"pp": 2, "dp_replicate": 2},
    {"pp": 2, "dp_shard": 2},
    {"dp_replicate": 2, "dp_shard": 2},
]
ALL = [*REPLICAS, {"tp": 2}, {"pp": 2, "tp": 2}, {"dp_replicate": 2, "tp": 2}]


def holds(pool: Pool, build: Any, degrees: dict[str, int], *, steps: int = 3, **choices: Any) -> None:
    result = verified(pool, build, degrees, steps=steps, **choices)
    assert result.ok, result


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("degrees", REPLICAS, ids=name_of)
@pytest.mark.matrix
def test_statistics_over_the_batch(pool: Pool, degrees: dict[str, int], microbatches: int) -> None:
    # 21 samples in batches of 8: the last batch of 5 is uneven
    holds(pool, lambda: workloads.cnn(samples=21), degrees, microbatches=microbatches)


@pytest.mark.parametrize("degrees", REPLICAS, ids=name_of)
@pytest.mark.matrix
def test_statistics_over_the_batch_and_dropout(pool: Pool, degrees: dict[str, int]) -> None:
    holds(pool, lambda: workloads.cnn(samples=21, dropout=0.3), degrees, microbatches=2)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.long
def test_stand_in_samples_enter_no_statistics(pool: Pool, dropout: float) -> None:
    # batches of 8 and 2: with 4 replicas of 2 microbatches, most of the last batch's pieces are empty
    for degrees in ({"dp_replicate": 4}, {"dp_shard": 4}, {"pp": 2, "dp_shard": 2}):
        holds(pool, lambda: workloads.cnn(samples=10, dropout=dropout), degrees, microbatches=2, steps=4)


@pytest.mark.parametrize("degrees", REPLICAS, ids=name_of)
@pytest.mark.matrix
def test_every_kind_of_normalisation_over_the_batch(pool: Pool, degrees: dict[str, int]) -> None:
    holds(pool, lambda: workloads.norms(samples=22), degrees, microbatches=2)


def test_statistics_without_a_cut_are_those_of_plain_pytorch(pool: Pool) -> None:
    plan = plan_for(workloads.cnn(), {"dp_replicate": 2, "dp_shard": 2})

    def job() -> tuple[list[float], dict[str, torch.Tensor], list[bool]]:
        engine = weft.parallelize(workloads.cnn(), plan)
        losses = [float(engine.step(workloads.cnn().sample_batch(8))) for _ in range(3)]
        equal = []
        for buffer in engine.part.buffers.values():
            every = [torch.empty_like(buffer) for _ in range(4)]
            dist.all_gather(every, buffer)
            equal.append(all(torch.equal(buffer, other) for other in every))
        return losses, engine.state_dict(), equal

    results = pool.run(job, ranks=4)
    workload = workloads.cnn()
    torch.manual_seed(workload.seed)
    model = workload.model()
    optimizer = workload.optimizer(model.parameters())
    for expected in results[0][0]:
        loss = workload.loss(model, workload.sample_batch(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert expected == pytest.approx(loss.item(), rel=1e-5)
    assert all(all(equal) for _, _, equal in results)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(results[0][1][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("degrees", REPLICAS, ids=name_of)
def test_buffers_that_forwards_change(pool: Pool, degrees: dict[str, int]) -> None:
    holds(pool, workloads.averages, degrees, microbatches=2)


def test_a_normalisation_called_on_two_stages_is_refused(pool: Pool) -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8))
            self.leave = nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.leave(self.tower(x) * self.tower(-x))

    def build() -> weft.Workload:
        return dataclasses.replace(workloads.mlp(), model=Siamese, units=["tower", "leave"])

    plan = weft.Plan(pp=2, stages=(("tower",), ("tower@2", "leave")), batch_size=8)
    with pytest.raises(PlanError, match="put its calls on one stage"):
        pool.run(lambda: weft.parallelize(build(), plan), ranks=2)
    holds(pool, build, {"dp_replicate": 2})


def test_the_planner_says_what_statistics_are_over() -> None:
    from weft.capture import capture
    from weft.cluster import Cluster
    from weft.planner import search

    profile, cluster = capture(workloads.cnn()), Cluster.local(devices=2)
    assert profile.batch_statistics
    assert not capture(workloads.mlp()).batch_statistics
    assert search(profile, cluster, dp_replicate=2).plan.microbatches == 1
    text = search(profile, cluster, pp=2, microbatches=2).plan.explain()
    assert "takes its statistics from about 4 samples at a time" in text
    assert "statistics" not in search(profile, cluster, pp=1).plan.explain()


@pytest.mark.parametrize("degrees", REPLICAS, ids=name_of)
@pytest.mark.matrix
def test_draws_of_torch_numpy_and_python(pool: Pool, degrees: dict[str, int]) -> None:
    holds(pool, workloads.noisy, degrees, microbatches=2)


@pytest.mark.long
def test_masks_agree_in_a_tensor_group_and_differ_elsewhere(pool: Pool) -> None:
    plan = plan_for(workloads.gpt2(dropout=0.2), {"dp_replicate": 2, "tp": 2}, microbatches=2)

    def job() -> list[torch.Tensor]:
        engine = weft.parallelize(workloads.gpt2(dropout=0.2), plan)
        masks: list[torch.Tensor] = []
        dropout = next(m for m in engine.model.modules() if isinstance(m, nn.Dropout))
        dropout.register_forward_hook(lambda module, args, output: masks.append(output == 0))
        engine.step(next(engine.batches()))
        return masks

    every = pool.run(job, ranks=4)
    assert all(len(masks) == 2 for masks in every)
    for first, second in ((every[0], every[1]), (every[2], every[3])):  # tp is the innermost dimension
        assert all(map(torch.equal, first, second))
    different = [every[0][0], every[0][1], every[2][0], every[2][1]]
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])
    holds(pool, lambda: workloads.gpt2(dropout=0.2), {"dp_replicate": 2, "tp": 2}, microbatches=2)


@pytest.mark.parametrize("degrees", ALL, ids=name_of)
@pytest.mark.matrix
def test_groups_with_settings_and_a_schedule(pool: Pool, degrees: dict[str, int]) -> None:
    holds(pool, workloads.grouped, degrees, microbatches=2)


SCHEDULES = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "steps": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3], gamma=0.5),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8),
    "in turn": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=2), torch.optim.lr_scheduler.MultiStepLR(o, [2])],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_where_it_was(pool: Pool, tmp_path: Path, name: str) -> None:
    def build() -> weft.Workload:
        return dataclasses.replace(workloads.mlp(), scheduler=SCHEDULES[name])

    plan = plan_for(build(), {"pp": 2})

    def job(first: int, last: int) -> list[tuple[float, float]]:
        engine = weft.parallelize(build(), plan)
        if first:
            engine.load(tmp_path)
        batches = engine.batches(epochs=None)
        seen = [(engine.scheduler.get_last_lr()[0], float(engine.step(next(batches)))) for _ in range(first, last)]
        engine.save(tmp_path)
        return seen

    whole = pool.run(job, 0, 6, ranks=2)[0]
    assert len({rate for rate, _ in whole}) > 1
    assert pool.run(job, 0, 3, ranks=2)[0] == whole[:3]
    (tmp_path / "step-00000006" / "checkpoint.json").unlink()  # of the whole run: the newest is that of step 3
    assert pool.run(job, 3, 6, ranks=2)[0] == whole[3:]


WRONG = {
    "must be callable": {"scheduler": 3},
    "LRScheduler, got int": {"scheduler": lambda optimizer: 3},
    "raised TypeError": {"scheduler": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer)},
    "needs a metric": {"scheduler": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)},
    "optimizer raised ValueError": {"optimizer": lambda p: torch.optim.SGD([{"params": p}, {"params": p}], lr=0.1)},
    "must return a torch.optim.Optimizer, got list": {"optimizer": list},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_schedule_or_optimizer_is_refused(pool: Pool, message: str) -> None:
    plan = plan_for(workloads.mlp(), {"pp": 2})

    def job() -> None:
        weft.parallelize(dataclasses.replace(workloads.mlp(), **WRONG[message]), plan)

    with pytest.raises(InputError, match=message):
        pool.run(job, ranks=2)


def test_an_optimizer_that_leaves_parameters_out(pool: Pool) -> None:
    def build() -> weft.Workload:
        return dataclasses.replace(
            workloads.mlp(), optimizer=lambda p: torch.optim.SGD([x for n, x in p.named() if n[0] != "2"], lr=0.1)
        )

    for degrees in ({"pp": 4}, {"dp_shard": 2}):
        holds(pool, build, degrees)


@pytest.mark.parametrize("degrees", ALL, ids=name_of)
@pytest.mark.parametrize("build", [workloads.lora_llama, workloads.lora_mlp], ids=["llama", "mlp"])
@pytest.mark.matrix
def test_adapters_beside_frozen_parameters(pool: Pool, build: Any, degrees: dict[str, int]) -> None:
    if build is workloads.lora_mlp and "tp" in degrees:
        pytest.skip("its layers are no pairs that tensor parallelism divides")
    holds(pool, build, degrees, microbatches=2)


@pytest.mark.parametrize("degrees", REPLICAS, ids=name_of)
@pytest.mark.parametrize("build", [workloads.unused, workloads.tied_frozen], ids=["unused", "tied"])
@pytest.mark.matrix
def test_parameters_without_gradients_stay_as_they_are(pool: Pool, build: Any, degrees: dict[str, int]) -> None:
    holds(pool, build, degrees, microbatches=2)


@pytest.mark.parametrize("degrees", REPLICAS, ids=name_of)
@pytest.mark.matrix
def test_replicas_with_nothing_to_count(pool: Pool, degrees: dict[str, int]) -> None:
    holds(pool, workloads.unlabelled, degrees, microbatches=2)


@pytest.mark.parametrize("degrees", [*REPLICAS, {"pp": 3}, {"pp": 4, "dp_shard": 2}], ids=name_of)
@pytest.mark.parametrize("build", [workloads.adversaries, workloads.towers, workloads.twice])
@pytest.mark.matrix
def test_losses_that_call_parts_of_the_model(pool: Pool, build: Any, degrees: dict[str, int]) -> None:
    holds(pool, build, degrees, microbatches=2)


@pytest.mark.parametrize("degrees", ALL, ids=name_of)
@pytest.mark.matrix
def test_lengths_that_vary_between_steps_and_replicas(pool: Pool, degrees: dict[str, int]) -> None:
    holds(pool, workloads.sentences, degrees, microbatches=2, steps=4)


def test_a_batch_of_any_form_is_cut() -> None:
    @dataclasses.dataclass
    class Rows:
        x: torch.Tensor
        names: list[str]

    from weft.containers import opened

    x = torch.arange(6.0)
    batch = UserDict({"rows": Rows(x, list("abcdef")), "array": x.numpy(), "scale": torch.tensor(2.0), "mode": "train"})
    parts = [divide(opened(batch), replica=r, shares=(1, 1), microbatches=2).microbatches for r in (0, 1)]
    assert [m["rows"].names for part in parts for m in part] == [["a", "b"], ["d", "e"], ["c"], ["f"]]
    assert [m["array"].tolist() for part in parts for m in part] == [[0, 1], [3, 4], [2], [5]]
    assert all(m["mode"] == "train" and float(m["scale"]) == 2 for part in parts for m in part)
    assert type(parts[0][0]) is UserDict
    assert type(parts[0][0]["rows"]) is Rows


def test_the_test_can_fail(pool: Pool) -> None:
    """A replica that normalises by itself is seen."""
    plan = plan_for(workloads.cnn(), {"dp_replicate": 2})

    def job() -> Any:
        from weft.runtime.statistics import BatchStatistics

        before = BatchStatistics.__torch_function__
        BatchStatistics.__torch_function__ = lambda self, func, types, args=(), kwargs=None: func(*args, **kwargs or {})
        try:
            return verify_here(workloads.cnn(), plan, steps=1, dtype="float64")
        finally:
            BatchStatistics.__torch_function__ = before

    result = pool.run(job, ranks=2)[0]
    assert not result.ok
    assert result.loss_error > 1e-6
