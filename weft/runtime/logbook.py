"""Logbook: what each process of a job is doing, in a file of its own that others can read while it hangs or is dead.

A page of memory that is mapped from a file in the job's directory: noting something there is a store, and what was
noted outlives the process.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from weft.runtime.worker import JOB

RECORD = struct.Struct("<dq")
"""Seconds on the machine's monotonic clock, and the step being done; -1 before the first."""


@dataclass(frozen=True)
class Note:
    """What a process noted last: when, on the machine's monotonic clock, and the step it was doing; None before the
    first."""

    moment: float
    step: int | None


class Logbook:
    """This process's own. Without a job's directory it notes nothing that anybody reads.

    Args:
        path: of the file; None: in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        if path is None:
            self._page = mmap.mmap(-1, mmap.PAGESIZE)
        else:
            with path.open("w+b") as file:
                file.truncate(mmap.PAGESIZE)
                self._page = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        RECORD.pack_into(self._page, 0, time.monotonic(), -1)

    @classmethod
    def here(cls) -> Logbook:
        """The one of this process of a job, or one for nobody."""
        job = os.environ.get(JOB)
        return cls(None if job is None else Path(job, f"{os.environ['RANK']}.log"))

    def begin_step(self, step: int) -> None:
        """Note that a step begins, counted from the start of training."""
        RECORD.pack_into(self._page, 0, time.monotonic(), step)


def read(path: Path) -> Note | None:
    """What was noted last in a file; None if it is none."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if len(content) < RECORD.size:
        return None
    moment, step = RECORD.unpack_from(content)
    return Note(moment, None if step < 0 else step)


def step_of(job: Path) -> int | None:
    """The furthest step that a process of a job was doing; None where none had begun one."""
    notes = [read(path) for path in job.glob("*.log")]
    return max((note.step for note in notes if note is not None and note.step is not None), default=None)
