"""Meter: what steps really cost on this rank. The other side of an estimate.

step time       wall clock of each step, from a point where all ranks meet
memory          peak above what the process used before the model (``memory``)
bytes sent      CPU: what the loopback interface carried, over ranks; accelerators: not measured
idle            Linux CPU: the main thread was neither running nor waiting for a core; elsewhere: it waited for others
terms           as the stopwatch says; communication on Linux CPUs: all the idling that is not waiting for other stages;
                elsewhere not told apart from computing where ranks communicate inside layers. Computing is the rest
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import torch
import torch.distributed as dist

from weft.errors import JobError
from weft.estimate import Measurement
from weft.runtime.memory import Memory
from weft.runtime.stopwatch import Stopwatch


@dataclass(frozen=True)
class Clock:
    """Readings at one moment: wall seconds, seconds the main thread ran or waited for a core, bytes on loopback."""

    wall_s: float
    wanted_core_s: float | None
    bytes_sent: int | None

    @classmethod
    def read(cls) -> Clock:
        """Now."""
        counters = psutil.net_io_counters(pernic=True).get("lo")
        return cls(time.perf_counter(), wanted_core_s(), counters.bytes_sent if counters else None)


class Meter:
    """Measures steps on this rank.

    Args:
        device: of this rank.
        memory: of the device, with its baseline from before the model.
        batch_size: samples per step over all ranks.
        stopwatch: of this rank.
    """

    def __init__(self, device: torch.device, memory: Memory, *, batch_size: int, stopwatch: Stopwatch) -> None:
        self.device, self.memory, self.batch_size, self.stopwatch = device, memory, batch_size, stopwatch
        self.steps: list[float] = []
        self._idle: list[float] = []
        self._terms: list[dict[str, float]] = []
        self._bytes: list[float] = []

    def start(self) -> None:
        """A step begins. All ranks meet here, so that none is charged for another's lateness."""
        dist.barrier()
        self.stopwatch.start()
        self._clock = Clock.read()

    def stop(self) -> None:
        """The step has ended on this rank."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        now, then = Clock.read(), self._clock
        wall = now.wall_s - then.wall_s
        self.steps.append(wall)
        terms = self.stopwatch.stop()
        if now.wanted_core_s is not None and then.wanted_core_s is not None and self.device.type == "cpu":
            idle_s = max(0.0, wall - (now.wanted_core_s - then.wanted_core_s))
            terms["communication"] = max(0.0, idle_s - terms["waiting"])
        else:
            idle_s = terms["waiting"]
            if self.stopwatch.inside:
                del terms["communication"]
        self._idle.append(idle_s / wall)
        self._terms.append({"compute": wall - sum(terms.values()), **terms})
        ranks = dist.get_world_size()
        if now.bytes_sent is not None and then.bytes_sent is not None:
            # alone, all there is on the interface is what others on this machine send
            self._bytes.append((now.bytes_sent - then.bytes_sent) / ranks if ranks > 1 else 0.0)

    def measurement(self) -> Measurement:
        """What the steps so far cost; all ranks call it and get the same.

        Raises:
            JobError: no step has been measured.
        """
        if not self.steps:
            raise JobError("no step has been measured; train at least two steps")
        cpu = self.device.type == "cpu"
        mine = (
            median(self.steps),
            self.memory.peak(),
            median(self._idle),
            median(self._bytes) if cpu and self._bytes else None,
            {term: median(terms[term] for terms in self._terms) for term in self._terms[0]},
        )
        every: list[tuple[float, int, float, float | None, dict[str, float]]] = [mine] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        slowest = max(step for step, *_ in every)
        sent = [value for *_, value, _ in every if value is not None]
        return Measurement(
            step_time_s=slowest,
            peak_memory_bytes=[peak for _, peak, *_ in every],
            bytes_sent=max(sent) if sent else None,
            idle_share=sum(idle for _, _, idle, *_ in every) / len(every),
            time={term: sum(terms[term] for *_, terms in every) / len(every) for term in mine[-1]},
            samples_per_s=self.batch_size / slowest,
        )


def wanted_core_s() -> float | None:
    """Seconds the main thread has run or waited for a core, where the kernel says (Linux: schedstat)."""
    path = Path(f"/proc/self/task/{os.getpid()}/schedstat")
    try:
        ran_ns, waited_ns, _ = path.read_text().split()
    except OSError:
        return None
    return (int(ran_ns) + int(waited_ns)) / 1e9
