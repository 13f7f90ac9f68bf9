"""Start a job's processes on this machine, through PyTorch's elastic agent, and bring back their results or one error.

Each process is a fresh interpreter that runs ``worker.main``: the caller's script is not imported again, so it needs no
``if __name__ == "__main__"``, and a notebook will do. Functions and results cross as cloudpickle files in a directory
of the job.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import torch

from weft.errors import InputError
from weft.quantity import Sizes, each_of, parse_sizes
from weft.runtime import agent
from weft.runtime.logbook import JOB
from weft.runtime.meeting import Nodes, card_of
from weft.runtime.restarts import Restarts
from weft.runtime.signals import given_back, interruptible
from weft.runtime.worker import TIMEOUT_S, Settings, call_of, describe_stage, device_type

__all__ = ["describe_stage", "launch", "launch_script"]

LEAST_BYTES = 2**24
"""Of a process: no Python with torch takes less."""

# Before the first import: Ctrl-C during start-up is quiet, SIGTERM ends it even where the caller ignores that, and
# OpenMP and Gloo read their variables when they load. What imports leave is not garbage, and looking for some takes a
# seventh of their time.
BOOTSTRAP = (
    "import gc,json,os,signal,sys;signal.signal(signal.SIGINT,signal.SIG_DFL);"
    "signal.signal(signal.SIGTERM,signal.SIG_DFL);start=json.loads(sys.argv.pop(1));"
    "sys.path[:]=start['path'];os.environ.update(start['environment']);"
    "gc.disable();from weft.runtime.{module} import main;gc.enable();main()"
)


def launch(
    fn: Callable[..., Any],
    *args: Any,
    devices: int | None = None,
    memory: Sizes = None,
    device: str | None = None,
    timeout_s: float = TIMEOUT_S,
) -> list[Any]:
    """Run ``fn(*args)`` in one process per device, joined in a process group.

    Args:
        fn: any function, also of a notebook; it and its arguments are sent to the processes.
        devices: processes; None takes every accelerator, or every core of a machine that has none.
        memory: limit per device, in bytes or as ``"2GiB"``, or one for each: ``"2GiB,1GiB"``; the operating system
            refuses more.
        device: ``"cpu"``, or a type of accelerator; None takes the accelerator where there is one.
        timeout_s: seconds a collective waits for its peers.

    Returns:
        what each rank returned, by rank.

    Raises:
        InputError: the same one as a process raised; or this process belongs to a job already; or more devices than
            there are.
        WorkerError: a process died. It names the first: rank, stage and cause.
    """
    return launch_again(
        fn,
        *args,
        restarts=Restarts(),
        nodes=Nodes(),
        devices=devices,
        memory=memory,
        device=device,
        timeout_s=timeout_s,
    )


def launch_again(
    fn: Callable[..., Any],
    *args: Any,
    restarts: Restarts,
    nodes: Nodes,
    devices: int | None = None,
    memory: Sizes = None,
    device: str | None = None,
    timeout_s: float = TIMEOUT_S,
) -> list[Any]:
    """As ``launch``, of a function that goes on where it was when its processes are started again.

    Args:
        restarts: what becomes of it when they die.
        nodes: machines in the job; each makes this same call and starts its own share.

    Returns:
        what the ranks of this node returned, by rank.

    Raises:
        InputError, WorkerError: as ``launch``.
        JobError: it was given up.
    """
    settings = settings_for(devices, memory, device, timeout_s)
    with interruptible(), _job(fn, args) as job:
        _run(job, settings, environment_for(len(settings), nodes), nodes, restarts)
        return results(job)


def results(job: Path) -> list[Any]:
    """What the processes of a job here returned, by rank."""
    found = sorted((int(path.stem), path) for path in job.glob("*.result"))
    return [cloudpickle.loads(path.read_bytes()) for _, path in found]


def launch_script(
    script: str | Path,
    arguments: Sequence[str] = (),
    *,
    devices: int | None = None,
    memory: Sizes = None,
    device: str | None = None,
    nodes: int = 1,
    rendezvous: str | None = None,
) -> None:
    """Run a script in one process per device, with RANK, WORLD_SIZE and the rest set as torchrun sets them.

    Args:
        nodes: machines in the job; each runs this same call and starts its own share.
        rendezvous: ``host:port`` of one of the machines, where they meet; needed when there is more than one.

    Raises:
        InputError, WorkerError: as ``launch``.
    """
    path = Path(script)
    if not path.is_file():
        raise InputError(f"{script}: no such file; give a Python script")
    if nodes > 1 and rendezvous is None:
        raise InputError(f"{nodes} nodes need a place to meet; add --rendezvous HOST:PORT of one of them")
    machines = Nodes(least=nodes, most=nodes, rendezvous=rendezvous)
    settings = settings_for(devices, memory, device, TIMEOUT_S)
    with interruptible(), _directory() as job:
        (job / "script").write_bytes(cloudpickle.dumps((str(path), list(arguments))))
        _run(job, settings, environment_for(len(settings), machines), machines, Restarts())


def settings_for(devices: int | None, memory: Sizes, device: str | None, timeout_s: float) -> list[Settings]:
    """The settings of each of a job's processes here, checked against this machine."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        raise InputError(
            f"this process is rank {os.environ['RANK']} of a launched job and cannot launch another; "
            f"use weft.parallelize here, or call weft.launch outside the job"
        )
    kind = device or device_type()
    if devices is not None and devices < 1:
        raise InputError(f"devices must be at least 1, got {devices}")
    if kind != "cpu" and devices is not None and devices > (there := device_count(kind)):
        raise InputError(
            f"devices={devices}, but this machine has {there} of type {kind}; ask for {there} or for device='cpu'"
        )
    if kind == "cpu" and devices is not None and devices > (most := psutil.virtual_memory().total // LEAST_BYTES):
        raise InputError(f"devices={devices}, but this machine has memory for {most} processes at most; ask for fewer")
    limits = each_of(parse_sizes(memory), devices or device_count(kind))
    return [Settings(parent=os.getpid(), device=kind, memory_bytes=limit, timeout_s=timeout_s) for limit in limits]


def device_count(kind: str) -> int:
    """Devices of this machine: accelerators, or cores this process may use."""
    if kind != "cpu":
        return torch.accelerator.device_count()
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def environment_for(count: int, nodes: Nodes | None = None) -> dict[str, str]:
    """Variables that libraries read when they load; the user's own values stay."""
    wanted = {"OMP_NUM_THREADS": str(max(1, device_count("cpu") // count)), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    card = card_of((nodes or Nodes()).address)
    if card is not None and sys.platform == "linux":
        wanted["GLOO_SOCKET_IFNAME"] = card  # Gloo looks up the machine's own name otherwise, which need not resolve
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def command(module: str, environment: dict[str, str]) -> list[str]:
    """Arguments after the interpreter that start a process in ``weft.runtime.<module>.main``."""
    start = json.dumps({"path": [p or os.getcwd() for p in sys.path], "environment": environment})
    return ["-c", BOOTSTRAP.format(module=module), start]


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """A directory for what passes between this process and the job's."""
    with tempfile.TemporaryDirectory(prefix="weft-") as name:
        yield Path(name)


@contextlib.contextmanager
def _job(fn: Callable[..., Any], args: tuple[Any, ...]) -> Iterator[Path]:
    """A directory with a call for the job's processes."""
    with _directory() as job:
        try:
            (job / "call").write_bytes(call_of(fn, args))
        except Exception as error:  # whatever an object of the user's raises when it is pickled
            raise InputError(
                f"launch: {getattr(fn, '__qualname__', fn)} cannot be sent to other processes: {error}; "
                f"make what cannot be pickled inside the function"
            ) from error
        yield job


def _run(
    job: Path, settings: Sequence[Settings], environment: dict[str, str], nodes: Nodes, restarts: Restarts
) -> None:
    """Run the processes of a job here to their end, under one elastic agent."""

    def write_settings(devices: Sequence[int]) -> None:
        (job / "settings").write_bytes(cloudpickle.dumps([asdict(settings[device]) for device in devices]))

    def command_for(devices: Sequence[int]) -> list[str]:
        seen = {} if len(devices) == len(settings) else visible(settings[0].device, devices)
        return command("worker", {**environment, **seen, JOB: str(job)})

    every = range(len(settings))
    start = agent.Start(
        job=job, devices=every, command=command_for, write_settings=write_settings, nodes=nodes, restarts=restarts
    )
    with _quiet(), given_back():
        agent.run(start)


def visible(kind: str, devices: Sequence[int]) -> dict[str, str]:
    """Variables that leave a process only some of the accelerators it would see (those of CUDA and ROCm)."""
    if kind != "cuda":
        return {}
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = list(map(str, range(device_count(kind)))) if not before else before.split(",")
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[device] for device in devices)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the agent's own log off the terminal: what it has to say comes back as one error."""
    agents = ("torch.distributed.elastic", "torch.distributed.launcher")
    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith(agents)]
    loggers.append(logging.getLogger("torchelastic-events-null"))
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
