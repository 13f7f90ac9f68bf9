"""Signals: what the caller ignores goes on being ignored, and the caller's own handlers come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import SignalException

from weft.runtime.signals import CAUGHT, given_back, raised

SOON_S = 40


def test_a_job_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    go = tmp_path / "go"
    code = f"""
        import signal
        from pathlib import Path
        from weft.runtime.launch import launch
        def job():
            import os, time
            os.write(1, b"up\\n")
            while not Path({str(go)!r}).exists():
                time.sleep(0.05)
        launch(job, devices=1, device="cpu")
        print(signal.getsignal(signal.SIGHUP).name, flush=True)
    """
    with subprocess.Popen(
        ["nohup", sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == b"up\n"
        job.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        go.touch()
        assert job.stdout.readline() == b"SIG_IGN\n"
        assert job.wait(SOON_S) == 0


def test_the_agent_is_told_what_to_catch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CAUGHT, raising=False)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with given_back():
            assert os.environ[CAUGHT] == "SIGTERM,SIGINT,SIGQUIT"
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert CAUGHT not in os.environ
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        monkeypatch.setenv(CAUGHT, "SIGUSR1, SIGHUP,SIGNOTHING")
        with given_back():
            assert os.environ[CAUGHT] == "SIGUSR1"
        assert os.environ[CAUGHT] == "SIGUSR1, SIGHUP,SIGNOTHING"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_would_end_this_process_ends_the_block_first() -> None:
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(SignalException) as caught, raised():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.sigval == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
