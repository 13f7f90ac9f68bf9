"""Whether the workers get on, seen from outside: one that hangs tells nobody.

How long a step may take nobody knows before: a long prompt takes a big model tens of seconds, and the longest step so
far says nothing of it. But who computes uses processor time, also who waits for CUDA (its default is to spin), and
who waits for a process that hangs uses next to none. So workers get on while steps come, or while they use processor
time and none of them is stopped. They are looked at once a second, and hang once that many looks in a row saw neither.
Looks are counted, not seconds: those in which the server itself stood still count for nothing.

What is not seen is a worker that spins for ever, as one that waits with NCCL for a peer that computes something else.
Then the collective gives up by itself (``worker.TIMEOUT_S``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import psutil

LOOK_S = 1.0
"""Seconds between looks."""

SERVING_LOOKS = 20
"""With requests under way."""

LOADING_LOOKS = 180
"""Before the workers are ready: files may come from far away."""

WORK_S = 0.2
"""Seconds of processor time, of all workers since they were last seen to get on, that are work: a hundredth of a core
over SERVING_LOOKS."""


class Pulse:
    """See the module.

    Args:
        workers: gives the processes of the job.
    """

    def __init__(self, workers: Callable[[], Sequence[psutil.Process]]) -> None:
        self._workers = workers
        self._still = 0
        self._used_s = 0.0

    def beat(self) -> None:
        """A step came, or there is nothing to do."""
        self._still = 0

    def look(self, patience: int) -> str | None:
        """Look at the workers.

        Args:
            patience: looks in a row after which workers that do not get on hang.

        Returns:
            what is wrong with them then.
        """
        self._still += 1
        used_s, stopped = 0.0, list[int]()
        for process in self._workers():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                used_s += times.user + times.system
                if process.status() == psutil.STATUS_STOPPED:
                    stopped.append(process.pid)
        if abs(used_s - self._used_s) > WORK_S:  # less than before: a process that is over is counted no longer
            self._used_s = used_s
            if not stopped:
                self._still = 0
        if self._still < patience:
            return None
        if stopped:
            return f"worker process {stopped[0]} is stopped"
        return f"the workers hang: for {self._still} s there was no step, and they computed nothing"
