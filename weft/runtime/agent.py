"""Agent: PyTorch's elastic agent, which starts a node's processes, watches them, and meets other nodes' agents; here it
asks ``restarts`` before it starts them again, and starts as many as there are devices left.
"""

from __future__ import annotations

import re
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from weft.errors import InputError
from weft.runtime.failure import read_failure
from weft.runtime.restarts import Restarts

SHUTDOWN_S = 5
"""Seconds the processes get to end by themselves after Ctrl-C."""

LEFT = ("*.failure", "*.stage", "*.log", "*.result")
"""What processes leave in a job's directory, for those who ask why they died."""

LAST_CALL_S, ALIVE_EVERY_S, ALIVE_MISSED = 5, 2, 3
"""How long nodes that could be more wait for another; how often each says that it is there; and how many of these it
may miss before the others go on without it."""


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The machines of a job: so many at least and at most, and ``host:port`` where they meet; None: this one only."""

    least: int = 1
    most: int = 1
    rendezvous: str | None = None

    def __post_init__(self) -> None:
        host, _, port = (self.rendezvous or "here:0").rpartition(":")
        if not re.fullmatch(r"[\w.-]+|\[[0-9A-Fa-f:.]+\]", host) or not re.fullmatch(r"[0-9]{1,5}", port, re.ASCII):
            raise InputError(f"--rendezvous {self.rendezvous}: write HOST:PORT, as in 10.0.0.1:29400")
        if int(port) > 65535:
            raise InputError(f"--rendezvous {self.rendezvous}: there is no port {port}; the largest is 65535")


@dataclass(frozen=True, kw_only=True)
class Start:
    """How to start a node's processes.

    Attributes:
        job: the directory of what passes between them and this process.
        devices: numbers of this node's devices, one process for each.
        command: arguments of the interpreter for processes on some of them.
        write_settings: puts what they read there.
        nodes: of the job.
        restarts: what becomes of it when they die.
    """

    job: Path
    devices: Sequence[int]
    command: Callable[[Sequence[int]], list[str]]
    write_settings: Callable[[Sequence[int]], None]
    nodes: Nodes = field(default_factory=Nodes)
    restarts: Restarts = field(default_factory=Restarts)


def run(start: Start) -> None:
    """Run the processes to their end.

    Raises:
        InputError, WorkerError: what they ended of.
        JobError: it was given up, or no device is left.
    """
    nodes, alone = start.nodes, start.nodes.rendezvous is None
    meeting = RendezvousParameters(
        backend="c10d",
        endpoint=nodes.rendezvous or "127.0.0.1:0",
        run_id=uuid.uuid4().hex if alone else "weft",
        min_nodes=nodes.least,
        max_nodes=nodes.most,
        local_addr="127.0.0.1" if alone else None,
        **({} if nodes.least == nodes.most else _impatient()),
    )
    running = start.restarts.there(start.devices)
    start.write_settings(running)
    spec = WorkerSpec(
        role="weft",
        local_world_size=len(running),
        entrypoint=sys.executable,
        args=_escaped(start.command(running)),
        rdzv_handler=get_rendezvous_handler(meeting),
        max_restarts=start.restarts.limit,
        monitor_interval=0.1,
        local_addr=meeting.local_addr,
    )
    agent = Agent(spec, start, running)
    closes = True
    try:
        result = agent.run()
    except SignalException:
        closes = False  # the others may go on: closing the meeting would end it for ever
        raise
    finally:
        if closes:
            spec.rdzv_handler.shutdown()
    if result.is_failed():
        raise read_failure(start.job, agent.exits)


def _impatient() -> dict[str, int]:
    return {
        "last_call_timeout": LAST_CALL_S,
        "keep_alive_interval": ALIVE_EVERY_S,
        "keep_alive_max_attempt": ALIVE_MISSED,
    }


def _escaped(arguments: Sequence[str]) -> tuple[str, ...]:
    """The agent reads ``$`` as the beginning of a name."""
    return tuple(argument.replace("$", "$$") for argument in arguments)


class Agent(LocalElasticAgent):
    """The agent of a node. ``exits`` are the exit codes of processes that failed last, by rank."""

    def __init__(self, spec: WorkerSpec, start: Start, running: Sequence[int]) -> None:
        logs = DefaultLogsSpecs(log_dir=str(start.job))
        super().__init__(spec, logs, shutdown_timeout=SHUTDOWN_S)
        self._start, self._running = start, tuple(running)
        self.exits: Mapping[int, int] = {}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """How the processes are; when all is well, lost devices are asked whether they are there again."""
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed():
            self.exits = {rank: failure.exitcode for rank, failure in result.failures.items()}
        elif back := self._start.restarts.more(self._start.devices, self._running):
            self._start.restarts.say(f"device {', '.join(map(str, back))} is there again: starting with it")
            self._restart_workers(worker_group)
        return result

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        """Start the processes again, on the devices that are there.

        Raises:
            WeftError: it is given up.
        """
        start, failed = self._start, worker_group.state in (WorkerState.FAILED, WorkerState.UNHEALTHY)
        self._stop_workers(worker_group)
        worker_group.state = WorkerState.STOPPED
        if failed:
            start.restarts.after_death(start.job, self.exits, self._running)
        running = start.restarts.there(start.devices)
        if running != self._running:
            start.restarts.say(f"{len(running)} of {len(start.devices)} devices are there")
        for pattern in LEFT:
            for path in start.job.glob(pattern):
                path.unlink()
        # The store where processes meet would be the one before, with the addresses of those that are gone: Gloo calls
        # them. And a node that was not the first would look for it where the first one was (found in torch 2.13).
        handler: Any = worker_group.spec.rdzv_handler
        handler._bootstrap_store_info = handler._shared_tcp_store_server = None
        self._running = running
        start.write_settings(running)
        worker_group.spec.local_world_size = len(running)
        worker_group.spec.args = _escaped(start.command(running))
        self._initialize_workers(worker_group)
