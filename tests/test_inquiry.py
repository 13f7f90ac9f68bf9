"""A command that is asked about devices may hang: nobody waits for it but who must, and nothing of it stays behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from weft.runtime.inquiry import REAP_S, Inquiry
from weft.runtime.launch import launch_again
from weft.runtime.meeting import Nodes
from weft.runtime.restarts import Restarts

LONG_S = 300
SOON_S = 20


def hanging(pid: Path) -> str:
    """A command that starts another one, which does not end, and says which."""
    return f"sleep {LONG_S} & echo $! > {pid}.part; mv {pid}.part {pid}; wait"


def until_there(path: Path) -> None:
    end = time.monotonic() + SOON_S
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


def over(pid: Path) -> bool:
    """Whether the process of that number ends, soon."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            if psutil.Process(int(pid.read_text())).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_a_command_that_hangs_counts_as_failed_and_is_ended(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    restarts = Restarts(command=f"test $WEFT_DEVICE = 1 || exit 0; {hanging(pid)}", ask_at_most_s=1.0)
    assert restarts.there((0, 1, 2)) == (0, 2)
    assert over(pid)


def test_nobody_waits_for_lost_devices(tmp_path: Path) -> None:
    pid, answers, longest_s = tmp_path / "pid", [], 0.0
    command = f"test $WEFT_DEVICE = 1 || exit 0; {hanging(pid)}"
    restarts = Restarts(command=command, ask_every_s=0.0, ask_at_most_s=3.0)
    begun = time.monotonic()
    while () not in answers[:1] or not answers[-1]:
        before = time.monotonic()
        answers.append(restarts.more((0, 1, 2), (0,)))
        longest_s = max(longest_s, time.monotonic() - before)
        assert before - begun < SOON_S
        time.sleep(0.05)
    assert set(answers) == {(), (2,)}
    assert time.monotonic() - begun >= 3
    assert longest_s < 2
    assert over(pid)


def test_an_answer_that_nobody_waits_for_any_more_is_forgotten(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    restarts = Restarts(command=f"test ! -e {pid} -a $WEFT_DEVICE = 1 || exit 0; {hanging(pid)}", ask_every_s=0.0)
    assert restarts.more((0, 1), (0,)) == ()
    until_there(pid)
    assert restarts.there((0, 1)) == (0, 1)
    assert over(pid)
    assert restarts.more((0, 1), (0, 1)) == ()


def test_what_cannot_be_ended_blocks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    inquiry = Inquiry("exec sleep 60", (0,), 0.1)
    with inquiry, monkeypatch.context() as patch:
        inquiry.begin()
        (process,) = inquiry._processes.values()
        patch.setattr("os.killpg", lambda *_: None)
        inquiry.wait()
        before = time.monotonic()
        inquiry.close()
        assert time.monotonic() - before < 10 * REAP_S
    process.kill()
    process.wait()


def test_a_job_that_ends_ends_what_is_being_asked(tmp_path: Path) -> None:
    pid, asked = tmp_path / "pid", tmp_path / "asked"
    command = f"test $WEFT_DEVICE = 0 && exit 0; test -e {asked} || {{ touch {asked}; exit 1; }}; {hanging(pid)}"

    def job() -> int:
        until_there(pid)
        return dist.get_world_size()

    restarts = Restarts(command=command, ask_every_s=0.0)
    before = time.monotonic()
    assert launch_again(job, restarts=restarts, nodes=Nodes(), devices=2, device="cpu") == [1]
    assert time.monotonic() - before < restarts.ask_at_most_s
    assert over(pid)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_is_being_asked(tmp_path: Path, how: signal.Signals) -> None:
    pid = tmp_path / "pid"
    code = f"""
        import signal
        from weft.runtime.restarts import Restarts
        from weft.runtime.signals import interruptible
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with interruptible():
            Restarts(command={hanging(pid)!r}).there((0,))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as asks:
        until_there(pid)
        asks.send_signal(how)
        assert asks.wait(SOON_S) == -how
    assert over(pid)
