"""A rank that hangs while its job starts, where no rank could tell: found from outside, and soon."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from fault_target import BUSY_S
from faults import TARGET, Run
from torch._C._distributed_c10d import HashStore

from weft.capture import capture
from weft.cluster import Cluster
from weft.jobs.reference import SingleDevice
from weft.planner import make_plan
from weft.runtime import vigil
from weft.runtime.failure import read_failure
from weft.runtime.logbook import Logbook
from weft.runtime.vigil import SIGNS, Vigil
from weft.target import Target

HOST = os.uname().nodename
TIMEOUT_S, STEPS = 4.0, 6
SOON_S = TIMEOUT_S + 4


def test_a_job_whose_ranks_hang_while_it_starts_goes_on(tmp_path: Path) -> None:
    """In the first attempt a rank is stopped, in the second one sleeps, in the third one computes: that is no fault."""
    assert BUSY_S > TIMEOUT_S
    plan = make_plan(capture(Target.parse(TARGET).load()), Cluster.local(2), pp=2, microbatches=2)
    plan.save(tmp_path / "plan.json")
    asked = ["--plan", str(tmp_path / "plan.json"), "--steps", str(STEPS), "--timeout", str(TIMEOUT_S)]
    faults = ["import:0:1:SIGSTOP", "forward:0:0:idle", "model:0:1:busy"]
    run = Run.start(tmp_path / "run", *asked, "--checkpoint-every", "3", "--restarts", "3", fault=",".join(faults))
    assert run.until(lambda: any(map(stopped, run.workers()))), run.said()
    stops, before = [each for each in run.workers() if stopped(each)], time.monotonic()
    assert run.until(lambda: "restart 1 of 3" in run.said()), run.said()
    assert TIMEOUT_S - 1 < time.monotonic() - before < SOON_S
    assert not any(each.is_running() for each in stops)
    ended = run.end()
    assert ended.code == 0, ended.said
    first, second = (death["cause"] for death in ended.result["deaths"])
    assert re.fullmatch(  # rank 0 may still be busy with its own start by then
        rf"rank 1 on {HOST} is stuck: stopped by a signal for \d s \(loading the workload\)"
        rf"(; rank 0 on {HOST} waited for others: learning from rank 0 what it planned)?",
        first,
    )
    assert re.match(
        rf"rank 0 \(stage 0\) on {HOST} is stuck: nothing new for \d+ s \(step 1, forward of microbatch 0\); "
        rf"rank 1 \(stage 1\) on {HOST} gave up after \d s: step 1, waiting for .* of microbatch 0 from stage 0",
        second,
    )
    alone = SingleDevice(Target.parse(TARGET).load(), torch.device("cpu"), plan=plan)
    assert ended.result["losses"] == pytest.approx([step.loss for step in alone.steps(STEPS)], rel=1e-10)


def stopped(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


Start = Callable[..., dict[int, int]]
"""Starts shell commands, and gives their process ids by rank."""


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Such processes are looked at twenty times a second."""
    monkeypatch.setattr(vigil, "LOOK_S", 0.05)
    processes: list[subprocess.Popen[bytes]] = []

    def start(*commands: str) -> dict[int, int]:
        for command in commands:
            processes.append(subprocess.Popen(["/bin/sh", "-c", command], start_new_session=True))
        return {rank: process.pid for rank, process in enumerate(processes)}

    yield start
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)  # what it started too
        process.wait()


def hangs(
    job: Path,
    workers: dict[int, int],
    also: Callable[[], object] = int,
    *,
    timeout_s: float | None = 0.5,
    **settings: Any,
) -> bool:
    """Whether somebody who looks, and does something else in between, finds out that they hang."""
    watch, end = Vigil(job, timeout_s), time.monotonic() + 1.5
    while time.monotonic() < end:
        if watch.ends(workers, **{"world": len(workers), **settings}):
            return True
        also()
        time.sleep(0.01)
    return False


def over(pid: int) -> bool:
    """Whether a process has ended, soon."""
    end = time.monotonic() + 10
    while (there := psutil.Process(pid).status() != psutil.STATUS_ZOMBIE) and time.monotonic() < end:
        time.sleep(0.01)
    return not there


def test_processes_that_do_nothing_hang(start: Start, tmp_path: Path) -> None:
    workers = start("exec sleep 60", "exec sleep 60")
    assert not hangs(tmp_path, workers, timeout_s=None)
    log = Logbook(tmp_path / "0.log", 0)
    assert not hangs(tmp_path, workers, lambda: log.note("planning"))
    assert hangs(tmp_path, workers)
    why = r"no process has done anything for \d s \(starting, before it could note what it does\)"
    assert re.fullmatch(f"rank 1 on {HOST} is stuck: {why}", str(read_failure(tmp_path, {})))
    assert all(over(pid) for pid in workers.values())


def test_a_process_whose_child_computes_does_not_hang(start: Start, tmp_path: Path) -> None:
    assert not hangs(tmp_path, start("exec sleep 60", "(while :; do :; done) & wait"))


def test_a_process_that_waits_for_others_does_not_compute(start: Start, tmp_path: Path) -> None:
    """It may spin, as with NCCL: while it says that it waits, who hangs is another."""
    workers, log = start("while :; do :; done", "exec sleep 60"), Logbook(tmp_path / "0.log", 0)
    log.note("learning from rank 1 what it planned")
    assert not hangs(tmp_path, workers)
    log.note("learning from rank 1 what it planned", waiting=True)
    assert hangs(tmp_path, workers)
    said = str(read_failure(tmp_path, {}))
    assert said.startswith(f"rank 1 on {HOST} is stuck: no process has done anything for ")
    assert "; rank 0 on " in said
    assert said.endswith(" waited for others: learning from rank 1 what it planned")


def test_processes_do_not_hang_while_those_of_another_node_get_on(start: Start, tmp_path: Path) -> None:
    workers, store = start("exec sleep 60"), HashStore()
    assert not hangs(tmp_path, workers, lambda: store.add(SIGNS, 1), world=2, store=store)
    assert hangs(tmp_path, workers, world=2, store=store)


def test_after_the_first_step_only_what_is_stopped_hangs(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.runtime.hang.SETTLE_S", 0.1)
    workers, log = start("exec sleep 60"), Logbook(tmp_path / "0.log", 0)
    assert not hangs(tmp_path, workers, world=1)
    log.introduce(stage=0, pipeline=(0,), timeout_s=0.5)
    log.begin_step(7)
    assert not hangs(tmp_path, workers, world=2)
    os.kill(workers[0], signal.SIGSTOP)
    assert hangs(tmp_path, workers)
    assert "stopped by a signal for 1 s (step 8, beginning)" in str(read_failure(tmp_path, {}))
    assert over(workers[0])
