"""One process of a job: its device, its process group, its memory limit, and the record it leaves when it fails."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store  # torch.distributed has them too, but not for type checkers

from weft.runtime import memory
from weft.runtime.failure import Failure
from weft.runtime.logbook import JOB

T = TypeVar("T")

TIMEOUT_S = 600.0
"""Seconds a collective waits for its peers before it fails."""

PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a process of a job is told about its surroundings.

    Attributes:
        parent: process id of the one that started it; when that is gone, so is this.
        device: ``"cpu"``, or the type of accelerator.
        memory_bytes: limit above what the process uses before the job, or None.
        timeout_s: seconds a collective waits for its peers.
    """

    parent: int
    device: str
    memory_bytes: int | None
    timeout_s: float


def join(*, device: str | None = None, timeout_s: float = TIMEOUT_S, store: Store | None = None) -> torch.device:
    """Enter the process group of the job this process belongs to; a process by itself is a job of one.

    Does nothing where the group exists already. RANK, WORLD_SIZE and LOCAL_RANK are as torchrun sets them.

    Args:
        device: ``"cpu"`` or a type of accelerator; None takes the accelerator where there is one.
        timeout_s: seconds a collective waits for its peers.
        store: where the processes meet; None: at MASTER_ADDR, MASTER_PORT.

    Returns:
        the device of this process.
    """
    kind = device or device_type()
    here = torch.device("cpu")
    if kind != "cpu":
        here = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))
        torch.accelerator.set_device_index(here.index)
    if dist.is_initialized():
        return here
    # CPU tensors travel too on an accelerator machine: names, sizes, checkpoint metadata.
    backend = "cpu:gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
    alone = "RANK" not in os.environ
    dist.init_process_group(
        backend,
        store=HashStore() if alone else store,
        rank=0 if alone else int(os.environ["RANK"]),
        world_size=1 if alone else int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=timeout_s),
        device_id=None if kind == "cpu" else here,
    )
    # Gloo connects each rank with each. One that is done and leaves at once would cut off those that still connect.
    dist.all_reduce(torch.zeros(1))
    return here


def device_type() -> str:
    """The accelerator of this machine, or ``"cpu"``."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def describe_stage(stage: int) -> None:
    """Note the pipeline stage of this process, so that an error names it even when the process is killed."""
    if job := os.environ.get(JOB):
        Path(job, f"{os.environ['RANK']}.stage").write_text(str(stage))


def main() -> None:
    """Run this process's part of the job in the directory WEFT_JOB: a function or a script."""
    # Registered first, so run last. Gloo's threads may still hold the last collective's tensor; dropping that takes the
    # interpreter's lock, which aborts the process when the interpreter is being torn down. So it is not torn down.
    atexit.register(_leave, 0)
    job, rank, limit = Path(os.environ[JOB]), int(os.environ["RANK"]), ""
    try:
        settings = _settings(job)
        prepare(settings)
        if (job / "script").exists():
            script, arguments = cloudpickle.loads((job / "script").read_bytes())
            with limited(settings) as limit:
                run_script(script, arguments)
        else:
            fn, args = cloudpickle.loads((job / "call").read_bytes())
            join(device=settings.device, timeout_s=settings.timeout_s)
            with limited(settings) as limit:
                result = cloudpickle.dumps(fn(*args))
            dist.destroy_process_group()
            (job / f"{rank}.result").write_bytes(result)
    except BaseException as error:  # the edge of the process: whatever it was, the parent tells the user
        # Written first, while the peers cannot know yet; then out, without waiting for threads that wait for peers.
        Failure.of(error, rank, limit, job=job).save(job / f"{rank}.failure")
        _leave(1)


def run_here(fn: Callable[..., T], *args: Any, memory_bytes: int | None = None) -> T:
    """Run ``fn(*args)`` in this process of a job that torchrun, or what works like it, has started."""
    settings = Settings(parent=os.getppid(), device=device_type(), memory_bytes=memory_bytes, timeout_s=TIMEOUT_S)
    prepare(settings)
    join()
    with limited(settings):
        result = fn(*args)
    dist.destroy_process_group()
    return result


def run_script(script: str, arguments: list[str]) -> None:
    """Run a Python file as ``python script arguments`` would."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may want to save something
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise


def limit_here() -> int | None:
    """This process's limit of memory in bytes, where who started it has left one for it."""
    job = os.environ.get(JOB)
    return _settings(Path(job)).memory_bytes if job and Path(job, "settings").exists() else None


def _settings(job: Path) -> Settings:
    every = cloudpickle.loads((job / "settings").read_bytes())
    return Settings(**every[int(os.environ["LOCAL_RANK"])])


def prepare(settings: Settings) -> None:
    """What a process of a job does first."""
    die_with(settings.parent)
    if settings.memory_bytes is not None and settings.device == "cpu":
        memory.economise()


def die_with(parent: int) -> None:
    """End this process when its parent ends, however that happens (Linux; elsewhere the agent's signals do it)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended while we were starting
        os._exit(1)


def _leave(code: int) -> None:
    """End this process at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def limited(settings: Settings) -> Iterator[str]:
    """Hold this process to its memory limit inside the block. Yields the limit in words, empty if there is none."""
    if settings.memory_bytes is None:
        yield ""
        return
    used = memory.of(torch.device(settings.device))
    used.limit(settings.memory_bytes)
    try:
        yield f"its limit of {settings.memory_bytes / memory.MIB:.0f} MiB"
    finally:
        used.limit(None)


def call_of(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """A call, ready to cross to other processes."""
    return bytes(cloudpickle.dumps((fn, args)))
