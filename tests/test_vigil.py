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
from fault_target import BUSY_S
from faults import TARGET, Run, same
from torch._C._distributed_c10d import HashStore

from weft.capture import capture
from weft.cluster import Cluster
from weft.planner import make_plan
from weft.runtime import vigil
from weft.runtime.failure import read_failure
from weft.runtime.logbook import Logbook
from weft.runtime.vigil import SIGNS, Vigil
from weft.target import Target

HOST = os.uname().nodename
TIMEOUT_S = 4.0
SOON_S = TIMEOUT_S + 4


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    make_plan(capture(Target.parse(TARGET).load()), Cluster.local(2), pp=2, microbatches=2).save(path)
    return str(path)


def train(directory: Path, plan: str, *arguments: str, fault: str) -> Run:
    asked = ["--plan", plan, "--steps", "6", "--checkpoint-every", "3", "--timeout", str(TIMEOUT_S)]
    return Run.start(directory, *asked, *arguments, fault=fault)


def test_ranks_that_hang_while_a_job_starts_and_one_that_computes(plan: str, tmp_path: Path) -> None:
    ended = train(tmp_path / "busy", plan, fault="model:0:1:busy").end()
    assert BUSY_S > TIMEOUT_S
    assert ended.code == 0, ended.said
    losses = ended.result["losses"]

    faults = ["import:0:1:SIGSTOP", "forward:0:0:SIGSTOP", "model:0:1:idle"]
    run = train(tmp_path / "hangs", plan, "--restarts", "3", fault=",".join(faults))
    for number in (1, 2):
        assert run.until(lambda: any(map(stopped, run.workers()))), run.said()
        stops, before = [each for each in run.workers() if stopped(each)], time.monotonic()
        assert run.until(lambda: f"restart {number} of 3" in run.said()), run.said()
        assert TIMEOUT_S - 1 < time.monotonic() - before < SOON_S
        assert not any(each.is_running() for each in stops)
    ended = run.end()
    assert ended.code == 0, ended.said
    imports, forward, model = (death["cause"] for death in ended.result["deaths"])
    stuck = r"is stuck: stopped by a signal for \d s"
    assert re.match(rf"rank 1 on {HOST} {stuck} \(loading the workload\); rank 0 on .* waited for others: ", imports)
    assert re.match(rf"rank 0 \(stage 0\) on {HOST} {stuck} \(step 1, forward of microbatch 0\); rank 1 ", forward)
    assert re.match(rf"rank 1 \(stage 1\) on {HOST} is stuck: nothing new for \d+ s \(starting\); rank 0 ", model)
    assert [death["step"] for death in ended.result["deaths"]] == [None, 1, None]
    assert ended.result["losses"] == losses
    same(tmp_path / "hangs", tmp_path / "busy")


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
        processes.extend(subprocess.Popen(["/bin/sh", "-c", command]) for command in commands)
        return {rank: process.pid for rank, process in enumerate(processes)}

    yield start
    for process in processes:
        for each in [*psutil.Process(process.pid).children(), process]:
            each.kill()
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


def test_processes_that_do_nothing_hang(start: Start, tmp_path: Path) -> None:
    workers = start("exec sleep 60", "exec sleep 60")
    assert not hangs(tmp_path, workers, timeout_s=None)
    log = Logbook(tmp_path / "0.log", 0)
    assert not hangs(tmp_path, workers, lambda: log.note("planning"))
    assert hangs(tmp_path, workers)
    why = r"no process has done anything for \d s \(starting, before it could note what it does\)"
    assert re.fullmatch(f"rank 1 on {HOST} is stuck: {why}", str(read_failure(tmp_path, {})))
    assert all(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in workers.values())


def test_a_process_whose_child_computes_does_not_hang(start: Start, tmp_path: Path) -> None:
    assert not hangs(tmp_path, start("exec sleep 60", "(while :; do :; done) & wait"))


def test_processes_do_not_hang_while_those_of_another_node_get_on(start: Start, tmp_path: Path) -> None:
    workers, store = start("exec sleep 60"), HashStore()
    assert not hangs(tmp_path, workers, lambda: store.add(SIGNS, 1), world=2, store=store)
    assert hangs(tmp_path, workers, world=2, store=store)


def test_after_the_first_step_only_what_is_stopped_hangs(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.runtime.hang.SETTLE_S", 0.1)
    workers, log = start("exec sleep 60"), Logbook(tmp_path / "0.log", 0)
    log.introduce(stage=0, pipeline=(0,), timeout_s=0.5)
    log.begin_step(7)
    assert not hangs(tmp_path, workers)
    os.kill(workers[0], signal.SIGSTOP)
    assert hangs(tmp_path, workers)
    assert "stopped by a signal for 1 s (step 8, beginning)" in str(read_failure(tmp_path, {}))
    assert psutil.Process(workers[0]).status() == psutil.STATUS_ZOMBIE
