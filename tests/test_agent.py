"""The agent of a node: what it says when a job is given up, and on a machine that the job did not need."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest

from weft.errors import GaveUpError, JobError
from weft.runtime import agent
from weft.runtime.meeting import LOOPBACK, Meeting, Nodes
from weft.runtime.restarts import Restarts
from weft.runtime.signals import given_back

DIES = """
import os
from pathlib import Path
from weft.runtime.logbook import Logbook
log = Logbook(Path({job!r}, "0.log"))
log.begin_step(5 + {gains} * int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
os._exit(3)
"""


def run(job: Path, code: str, restarts: Restarts, nodes: Nodes | None = None) -> None:
    """A job of one process."""
    start = agent.Start(
        job=job,
        devices=[0],
        command=lambda _: ["-c", code],
        write_settings=lambda _: None,
        nodes=nodes or Nodes(),
        restarts=restarts,
    )
    with given_back():
        agent.run(start)


def test_the_last_death_is_told_with_those_before(tmp_path: Path) -> None:
    restarts = Restarts(limit=2, say=lambda _: None, pause_s=0.01)
    with pytest.raises(GaveUpError) as caught:
        run(tmp_path, DIES.format(job=str(tmp_path), gains=1), restarts)
    why = "on 1 device: rank 0 failed: exited with code 3"
    told = "; ".join(f"at step {step} {why}" for step in (6, 7, 8))
    assert str(caught.value) == f"gave up: it was restarted 2 times; {told}"
    assert len(restarts.deaths) == 2


def test_the_same_step_twice_is_told_though_no_restart_is_left(tmp_path: Path) -> None:
    with pytest.raises(GaveUpError, match="gave up: it died at step 6 twice in a row; at step 6 on 1 device: "):
        run(tmp_path, DIES.format(job=str(tmp_path), gains=0), Restarts(limit=1, say=lambda _: None, pause_s=0.01))


def test_a_machine_that_was_not_needed_is_told_so(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    nodes = Nodes(rendezvous=f"{LOOPBACK}:{port}")
    needed = Meeting.of(nodes, "weft")
    needed.next_rendezvous()

    def end() -> None:
        while not needed._state_holder.state.redundancy_list:
            needed.num_nodes_waiting()  # which looks
            time.sleep(0.1)
        needed.shutdown()

    ends = threading.Thread(target=end, daemon=True)
    ends.start()
    with pytest.raises(JobError, match="the job is over: it had as many machines as it may, and never needed this one"):
        run(tmp_path, "pass", Restarts(), nodes)
    ends.join()
