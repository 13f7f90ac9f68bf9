"""A device's memory as its process sees it: what it uses, and a limit that holds.

On the CPU a device is a process. What it uses is its resident anonymous memory above a *baseline*: the interpreter, the
libraries and the process group, before there is a model. What limits it is ``RLIMIT_DATA``, which counts private
writable memory when it is mapped, whether or not it is touched.

Found on Linux 6.18, glibc 2.36, torch 2.13, training the example (hidden=512) in one process:

- As it comes, glibc's malloc raises the size from which a tensor gets a mapping of its own up to 32 MiB, so nearly all
  tensors share one heap, and its holes stay with the process: a peak of 600 MiB where 490 MiB of tensors were alive,
  and 575 MiB left after the step. With the size fixed at 1 MiB the same run peaks at 498 MiB resident, 490 MiB counted,
  and returns to 365 MiB. A lower size (128 KiB) gains nothing more. The price is a page fault per 4 KiB of every such
  tensor: a step is 15 to 20 % slower. So this is done only where a limit is given, and the machine is then to be
  measured under the same limit.
- A thread's stack counts whole: 8 MiB, of which Gloo starts three per process group. They get 1 MiB instead.
- One malloc arena, or every thread that allocates keeps its own.
- Modules that training imports late (fully_shard, DTensor, what optimizers pull in) come to 75 MiB. They, and what
  weft imports when it is asked for, are imported before the baseline is taken.

What is left between the sum of tensors and the limit is then 1 to 3 %, and 3 MiB for every process group.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import resource
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

import weft
from weft.errors import InputError

MIB = 2**20
STACK_BYTES = 1 * MIB
MAPPED_FROM_BYTES = 1 * MIB
SAMPLE_S = 0.01

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h

IMPORTED_LATE = (
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch._dynamo",
)


class Memory(ABC):
    """The memory of one device. Its baseline is what is used when this is made: make it before the model."""

    @abstractmethod
    def limit(self, limit_bytes: int | None) -> None:
        """Let the process use this much above what it uses now; torch raises where more is asked for. None: no limit.

        Raises:
            InputError: no limit can be enforced here.
        """

    @abstractmethod
    def reset(self) -> None:
        """Begin a new peak."""

    @abstractmethod
    def peak(self) -> int:
        """Most bytes used at once since ``reset``, above the baseline."""


def is_limited() -> bool:
    """Whether this process is held to a limit."""
    return resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY


def of(device: torch.device) -> Memory:
    """The memory of a device of this process."""
    if device.type != "cpu":
        return AcceleratorMemory(device)
    import_late()
    gc.collect()
    _give_back()
    return ProcessMemory() if Path("/proc/self/status").exists() else SampledMemory()


def import_late() -> None:
    """Import what training comes to import of torch and of weft. Done before the baseline, it counts as no model's
    memory."""
    for module in IMPORTED_LATE:
        importlib.import_module(module)
    for name in weft.__all__:
        getattr(weft, name)  # is imported by this


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """What a process takes inside the block, for libraries and data, does not count against its limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA) if Path("/proc/self/status").exists() else (0, 0)
    if soft == hard:
        yield
        return
    room = soft - _status("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + room, hard))


class ProcessMemory(Memory):
    """A process on Linux, as the kernel counts it.

    The kernel keeps a high-water mark of all resident memory and lets a process reset its own. Pages of files (the
    libraries) are in it, and are taken off as they stand when the peak is read: they hardly shrink.
    """

    def __init__(self) -> None:
        self._baseline = _status("RssAnon")
        self.reset()

    def limit(self, limit_bytes: int | None) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        soft = hard
        if limit_bytes is not None:
            economise()
            soft = _status("VmData") + limit_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))

    def reset(self) -> None:
        _give_back()  # or what was freed inside the heap would be in the new peak
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: the mark becomes what is resident now

    def peak(self) -> int:
        status = _all_status()
        return max(0, status["VmHWM"] - status["RssFile"] - status["RssShmem"] - self._baseline)


class SampledMemory(Memory):
    """A process on another system: its resident memory, looked at every SAMPLE_S."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._baseline = int(self._process.memory_info().rss)
        self._highest = self._baseline
        threading.Thread(target=self._sample, daemon=True).start()

    def limit(self, limit_bytes: int | None) -> None:
        if limit_bytes is not None:
            raise InputError(f"a memory limit on a CPU process needs Linux, and this is {sys.platform}; leave it out")

    def reset(self) -> None:
        self._highest = int(self._process.memory_info().rss)

    def peak(self) -> int:
        return max(0, max(self._highest, int(self._process.memory_info().rss)) - self._baseline)

    def _sample(self) -> None:
        pause = threading.Event()
        while not pause.wait(SAMPLE_S):
            self._highest = max(self._highest, int(self._process.memory_info().rss))


class AcceleratorMemory(Memory):
    """An accelerator: what torch's caching allocator gave to tensors of this process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._baseline = int(torch.accelerator.memory_allocated(device))
        self.reset()

    def limit(self, limit_bytes: int | None) -> None:
        if self._device.type != "cuda":
            raise InputError(f"a memory limit on a device of type {self._device.type} cannot be enforced; leave it out")
        total = torch.accelerator.get_memory_info(self._device)[1]
        share = 1.0 if limit_bytes is None else min(1.0, limit_bytes / total)
        torch.cuda.set_per_process_memory_fraction(share, self._device)

    def reset(self) -> None:
        torch.accelerator.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return int(torch.accelerator.max_memory_allocated(self._device)) - self._baseline


def economise() -> None:
    """Have glibc give freed tensors back to the system, and threads to come take small stacks. Cannot be undone.

    ``limit`` does it; a process that is going to be limited does it first of all, before it has threads.
    """
    libc = ctypes.CDLL(None)
    try:
        malloc_option, default_of, set_size, set_default = (
            libc.mallopt,
            libc.pthread_getattr_default_np,
            libc.pthread_attr_setstacksize,
            libc.pthread_setattr_default_np,
        )
    except AttributeError:
        return  # another C library: the limit holds all the same, with more of it lost
    malloc_option(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
    malloc_option(M_TRIM_THRESHOLD, MAPPED_FROM_BYTES)
    malloc_option(M_ARENA_MAX, 1)
    attributes = ctypes.create_string_buffer(64)  # sizeof(pthread_attr_t) is 56 on x86-64, 64 on aarch64
    if default_of(attributes) == 0 and set_size(attributes, ctypes.c_size_t(STACK_BYTES)) == 0:
        set_default(attributes)


def _give_back() -> None:
    """Have glibc return the pages that were freed, or the next model would be made in them and seem to cost nothing."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def _all_status() -> dict[str, int]:
    """The process's quantities in bytes, by the kernel's names."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.endswith(" kB")]
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, _ in lines}


def _status(key: str) -> int:
    return _all_status()[key]
