"""What a training job does about checkpoints, and which plan it goes on with."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import workloads
from torch import nn

import weft
from weft.capture import Profile, capture
from weft.checkpoint.folder import complete
from weft.cluster import Cluster
from weft.errors import CheckpointError, InputError, NonFiniteError
from weft.jobs.planned import Wanted, fitting, limits_of, plan_alone
from weft.jobs.saves import Saves, check_place
from weft.jobs.train import Order, train_here
from weft.planner import make_plan, search
from weft.runtime.launch import launch
from weft.runtime.meeting import Nodes
from weft.runtime.pool import Pool
from weft.runtime.saver import Later, Saver
from weft.runtime.worker import join
from weft.target import Target

GIB = 2**30
SOURCE = Path(__file__).with_name("fault_target.py")


def workload(batch_size: int = 4, **changes: Any) -> weft.Workload:
    return weft.Workload(
        model=changes.pop("model", lambda: nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 1))),
        loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        data=workloads.Points(32, 12),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=batch_size,
        **changes,
    )


def plan_of(work: weft.Workload, devices: int = 2, **degrees: Any) -> weft.Plan:
    return make_plan(capture(work), Cluster.local(devices), **degrees)


# -- checkpoints of a job -------------------------------------------------------------------------------------------


def test_what_is_on_its_way_is_written_before_training_stops_of_bad_numbers(pool: Pool, tmp_path: Path) -> None:
    def slowly(saver: Saver, later: Sequence[Later], copy: Any = Saver._copy) -> str:
        time.sleep(0.5)
        return str(copy(saver, later))

    def stops(checkpoints: Saves) -> None:
        with checkpoints.finished():
            checkpoints.after(1)
            raise NonFiniteError("not a number", step=2, unit="", what="the loss is nan")

    def job() -> list[str]:
        engine = weft.parallelize(workload(), plan)
        checkpoints = Saves(engine, str(tmp_path), every=1, keep=2, say=print)
        engine.step(next(engine.batches()))
        with mock.patch.object(Saver, "_copy", slowly), pytest.raises(NonFiniteError):
            stops(checkpoints)
        return [path.name for path in complete(tmp_path)]

    plan = plan_of(workload(), dp_replicate=2)
    assert pool.run(job, ranks=2) == [["step-00000001"]] * 2


def test_what_no_checkpoint_can_hold_is_told_before_training(pool: Pool, tmp_path: Path) -> None:
    def made() -> nn.Module:
        model = nn.Sequential(nn.Linear(12, 1))
        model.register_buffer("phase", torch.zeros(2, dtype=torch.complex128))
        return model

    def job() -> None:
        engine = weft.parallelize(work, plan)
        Saves(engine, None, every=None, keep=1, say=print)
        with pytest.raises(CheckpointError, match=r"phase is of torch\.complex128"):
            Saves(engine, str(tmp_path), every=None, keep=1, say=print)

    work = workload(model=made)
    plan = plan_of(work, dp_replicate=2)
    pool.run(job, ranks=2)


def test_a_directory_that_is_a_checkpoint_is_refused(pool: Pool, tmp_path: Path) -> None:
    def job() -> Path:
        return weft.parallelize(workload(), plan).save(tmp_path / "all")

    plan = plan_of(workload(), dp_replicate=2)
    path = pool.run(job, ranks=2)[0]
    for resume in (False, True):
        with pytest.raises(
            CheckpointError, match=re.escape(f"is one checkpoint; give the directory it is in, {path.parent}")
        ):
            check_place(str(path), resume)
    with pytest.raises(CheckpointError, match="holds checkpoints already"):
        check_place(str(path.parent), False)
    check_place(str(path.parent), True)
    check_place(str(tmp_path / "none"), False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 8}, "batch_size was 4 and is 8"),
        ({"seed": 3, "shuffle": False}, "seed was 0 and is 3, shuffle was True and is False"),
        ({}, None),
    ],
)
def test_going_on_with_other_batches_is_told(
    pool: Pool, tmp_path: Path, changes: Mapping[str, Any], said: str | None
) -> None:
    def before() -> None:
        engine = weft.parallelize(workload(), first)
        engine.step(next(engine.batches()))
        engine.save(tmp_path)

    def after() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            weft.parallelize(workload(**changes), then).load(tmp_path)
        return [str(warning.message) for warning in caught]

    first, then = plan_of(workload(), dp_replicate=2), plan_of(workload(**changes), dp_replicate=2)
    pool.run(before, ranks=2)
    told = pool.run(after, ranks=2)
    assert told[1] == []
    if said is None:
        assert told[0] == []
    else:
        assert len(told[0]) == 1
        assert f"other batches than the checkpoint's ({said})" in told[0][0]


class Silent:
    """Somebody who watches and says nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def test_a_line_is_of_the_steps_since_the_last_one(pool: Pool, tmp_path: Path) -> None:
    """After going on from a step that is no multiple of the interval, too."""

    def job(steps: int) -> list[tuple[int, int]]:
        lines = []

        def line(engine: Any, meter: Any, loss: Any, step: int, steps: int, done: int, elapsed_s: float) -> None:
            lines.append((step, done))

        order = Order(plan=plan, constraints={}, steps=steps, checkpoint=str(tmp_path), resume=steps > 3, log_every=5)
        with mock.patch("weft.jobs.train.log_line", line):
            train_here(target, order, Silent())
        return lines

    target = Target.parse(str(SOURCE))
    plan = make_plan(capture(target.load()), Cluster.local(1))
    assert pool.run(job, 3, ranks=1) == [[(3, 3)]]
    assert pool.run(job, 13, ranks=1) == [[(5, 2), (10, 5), (13, 3)]]


# -- plans to go on with --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profiles() -> dict[str, Profile]:
    return {precision: capture(Target.parse(str(SOURCE)).load(), precision) for precision in ("float32", "bf16")}


def going_on(devices: int, before: weft.Plan | None, **asked: Any) -> tuple[Wanted, list[str]]:
    """What is wanted of a job that goes on, and what is said of it."""
    said: list[str] = []
    wanted = Wanted(**{"plan": None, "cluster": None, "constraints": {}, "goes_on": Path("saved"), **asked})
    with mock.patch("weft.jobs.planned.newest_plan", return_value=before):
        return fitting(wanted, devices, said.append), said


def test_a_plan_that_is_asked_for_is_run(profiles: dict[str, Profile]) -> None:
    before = make_plan(profiles["float32"], Cluster.local(2), dp_replicate=2)
    asked = make_plan(profiles["float32"], Cluster.local(2), pp=2, microbatches=2)
    assert going_on(2, before, plan=asked)[0].plan == asked
    assert going_on(2, before)[0].plan == before
    assert going_on(2, before, constraints={"dp_replicate": 2, "recompute": "none"})[0].plan == before
    for constraints in ({"pp": 2}, {"precision": "bf16"}):
        wanted, said = going_on(2, before, constraints=constraints)
        assert wanted.plan is None
        assert wanted.constraints == {"precision": "float32", "compile": False, **constraints}
        assert said == ["the checkpoint's plan is not what is asked for: planning again"]


def test_fewer_devices_keep_the_precision(profiles: dict[str, Profile]) -> None:
    given = search(profiles["bf16"], Cluster.local(4), dp_replicate=4, precision="bf16").plan
    wanted, said = going_on(3, None, plan=given, cluster=Cluster.local(4))
    assert said == ["the plan is for 4 devices and 3 are there: planning again"]
    found = plan_alone(Target.parse(str(SOURCE)), wanted, wanted.cluster, print).plan
    assert (found.devices, found.precision) == (3, "bf16")
    # What it went on with is kept when it dies again, though the given plan, or a fixed degree, cannot be had.
    assert going_on(3, found, plan=given)[0].plan == found
    assert going_on(3, found, constraints={"pp": 4, "precision": "bf16"})[0].plan == found
    assert going_on(3, found, constraints={"pp": 4, "precision": "float32"})[0].plan is None


def test_part_of_a_node_that_no_cluster_can_be_cut_to_is_measured(profiles: dict[str, Profile]) -> None:
    cluster = Cluster.parse("a100-80:2x2")
    assert going_on(3, None, cluster=cluster)[0].cluster is None
    assert going_on(2, None, cluster=cluster)[0].cluster == cluster.with_devices(2)


def test_memory_is_that_of_the_ranks_that_are_there() -> None:
    """What is asked for is of all devices, of which some may be lost."""

    def job() -> tuple[int, ...]:
        join()
        return limits_of((4 * GIB, 2 * GIB, GIB))

    assert launch(job, devices=2, memory="2GiB,1GiB", device="cpu") == [(2 * GIB, GIB)] * 2


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"device_check": "true"}, "--restarts"),
        ({"nodes": Nodes(least=1, most=2, rendezvous="127.0.0.1:29400")}, "--restarts"),
        ({"timeout_s": float("inf")}, "--timeout"),
        ({"timeout_s": 1e15}, "--timeout"),
    ],
)
def test_what_no_job_can_do_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Order(constraints={}, **asked)
