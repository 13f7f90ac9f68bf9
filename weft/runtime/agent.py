"""Agent: PyTorch's elastic agent, which starts a node's processes, watches them, and meets other nodes' agents; here it
asks ``restarts`` before it starts them again, and starts as many as there are devices left.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousError

from weft.errors import JobError
from weft.runtime.meeting import LostNodeError, Meeting, Nodes
from weft.runtime.restarts import Restarts
from weft.runtime.vigil import Vigil

SHUTDOWN_S = 5
"""Seconds the processes get to end by themselves after Ctrl-C."""

MEETINGS = 3
"""How often nodes meet in vain: one of them was gone before all had said how many processes they have."""

LEFT = ("*.failure", "*.stage", "*.log", "*.result")
"""What processes leave in a job's directory, for those who ask why they died."""


class LeavesError(JobError):
    """This node cannot go on. The others may."""


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
    nodes = start.nodes
    meeting = Meeting.of(nodes, uuid.uuid4().hex if nodes.rendezvous is None else "weft")
    running = start.restarts.there(start.devices)
    start.write_settings(running)
    spec = WorkerSpec(
        role="weft",
        local_world_size=len(running),
        entrypoint=sys.executable,
        args=_escaped(start.command(running)),
        rdzv_handler=meeting,
        max_restarts=start.restarts.limit,
        monitor_interval=0.1,
        local_addr=nodes.address,
    )
    agent = Agent(spec, start, running)
    closes = True
    try:
        result: RunResult | None = agent.run()
    except (SignalException, LeavesError):
        closes = False  # the others may go on: closing the meeting would end it for ever
        raise
    except RendezvousError as error:
        closes = False
        raise JobError(
            f"the machines of this job cannot be met any more at {nodes.rendezvous}: it is over, or the machine there "
            "is gone or cannot be reached; start it again with --resume"
        ) from error
    finally:
        start.restarts.close()
        meeting.shutdown() if closes else meeting.leave()
    if result is None:
        raise JobError("the job is over: it had as many machines as it may, and never needed this one")
    if result.is_failed():
        start.restarts.after_death(start.job, agent.exits, agent.running, agent.world)
        raise AssertionError("the agent stopped with restarts left")


def _escaped(arguments: Sequence[str]) -> tuple[str, ...]:
    """The agent reads ``$`` as the beginning of a name."""
    return tuple(argument.replace("$", "$$") for argument in arguments)


class Agent(LocalElasticAgent):
    """The agent of a node.

    Attributes:
        exits: codes of the processes that failed last, by rank.
        running: devices that processes run on, or ran last.
    """

    def __init__(self, spec: WorkerSpec, start: Start, running: Sequence[int]) -> None:
        logs = DefaultLogsSpecs(log_dir=str(start.job))
        super().__init__(spec, logs, shutdown_timeout=SHUTDOWN_S)
        self._start, self.running = start, tuple(running)
        self._vigil = Vigil(start.job, start.restarts.timeout_s)
        self.exits: Mapping[int, int] = {}

    @property
    def world(self) -> int:
        """Ranks of the job, or of the attempt that was last."""
        return int(self.get_worker_group().workers[0].world_size)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """How the processes are; when all is well, lost devices are asked whether they are there again."""
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state is WorkerState.HEALTHY and self._hangs(worker_group):
            result = RunResult(state=WorkerState.FAILED)
        if result.is_failed():
            self.exits = {rank: failure.exitcode for rank, failure in result.failures.items()}
        elif back := self._start.restarts.more(self._start.devices, self.running):
            self._start.restarts.say(f"device {', '.join(map(str, back))} is there again: starting with it")
            self._restart_workers(worker_group)
        return result

    def _hangs(self, worker_group: WorkerGroup) -> bool:
        """Whether one of them does, and all were ended for that."""
        workers = worker_group.workers
        store = worker_group.store if len(workers) < workers[0].world_size else None
        return self._vigil.ends({each.global_rank: each.id for each in workers}, workers[0].world_size, store)

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        """Start the processes again, on the devices that are there.

        Raises:
            WeftError: it is given up.
        """
        start, failed = self._start, worker_group.state in (WorkerState.FAILED, WorkerState.UNHEALTHY)
        self._stop_workers(worker_group)
        worker_group.state = WorkerState.STOPPED
        if failed:
            start.restarts.after_death(start.job, self.exits, self.running, self.world)
        try:
            running = start.restarts.there(start.devices)
        except JobError as error:
            raise LeavesError(str(error)) from error
        if running != self.running:
            start.restarts.say(f"{len(running)} of {len(start.devices)} devices are there")
        for pattern in LEFT:
            for path in start.job.glob(pattern):
                path.unlink()
        meeting = worker_group.spec.rdzv_handler
        assert isinstance(meeting, Meeting)
        meeting.forget_processes()
        self.running = running
        start.write_settings(running)
        worker_group.spec.local_world_size = len(running)
        worker_group.spec.args = _escaped(start.command(running))
        self._initialize_workers(worker_group)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """Meet the other nodes.

        Raises:
            LeavesError: one was gone before all had said how many processes they have, time and again.
        """
        meeting = worker_group.spec.rdzv_handler
        assert isinstance(meeting, Meeting)
        gone: Exception | None = None
        for _ in range(MEETINGS):
            try:
                super()._rendezvous(worker_group)
                return
            except (DistError, LostNodeError) as error:
                gone = error
                self._start.restarts.say("a machine was gone before the job began there: meeting again")
                meeting.forget_processes()
        raise LeavesError(
            f"the machines of this job met {MEETINGS} times, and each time one was gone before it had said how many "
            "processes it has; see what ends it, and start the job again with --resume"
        ) from gone
