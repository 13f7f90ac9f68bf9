"""A rank that hangs: the error comes soon, and names it, where it is and what it was doing."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
import workloads
from test_equality import plan_for
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import weft
from weft.errors import StuckError
from weft.runtime.agent import SHUTDOWN_S
from weft.runtime.failure import first
from weft.runtime.hang import SETTLE_S, Stuck, find
from weft.runtime.logbook import JOB, WHO, Logbook, Note, Who, give_up, read, step_of
from weft.runtime.pool import Pool
from weft.schedule import Kind

TIMEOUT_S, GRACE_S = 2.0, 2.5
"""The pool's own grace is for machines that are busier."""
SOON_S = TIMEOUT_S + GRACE_S + 8
"""Of which starting to train takes some."""


class Trap(nn.Module):
    """A layer in which a process can hang."""

    how = ""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        how = Trap.how
        if how in ("stops", "sleeps") and not isinstance(x, FakeTensor):
            hang(how)
        return torch.tanh(self.linear(x))


def hang(how: str) -> None:
    if how == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        time.sleep(1)


def workload() -> weft.Workload:
    return weft.Workload(
        model=lambda: nn.Sequential(*(Trap() for _ in range(4)), nn.Linear(12, 1)),
        loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        data=workloads.Points(640, 12),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=8,
    )


def train(plan: weft.Plan, stuck: int, how: str) -> None:
    """Train for ever; one rank hangs in its fourth step, or after it."""
    engine = weft.parallelize(workload(), plan)
    engine.limit_waiting(TIMEOUT_S)
    for batch in engine.batches(epochs=None):
        if engine.step_count == 3 and int(os.environ["RANK"]) == stuck:
            Trap.how = how
        engine.step(batch)
        if Trap.how == "outside":
            hang(how)


@pytest.fixture(scope="module")
def processes() -> Iterator[Pool]:
    """A pool of its own: what hangs is ended, and must leave nothing behind."""
    with Pool(4, device="cpu", timeout_s=60) as pool:
        yield pool


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, processes: Pool) -> Pool:
    """That pool, in more of a hurry."""
    monkeypatch.setattr("weft.runtime.pool.GRACE_S", GRACE_S)
    return processes


def caught(pool: Pool, degrees: dict[str, Any], stuck: int, how: str, **settings: Any) -> StuckError:
    """The error of a job of which one rank hangs. The first run only starts the processes."""
    plan = plan_for(workload(), degrees, **settings)
    pool.run(time.sleep, 0, ranks=plan.devices)
    before = time.monotonic()
    with pytest.raises(StuckError) as found:
        pool.run(train, plan, stuck, how, ranks=plan.devices)
    assert TIMEOUT_S < time.monotonic() - before < SOON_S
    assert (found.value.rank, found.value.host) == (stuck, os.uname().nodename)
    assert found.value.stage == stuck // (plan.devices // plan.pp)
    assert found.value.step == 3
    where = f"rank {stuck} (stage {found.value.stage}) on {found.value.host}"
    assert str(found.value).startswith(f"{where} is stuck: ")
    return found.value


@pytest.mark.parametrize(("stuck", "how"), [(0, "sleeps"), (1, "stops")])
@pytest.mark.long
def test_a_stage_that_hangs_in_its_forward(own: Pool, stuck: int, how: str) -> None:
    error = caught(own, {"pp": 2}, stuck, how, microbatches=2)
    assert error.action == "step 4, forward of microbatch 0"
    assert ("stopped by a signal" in error.cause) == (how == "stops")
    assert f"rank {1 - stuck} (stage {1 - stuck}) on {error.host} gave up after 2 s" in error.cause
    assert error.tensor == ("2" if stuck == 0 else "the gradient of 2")


@pytest.mark.parametrize(
    ("degrees", "waits"),
    [({"dp_replicate": 2}, "summing gradients over the replicas"), ({"dp_shard": 2}, "gathering the parameters of 1")],
)
@pytest.mark.long
def test_a_replica_that_hangs_in_its_forward(own: Pool, degrees: dict[str, Any], waits: str) -> None:
    error = caught(own, degrees, 1, "stops")
    assert error.action == "step 4, forward of microbatch 0"
    assert error.cause.endswith(f"gave up after 2 s: step 4, {waits}")


@pytest.mark.long
def test_one_of_four_hangs_in_the_users_loop_and_all_others_wait_for_each_other(own: Pool) -> None:
    error = caught(own, {"pp": 2, "dp_replicate": 2}, 2, "outside", microbatches=2)
    assert error.action == "step 4, after it, in the training loop"


def test_a_rank_under_torchrun_says_whom_it_waited_for(own: Pool) -> None:
    plan = plan_for(workload(), {"pp": 2}, microbatches=2)

    def job() -> str:
        del os.environ[JOB]  # which torchrun does not set
        engine = weft.parallelize(workload(), plan)
        engine.limit_waiting(1)
        batch = next(engine.batches())
        engine.step(batch)
        if engine.grid.stage == 1:
            time.sleep(3)
            return ""
        try:
            engine.step(batch)
        except StuckError as error:
            return str(error)
        raise AssertionError("nobody was missed")

    said, _ = own.run(job, ranks=2)
    assert said.startswith("rank 1 (stage 1) on an unknown host is stuck: ")
    assert "waiting for the gradient of 2 of microbatch 0 from stage 1" in said


def test_a_job_goes_on_where_one_rank_is_slow_to_start(own: Pool) -> None:
    plan = plan_for(workload(), {"pp": 2}, microbatches=2)

    def slow() -> int:
        engine = weft.parallelize(workload(), plan)
        engine.limit_waiting(0.5)
        for batch in engine.batches():
            if engine.step_count == 0 and os.environ["RANK"] == "1":
                time.sleep(1.5)  # as one that compiles
            engine.step(batch)
            if engine.step_count == 4:
                break
        return engine.step_count

    assert own.run(slow, ranks=2) == [4, 4]


TARGET = """
import torch, weft
from torch import nn

class Points:
    def __len__(self):
        return 1 << 20
    def __getitem__(self, i):
        return torch.full((12,), i / 1e6), torch.ones(1)

def workload():
    return weft.Workload(
        model=lambda: nn.Sequential(*(nn.Linear(12, 12) for _ in range(4)), nn.Linear(12, 1)),
        loss=lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
        data=Points(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01), batch_size=8,
    )
"""


@pytest.mark.long
def test_a_process_of_weft_train_that_is_stopped_at_any_moment(tmp_path: Path) -> None:
    (tmp_path / "target.py").write_text(TARGET)
    plan_for(workload(), {"pp": 2}, microbatches=2).save(tmp_path / "plan.json")
    command = [sys.executable, "-c", "from weft.cli import main; main()", "train", "target.py", "--plan", "plan.json"]
    with subprocess.Popen(
        [*command, "--timeout", "2", "--log-every", "20"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        assert job.stdout is not None
        assert job.stderr is not None
        next(line for line in job.stdout if " 40/" in line)
        workers = psutil.Process(job.pid).children(recursive=True)
        (stuck,) = [each for each in workers if each.environ().get("RANK") == "1"]
        stuck.suspend()
        before = time.monotonic()
        said = job.stderr.read()
        assert job.wait() == 1
        assert time.monotonic() - before < TIMEOUT_S + SETTLE_S + SHUTDOWN_S + 5
    last = said.splitlines()[-1]
    assert last.startswith(f"weft: rank 1 (stage 1) on {os.uname().nodename} is stuck: stopped by a signal (step ")
    assert "; rank 0 (stage 0) on " in last
    assert not any(each.is_running() for each in workers)


def note(rank: int, **settings: Any) -> Note:
    """What a rank of three stages noted ten seconds ago, waiting unless said otherwise."""
    host = settings.pop("host", "here")
    who = Who(rank=rank, host=host, pid=0, stage=rank, pipeline=(0, 1, 2), timeout_s=5.0)
    default = {"moment": 90.0, "step": 6, "kind": Kind.RECEIVE_ACTIVATION, "microbatch": 1, "peer": rank - 1}
    return Note(**{"who": who, "waiting": True, "what": "block.1", **default, **settings})


def found(*notes: Note, mine: int = 0, world: int = 3) -> Stuck:
    known = {each.who.rank: each for each in notes}
    return find(known[mine], known, world=world, now=100.0)


def test_the_rank_that_computes_is_stuck_and_not_one_that_waits_for_it() -> None:
    first = note(0, kind=Kind.RECEIVE_GRADIENT, peer=1, gave_up=True)
    stuck = found(first, note(1, moment=80.0), note(2, kind=Kind.FORWARD, waiting=False, what="", moment=85.0))
    assert (stuck.rank, stuck.stage, stuck.action) == (2, 2, "step 7, forward of microbatch 1")
    assert stuck.tensor == "the gradient of block.1"
    assert stuck.cause.startswith("nothing new for 15 s (step 7, forward of microbatch 1); rank 0 (stage 0) on here ")


def test_the_rank_that_is_a_step_behind_is_stuck_whatever_it_does() -> None:
    stuck = found(note(0, gave_up=True), note(1, step=5), note(2, kind=Kind.FORWARD, waiting=False))
    assert stuck.rank == 1


def test_a_rank_of_another_host_is_named_by_who_waits_for_it() -> None:
    first = note(0, kind=Kind.RECEIVE_GRADIENT, peer=1, gave_up=True)
    stuck = found(first)
    assert (stuck.rank, stuck.stage, stuck.host) == (1, 1, "an unknown host")
    assert stuck.cause.endswith("waiting for the gradient of block.1 of microbatch 1 from stage 1")
    assert found(first, note(2)).rank == 1  # which waits as well
    assert found(first, note(2, kind=Kind.FORWARD, waiting=False)).rank == 2


def test_ranks_that_all_wait_for_one_another() -> None:
    stuck = found(note(0, gave_up=True), note(1, gave_up=True), note(2, gave_up=True))
    why = (
        "all ranks wait for one another, or the link between them is dead, or they disagree; rank 0 (stage 0) on here "
    )
    assert stuck.cause.startswith(why)


def test_an_abort_of_a_rank_that_waited_too_long_names_the_one_it_waited_for() -> None:
    now = time.monotonic()
    waits = note(0, kind=Kind.RECEIVE_GRADIENT, peer=1, moment=now - 6)
    works = note(1, kind=Kind.BACKWARD, waiting=False, what="", moment=now - 7)
    error = first([], {0: -signal.SIGABRT}, {}, {0: waits, 1: works})
    assert isinstance(error, StuckError)
    assert (error.rank, error.action, error.tensor) == (
        1,
        "step 7, backward of microbatch 1",
        "the gradient of block.1",
    )
    recent = dataclasses.replace(waits, moment=now)
    assert not isinstance(first([], {0: -signal.SIGABRT}, {}, {0: recent, 1: works}), StuckError)


def test_what_is_noted_can_be_read_by_others(tmp_path: Path) -> None:
    path = tmp_path / "5.log"
    log = Logbook(path, 5)
    assert log.last().describe() == "starting"
    log.introduce(stage=1, pipeline=(2, 5), timeout_s=30.0)
    log.begin_step(6)
    log.wait(Kind.RECEIVE_GRADIENT, 3, 1, "block.1" * 30)
    give_up(path)
    last = read(path)
    assert last is not None
    assert last.who == Who(rank=5, host=os.uname().nodename, pid=os.getpid(), stage=1, pipeline=(2, 5), timeout_s=30.0)
    assert (last.step, last.kind, last.microbatch, last.peer) == (6, Kind.RECEIVE_GRADIENT, 3, 1)
    assert (last.awaited, last.gave_up) == (5, True)
    assert last.what.startswith("block.1block.1")
    assert step_of(tmp_path) == 6
    log.introduce(stage=1, pipeline=tuple(range(2000)))  # more than a page
    assert read(path) is not None
    path.write_bytes(b"")
    assert read(path) is None


def test_what_is_just_being_written_is_not_there_yet(tmp_path: Path) -> None:
    path = tmp_path / "5.log"
    log = Logbook(path, 5)
    log.introduce(stage=1, pipeline=(2, 5), timeout_s=30.0)
    long = path.read_bytes()
    log.introduce()
    short = path.read_bytes()
    for at in range(WHO, WHO + 200):
        for page in (short[:at] + long[at:], long[:at] + short[at:]):
            path.write_bytes(page)
            found = read(path)
            assert found is None or found.who.rank == 5
    path.write_bytes(b"no kind of action" * 5 + long[85:])
    assert read(path) is None
