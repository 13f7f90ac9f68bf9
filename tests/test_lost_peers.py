"""Ranks that lose a peer because it waited too long for another: they leave it to say for whom."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from weft.errors import StuckError, WorkerError
from weft.runtime.failure import Failure
from weft.runtime.hang import LINGER_S, MOMENT_S, linger
from weft.runtime.launch import launch
from weft.runtime.logbook import Logbook, give_up, read
from weft.schedule import Kind

TIMEOUT_S = 3.0
HOST = os.uname().nodename


def chain(how: signal.Signals) -> None:
    """Rank 0 waits for rank 1, and that, since longer, for rank 2, which gets a signal."""
    rank, log = dist.get_rank(), Logbook.here()
    log.introduce(stage=rank, pipeline=(0, 1, 2), timeout_s=TIMEOUT_S)
    log.begin_step(4)
    dist.barrier()
    if rank == 2:
        os.kill(os.getpid(), how)
        time.sleep(600)
    if rank == 0:
        time.sleep(TIMEOUT_S / 2)
    log.wait(Kind.RECEIVE_GRADIENT, 0, rank + 1, "block.1")
    waits = dist.irecv(torch.ones(4), rank + 1)
    assert waits is not None
    waits.wait(timedelta(seconds=TIMEOUT_S))


def test_a_stopped_rank_is_named_where_its_waiter_has_a_waiter() -> None:
    with pytest.raises(StuckError) as caught:
        launch(chain, signal.SIGSTOP, devices=3, device="cpu")
    assert (caught.value.rank, caught.value.stage, caught.value.step) == (2, 2, 4)
    assert f"is stuck: stopped by a signal (step 5, beginning); rank 1 (stage 1) on {HOST} gave up" in str(caught.value)


def test_a_killed_rank_is_named_where_its_waiter_has_a_waiter() -> None:
    with pytest.raises(WorkerError, match=r"^rank 2 failed: killed by SIGKILL"):
        launch(chain, signal.SIGKILL, devices=3, device="cpu")


def lingers(job: Path, world: int) -> float:
    """Seconds that rank 0 stays."""
    begun = time.monotonic()
    linger(job, 0, world)
    return time.monotonic() - begun


def test_one_that_lost_a_peer_stays_while_there_is_something_to_find_out(tmp_path: Path) -> None:
    assert lingers(tmp_path, 2) < LINGER_S  # it keeps no logbook
    Logbook(tmp_path / "0.log", 0)
    Logbook(tmp_path / "1.log", 1)
    assert lingers(tmp_path, 2) >= LINGER_S  # rank 1 is to say something
    note = read(tmp_path / "0.log")
    assert note is not None
    assert note.gave_up
    assert not note.timed_out
    assert MOMENT_S <= lingers(tmp_path, 3) < LINGER_S  # rank 2 may be gone with its host
    give_up(tmp_path / "1.log")
    assert lingers(tmp_path, 3) >= LINGER_S
    Failure(rank=1, moment=0.0, cause="broken", traceback="", lost_peer=False).save(tmp_path / "1.failure")
    assert lingers(tmp_path, 2) < LINGER_S


def test_one_that_lost_a_peer_leaves_where_one_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Logbook(tmp_path / "0.log", 0)
    with subprocess.Popen(["true"]) as gone:
        os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)  # nobody has asked for its exit code
        with monkeypatch.context() as patch:
            patch.setattr("os.getpid", lambda: gone.pid)
            Logbook(tmp_path / "1.log", 1)
        assert lingers(tmp_path, 2) < LINGER_S
    assert lingers(tmp_path, 2) < LINGER_S
