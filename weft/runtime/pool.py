"""Processes that stay: each run forms a job of the first few of them.

Starting a process costs seconds (importing torch), so what runs many small jobs (``weft compare``, the tests) keeps its
processes. Between runs they sleep in a read of their pipe. A run is a process group of its own, which meets at a store
in this process under a prefix of its own and is destroyed at the end. A process that fails a run stays; one that dies,
or does not end when its peers have failed, is replaced before the next run.

The processes end with the thread that made them run first; keep a pool in the thread that uses it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed has them, but untyped

from weft.errors import InputError
from weft.quantity import Sizes
from weft.runtime import worker
from weft.runtime.failure import Failure, read_failure
from weft.runtime.launch import command, environment_for, settings_for
from weft.runtime.logbook import JOB
from weft.runtime.meeting import store_at
from weft.runtime.worker import TIMEOUT_S, Settings, call_of, join, prepare

GRACE_S = 5.0
"""Seconds the others get to fail by themselves after the first failure of a run."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process of a pool runs, where that is not simply here.

    Attributes:
        node: processes of one node have LOCAL_RANK and LOCAL_WORLD_SIZE among themselves, as torchrun sets them.
        command: what the interpreter is started by, as in ``("taskset", "-c", "0")``.
        environment: variables, before the pool's.
    """

    node: int = 0
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


class Pool:
    """Up to ``devices`` processes, started when a run needs them. Use it as a context manager, or call ``close``.

    Args:
        devices: processes; None takes every accelerator, or every core of a machine that has none.
        memory: limit per device during each run, in bytes or as ``"2GiB"``, or one for each: ``"2GiB,1GiB"``.
        device: ``"cpu"``, or a type of accelerator; None takes the accelerator where there is one.
        timeout_s: seconds a collective waits for its peers.
        places: of the processes by rank; those beyond run here.
        address: where the processes reach this one.
    """

    def __init__(
        self,
        devices: int | None = None,
        *,
        memory: Sizes = None,
        device: str | None = None,
        timeout_s: float = TIMEOUT_S,
        places: Sequence[Place] = (),
        address: str = "127.0.0.1",
    ) -> None:
        self.settings = settings_for(devices, memory, device, timeout_s)
        self.devices = len(self.settings)
        self._places = [*places, *[Place()] * (self.devices - len(places))]
        self._address = address
        self._runs = 0
        self._directory = tempfile.TemporaryDirectory(prefix="weft-")
        self._workers: list[_Worker] = []
        self._store = store_at(address)

    def run(self, fn: Callable[..., Any], *args: Any, ranks: int | None = None) -> list[Any]:
        """Run ``fn(*args)`` in the first ``ranks`` processes (None: all), joined in a process group of their own.

        Returns:
            what each rank returned, by rank.

        Raises:
            InputError, WorkerError: as ``weft.launch``; the pool can be used again.
        """
        count = self.devices if ranks is None else ranks
        if not 1 <= count <= self.devices:
            raise InputError(f"ranks={count} of a pool of {self.devices} processes; ask for 1 to {self.devices}")
        self._runs += 1
        job = Path(self._directory.name, str(self._runs))
        job.mkdir()
        (job / "call").write_bytes(call_of(fn, args))
        self._ready(count)
        workers = self._workers[:count]
        nodes = [place.node for place in self._places[:count]]
        for rank, each in enumerate(workers):
            local_rank, local_count = nodes[:rank].count(nodes[rank]), nodes.count(nodes[rank])
            each.pipe.send((str(job), count, local_rank, local_count))
        try:
            exits = _collect(workers)
        except BaseException:  # Ctrl-C: the run is given up, and so are its processes
            for each in workers:
                each.stop()
            raise
        if exits or list(job.glob("*.failure")):
            raise read_failure(job, exits)
        return [cloudpickle.loads((job / f"{rank}.result").read_bytes()) for rank in range(count)]

    def close(self) -> None:
        """End the processes."""
        for each in self._workers:
            each.stop()
        self._workers.clear()
        self._directory.cleanup()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ready(self, count: int) -> None:
        """Have the first ``count`` processes running: start what is missing, replace what has died."""
        for rank in range(count):
            if rank < len(self._workers) and self._workers[rank].process.poll() is None:
                continue
            meeting = f"{self._address}:{self._store.port}"
            fresh = _Worker(rank, self._places[rank], self.settings[rank], self.devices, meeting)
            self._workers[rank : rank + 1] = [fresh]


class _Worker:
    """One process of the pool and the pipe to it."""

    def __init__(self, rank: int, place: Place, settings: Settings, devices: int, meeting: str) -> None:
        self.rank = rank
        self.pipe, theirs = Pipe()
        arguments = command("pool", {**environment_for(devices), **place.environment})
        self.process = subprocess.Popen(
            [*place.command, sys.executable, *arguments, str(rank), meeting, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for this process, which then ends them
        )
        theirs.close()
        self.pipe.send(settings)

    def stop(self) -> None:
        """End it now."""
        self.pipe.close()
        self.process.kill()
        self.process.wait()


def _collect(workers: list[_Worker]) -> dict[int, int]:
    """Wait for every process to answer, and return the exit codes of those that died or had to be killed.

    After the first failure the others have GRACE_S to fail too; what hangs is killed, as a consequence (SIGTERM).
    """
    exits: dict[int, int] = {}
    waiting = {each.pipe: each for each in workers}
    deadline: float | None = None
    while waiting:
        ready = wait(list(waiting), None if deadline is None else max(0.0, deadline - time.monotonic()))
        if not ready and deadline is not None and time.monotonic() >= deadline:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            each = waiting.pop(pipe)
            try:
                failed = not pipe.recv()
            except (EOFError, ConnectionResetError):
                exits[each.rank] = each.process.wait()
                failed = True
            if failed and deadline is None:
                deadline = time.monotonic() + GRACE_S
    for each in waiting.values():
        each.process.terminate()
        each.process.send_signal(signal.SIGCONT)  # one that is stopped would not end
        exits[each.rank] = each.process.wait()
    return exits


def main() -> None:
    """Serve runs until the pipe closes."""
    rank, pipe = int(sys.argv[1]), Connection(int(sys.argv[3]))
    address, _, port = sys.argv[2].rpartition(":")
    settings: Settings = pipe.recv()
    prepare(settings)
    store = TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=settings.timeout_s))
    os.environ["RANK"] = str(rank)
    known, caches = 0, list[Callable[[], object]]()
    while True:
        try:
            directory, *numbers = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        job = Path(directory)
        for name, number in zip(("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), numbers, strict=True):
            os.environ[name] = str(number)
        os.environ[JOB] = directory
        pipe.send(_serve(job, rank, settings, PrefixStore(job.name, store)))
        new = len(sys.modules) > known
        if new:
            known, caches = len(sys.modules), mesh_caches()
        for clear in caches:
            clear()
        gc.collect()  # what a run left in cycles must not count in the next
        if new:  # what was imported stays, and need not be looked through again
            gc.freeze()


def mesh_caches() -> list[Callable[[], object]]:
    """What empties DTensor's caches: they keep meshes, these process groups, and those threads that wake up a hundred
    times a second. There are caches of functions, of methods, and two that some versions have functions to clear."""
    if "torch.distributed.tensor._redistribute" not in sys.modules:
        return []
    from torch.distributed.tensor import _redistribute, debug  # what most runs never import

    modules = [module for name, module in sys.modules.items() if name.startswith("torch.distributed.tensor.")]
    classes = [x for module in modules for x in vars(module).values() if issubclass(type(x), type)]
    values = [value for holder in (*modules, *classes) for value in vars(holder).values()]
    values = [value.__func__ if type(value) in (staticmethod, classmethod) else value for value in values]
    # not isinstance, which asks values for their class: torch's deprecated ones warn of any question
    cached = [value.cache_clear for value in values if type(value) is functools._lru_cache_wrapper]
    named = (debug, "_clear_sharding_prop_cache"), (_redistribute, "clear_redistribute_planner_cache")
    return [*cached, *(getattr(module, name) for module, name in named if hasattr(module, name))]


def _serve(job: Path, rank: int, settings: Settings, store: Store) -> bool:
    """One run; whether it went well."""
    limit = ""
    try:
        fn, args = cloudpickle.loads((job / "call").read_bytes())
        join(device=settings.device, timeout_s=settings.timeout_s, store=store)
        with worker.limited(settings) as limit:
            result = cloudpickle.dumps(fn(*args))
        (job / f"{rank}.result").write_bytes(result)
    except BaseException as error:  # the edge of the process: whatever it was, the parent tells the user
        Failure.of(error, rank, limit, job=job).save(job / f"{rank}.failure")
        return False
    finally:
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):  # a group whose peers are gone
                dist.destroy_process_group()
        torch.set_default_dtype(torch.float32)  # a run's own; the next starts as a fresh process would
    return True
