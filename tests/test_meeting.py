"""Where the machines of a job meet: clocks that differ, machines that are gone or silent, places that are none."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _RendezvousState

from weft.errors import InputError
from weft.runtime import agent, meeting, register
from weft.runtime.agent import Agent, LeavesError, Start
from weft.runtime.meeting import LAST_CALL, LOOPBACK, LostNodeError, Meeting, Nodes
from weft.runtime.register import Register, SilentError, answer
from weft.runtime.restarts import Restarts
from weft.runtime.vigil import Vigil

PATIENCE_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def nodes_at(port: int, least: int = 1, most: int = 2) -> Nodes:
    return Nodes(least=least, most=most, rendezvous=f"{LOOPBACK}:{port}")


Child = Callable[..., subprocess.Popen[str]]
"""Starts another host's Python: ``child(code, *arguments)``."""


@pytest.fixture
def child() -> Iterator[Child]:
    with contextlib.ExitStack() as started:

        def start(code: str, *arguments: object) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", code, *map(str, arguments)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            started.enter_context(process)
            started.callback(process.kill)
            return process

        yield start


def said(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=PATIENCE_S)[0]


@contextlib.contextmanager
def interrupted(after_s: float) -> Iterator[None]:
    """Ctrl-C after a while."""
    timer = threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


@pytest.fixture
def own_signals() -> Iterator[None]:
    """The agent puts its handlers in the place of others."""
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {name: signal.getsignal(name) for name in names}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


MEETS = """
import sys, time
from datetime import timedelta
import torch.distributed.elastic.rendezvous.dynamic_rendezvous as dynamic
from weft.runtime import register
from weft.runtime.meeting import Meeting, Nodes
real, ahead = dynamic.datetime, timedelta(seconds=float(sys.argv[2]))
class Clock(real):
    @classmethod
    def now(cls, tz=None):
        return real.now(tz) + ahead
dynamic.datetime = register.datetime = Clock
meeting = Meeting.of(Nodes(least=2, most=2, rendezvous=sys.argv[1]), "weft")
world = meeting.next_rendezvous().world_size
time.sleep(6)
meeting.num_nodes_waiting()
print(world, len(meeting._state_holder.state.participants))
"""


def test_hosts_whose_clocks_differ_agree_on_who_is_there(child: Child) -> None:
    nodes = nodes_at(free_port(), least=2)
    made = Meeting.of(nodes, "weft")

    def there() -> int:
        made.num_nodes_waiting()
        return len(made._state_holder.state.participants)

    other = child(MEETS, nodes.rendezvous, 3600)
    assert made.next_rendezvous().world_size == 2
    while other.poll() is None:
        assert there() == 2 or other.poll() is not None
        time.sleep(0.2)
    ended = time.monotonic()
    assert said(other) == "2 2\n"
    while there() == 2 and time.monotonic() - ended < 20:
        time.sleep(0.2)
    assert time.monotonic() - ended < 20  # that it is gone is seen as soon as ever
    made.leave()


def test_times_of_other_clocks_are_read_as_ages(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(register.time, "monotonic", lambda: now[0])
    store = HashStore()
    here, there = (Register(store, "weft", LAST_CALL) for _ in range(2))
    one, other = _NodeDesc("one", 1, 0), _NodeDesc("other", 2, 0)
    written = datetime.now(UTC) + timedelta(hours=1)
    state = _RendezvousState()
    state.last_heartbeats, state.deadline = {other: written}, written
    result = there.set_state(pickle.dumps(state))
    assert result is not None
    assert result[2]

    def seen() -> tuple[Any, Any, float, float]:
        found = here.get_state()
        assert found is not None
        state, at = pickle.loads(found[0]), datetime.now(UTC)
        return state, found[1], *((t - at).total_seconds() for t in (state.last_heartbeats[other], state.deadline))

    for passed_s in (0.0, 1.0, 2.0):
        now[0] = 100.0 + passed_s
        state, token, age, left = seen()
        assert (age, left) == (pytest.approx(-passed_s, abs=0.5), pytest.approx(4 - passed_s, abs=0.5))
    state.last_heartbeats[one] = mine = datetime.now(UTC)
    result = here.set_state(pickle.dumps(state), token)
    assert result is not None
    assert result[2]
    raw = pickle.loads(here._backend.get_state()[0])
    assert raw.last_heartbeats == {one: mine, other: written}  # nobody else's is touched
    assert raw.deadline == written
    now[0] += 100.0  # a host that was stopped itself counts no more of it than a look
    assert seen()[2] == pytest.approx(-4, abs=0.5)
    state, token, *_ = seen()
    state.last_heartbeats[other] = datetime.now(UTC) - timedelta(hours=2)
    here.set_state(pickle.dumps(state), token)
    assert seen()[2] == pytest.approx(0, abs=0.5)


def test_a_round_that_lacks_a_node_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = Meeting.__mro__[1]
    for rank, world, least, good in ((0, 1, 2, False), (1, 1, 1, False), (2, 2, 1, False), (1, 2, 2, True)):
        found = type("Info", (), {"rank": rank, "world_size": world})()
        monkeypatch.setattr(parent, "next_rendezvous", lambda self, found=found: found)
        made = Meeting.of(Nodes(least=least, most=3), "weft")
        if good:
            assert made.next_rendezvous() is found
        else:
            with pytest.raises(LostNodeError):
                made.next_rendezvous()


def start_of(job: Path, nodes: Nodes, code: str, said: list[str], **settings: Any) -> Start:
    return Start(
        job=job,
        devices=[0],
        command=lambda devices: ["-c", code],
        write_settings=lambda devices: None,
        nodes=nodes,
        restarts=Restarts(limit=3, say=said.append, **settings),
    )


@pytest.mark.usefixtures("own_signals")
def test_a_node_that_is_gone_before_it_gave_its_ranks_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "READING", timedelta(seconds=3))
    nodes = nodes_at(free_port())
    gone: list[int] = []

    def other() -> None:
        meeting._knock(nodes, timedelta(seconds=PATIENCE_S))
        joins = Meeting.of(nodes, "weft")
        gone.append(joins.next_rendezvous().world_size)
        joins.leave()

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    told: list[str] = []
    code = f"import os; open({str(tmp_path / 'world')!r}, 'w').write(os.environ['WORLD_SIZE'])"
    agent.run(start_of(tmp_path, nodes, code, told))
    thread.join(PATIENCE_S)
    assert gone == [2]
    assert told == ["a machine was gone before the job began there: meeting again"]
    assert (tmp_path / "world").read_text() == "1"


def test_meetings_in_vain_come_to_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: Any, group: Any) -> None:
        raise LostNodeError

    monkeypatch.setattr(Agent.__mro__[1], "_rendezvous", lost)
    told: list[str] = []
    with pytest.raises(LeavesError, match="met 3 times"):
        agent.run(start_of(tmp_path, Nodes(), "", told))
    assert len(told) == 3


WORKS = """
import os, sys, time
from pathlib import Path
lost, world = Path(sys.argv[1]), os.environ["WORLD_SIZE"]
if lost.exists():
    sys.exit(world != "1")  # what is left goes on alone
time.sleep(60 if world == "1" else 1)  # until the other is there
lost.touch()
sys.exit(1)
"""

LOSES = """
import sys, tempfile
from pathlib import Path
from weft.runtime import agent
from weft.runtime.meeting import Nodes
from weft.runtime.restarts import Restarts
place, job, lost, works = sys.argv[1:]
start = agent.Start(
    job=Path(job), devices=[0], command=lambda devices: ["-c", works, lost],
    write_settings=lambda devices: None, nodes=Nodes(least=1, most=2, rendezvous=place),
    restarts=Restarts(limit=3, command=f"test ! -e {lost}", say=lambda line: None),
)
try:
    agent.run(start)
except Exception as error:
    print(error)
"""


@pytest.mark.usefixtures("own_signals")
def test_a_node_without_devices_leaves_the_others_to_go_on(child: Child, tmp_path: Path) -> None:
    nodes, lost = nodes_at(free_port()), tmp_path / "lost"
    jobs = tmp_path / "here", tmp_path / "there"
    for job in jobs:
        job.mkdir()
    other = child(LOSES, nodes.rendezvous, jobs[1], lost, WORKS)
    start = start_of(jobs[0], nodes, "", [])
    agent.run(replace(start, command=lambda devices: ["-c", WORKS, str(lost)]))
    assert "no device is left" in said(other)


def named(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Have names mean these addresses."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 29400)) for address in addresses]
    monkeypatch.setattr(meeting.socket, "getaddrinfo", lambda *args, **kwargs: found)


def test_a_name_that_is_another_address_elsewhere_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch, "127.0.1.1")
    with pytest.raises(InputError, match=r"node-0 is 127\.0\.1\.1 on this machine.*as in 10\.0\.0\.1:29400"):
        _ = Nodes(most=2, rendezvous="node-0:29400").place
    assert Nodes(rendezvous="node-0:29400").place == ("127.0.1.1", 29400)
    for same in ("localhost:29400", "127.0.1.1:29400"):
        assert Nodes(most=2, rendezvous=same).place == ("127.0.1.1", 29400)
    named(monkeypatch, "127.0.1.1", "10.1.2.3")
    assert Nodes(most=2, rendezvous="node-0:29400").place == ("10.1.2.3", 29400)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.1.1 is no address unless somebody makes it one")
def test_every_address_of_this_machine_can_be_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "JOINING", timedelta(seconds=1))
    nodes = Nodes(most=2, rendezvous=f"127.0.1.1:{free_port()}")
    assert nodes.address != nodes.place[0]
    Meeting.of(nodes, "weft")


def test_ctrl_c_is_heard_while_nobody_is_at_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "is_here", lambda address: False)
    monkeypatch.setattr(meeting, "JOINING", timedelta(seconds=20))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupted(0.5):
        Meeting.of(nodes_at(free_port()), "weft")
    assert time.monotonic() - began < 10
    monkeypatch.setattr(meeting, "JOINING", timedelta(seconds=0.1))
    with pytest.raises(InputError, match=r"nobody listens at 127\.0\.0\.1, port [0-9]+; start the job there too"):
        Meeting.of(nodes_at(free_port()), "weft")


@pytest.mark.parametrize("reply", [b"HTTP/1.0 400 Bad Request\r\n\r\n", b""])
def test_another_program_at_the_place_is_wrong_input(monkeypatch: pytest.MonkeyPatch, reply: bytes) -> None:
    """One that speaks another language, and one that says nothing."""
    monkeypatch.setattr(meeting, "WELCOME", timedelta(seconds=1))
    held = []

    def serve() -> None:
        with contextlib.suppress(OSError):  # the socket is closed in the end
            while True:
                held.append(listening.accept()[0])
                if reply:
                    held[-1].recv(100)
                    held[-1].sendall(reply)
                    held[-1].close()

    with socket.create_server((LOOPBACK, 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(InputError, match="is no job; choose another port"):
            Meeting.of(nodes_at(listening.getsockname()[1]), "weft")
        listening.shutdown(socket.SHUT_RDWR)
    for connection in held:
        connection.close()


def test_a_place_where_nobody_may_listen_is_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str, port: int) -> TCPStore:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(meeting, "store_at", refuse)
    with pytest.raises(InputError, match="port 80: Permission denied; choose another port"):
        Meeting.of(nodes_at(80), "weft")


KEEPS = """
import sys, time
from weft.runtime.meeting import store_at
store = store_at("127.0.0.1")
print(store.port, flush=True)
time.sleep(600)
"""


@pytest.fixture
def silent(child: Child) -> tuple[TCPStore, subprocess.Popen[str]]:
    """A store, and its process, which can be stopped."""
    process = child(KEEPS)
    assert process.stdout is not None
    port = int(process.stdout.readline())
    return TCPStore(LOOPBACK, port, is_master=False, timeout=timedelta(seconds=5)), process


def test_a_silent_store_is_not_waited_for(
    silent: tuple[TCPStore, subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, process = silent
    seen = Register(store, "weft", LAST_CALL)
    vigil = Vigil(tmp_path, 1.0)
    assert vigil._gets_on({}, store)
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(register, "READING", timedelta(seconds=1))
    with pytest.raises(RendezvousConnectionError):
        seen.get_state()
    began = time.monotonic()
    with pytest.raises(SilentError):  # it is asked no more
        seen.set_state(pickle.dumps(_RendezvousState()))
    assert time.monotonic() - began < 0.5
    with pytest.raises(SilentError):
        vigil._gets_on({}, store)
    monkeypatch.setattr(register, "READING", timedelta(seconds=30))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupted(0.5):
        answer(lambda: store.get("never"))
    assert time.monotonic() - began < 10
    process.kill()
    for thread in threading.enumerate():
        if thread.name == "weft-answer":
            thread.join(PATIENCE_S)


def test_what_a_store_says_is_brought_back() -> None:
    def refuse() -> None:
        raise ValueError("no")

    assert answer(lambda: 3) == 3
    with pytest.raises(ValueError, match="no"):
        answer(refuse)
