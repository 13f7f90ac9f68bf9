"""Vigil: who started a node's processes looks at them from outside, for ranks that hang where no rank could tell.

Ranks find out who is stuck by waiting too long (``hang``). While a job starts they must be patient: one plans, records
and compiles for minutes that another does not. Waiting tells nothing then, but doing nothing does:

    stopped   a process is stopped by a signal, at any moment of the job
    still     until the first step is done: no process of the job computes, reads, writes or notes anything

Either hangs when it lasts for the job's timeout; a process that computes, however long, does not. After the first step
``still`` is no sign any more: a job may wait for a slow device or for data, and ranks see for themselves. Nor is it one
of a single process, for which nobody waits, and in which somebody may be debugging. Only time counts in which somebody
looked: a machine that slept, or stood still itself, says nothing of its processes.

Nor does one compute that notes that it waits for others, whatever processor time it uses: NCCL spins. What is not seen
is a process that spins before it notes anything; its collective gives up by itself (``worker.TIMEOUT_S``).
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
from torch._C._distributed_c10d import Store  # torch.distributed has it too, but not for type checkers

from weft.runtime import hang
from weft.runtime.failure import Failure
from weft.runtime.hang import Stuck
from weft.runtime.logbook import Note, Who, read_all
from weft.runtime.register import answer

LOOK_S = 1.0
"""Seconds between looks; a look stands for twice that at most."""

WORK, LEAST_WORK_S, LEAST_BYTES = 0.02, 0.05, 2**16
"""What a process at work uses since the job was last seen to get on: a share of a core, and so many seconds of it at
least; or bytes read and written."""

SIGNS = "weft/signs of life"
"""In the store of the job's nodes: how many looks saw one."""


class Trace(NamedTuple):
    """What a process, its children included, has done so far.

    Attributes:
        used_s: processor time; 0 while it waits for others.
        moved: bytes read and written, of files and pages of them.
        noted: when it noted something last; 0 where it never has.
    """

    used_s: float
    moved: int
    noted: float


class Vigil:
    """See the module.

    Args:
        job: the directory where the processes keep their logbooks, and failures are left.
        timeout_s: after which they hang; None: nobody looks.
    """

    def __init__(self, job: Path, timeout_s: float | None) -> None:
        self._job, self._timeout_s = job, timeout_s
        self._begin({})

    def _begin(self, workers: Mapping[int, int]) -> None:
        self._workers, self._looked = dict(workers), time.monotonic()
        self._stopped: dict[int, float] = {}
        self._still_s, self._signs = 0.0, 0
        self._traces: dict[int, Trace] = {}

    def ends(self, workers: Mapping[int, int], world: int, store: Store | None = None) -> bool:
        """Look, if it is time to, and end the processes if one hangs.

        Args:
            workers: process ids of this node's, by rank.
            world: ranks of the job.
            store: of the job's nodes, where there are several: all look, and a sign of life anywhere is one.

        Returns:
            whether they were ended. Then the failure is in the job's directory.

        Raises:
            RendezvousConnectionError: the store does not answer: the way to the other nodes is dead.
        """
        stuck = None if self._timeout_s is None else self._look(workers, world, store)
        if stuck is None:
            return False
        # All are told before any goes on: none is to fail of another's end.
        for end in (signal.SIGTERM, signal.SIGCONT):
            for pid in workers.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, end)
        own = self._job / f"{stuck.rank}.failure"
        Failure(
            rank=stuck.rank, moment=time.monotonic(), cause=stuck.cause, traceback="", lost_peer=False, stuck=stuck
        ).save(own)
        return True

    def _look(self, workers: Mapping[int, int], world: int, store: Store | None) -> Stuck | None:
        assert self._timeout_s is not None
        if workers != self._workers:
            self._begin(workers)
        now = time.monotonic()
        passed = now - self._looked
        if passed < LOOK_S:
            return None
        self._looked, passed = now, min(passed, 2 * LOOK_S)
        notes = {rank: note for rank, note in read_all(self._job).items() if rank in workers}
        starting = any(rank not in notes or notes[rank].who.timeout_s is None for rank in workers)
        # Once ranks find out by themselves they know more: what they waited for. So they get a little longer.
        patience_s = self._timeout_s + (0 if starting else hang.SETTLE_S + LOOK_S)
        # By a signal only: one that a debugger holds is not to be ended.
        stopped = [rank for rank, pid in workers.items() if hang.status_of(pid) == psutil.STATUS_STOPPED]
        self._stopped = {rank: self._stopped.get(rank, 0.0) + passed for rank in stopped}
        for rank, for_s in self._stopped.items():
            if for_s >= patience_s:
                return self._stuck(rank, f"stopped by a signal for {for_s:.0f} s", notes)
        if not starting or world == 1:
            return None
        self._still_s += passed
        if self._gets_on(notes, store):
            self._still_s = 0.0
        return self._stillest(notes, world) if self._still_s >= patience_s else None

    def _gets_on(self, notes: Mapping[int, Note], store: Store | None) -> bool:
        """Whether a process of the job has done anything since it was last seen to."""
        traces = {rank: _trace(pid, notes.get(rank)) for rank, pid in self._workers.items()}
        least_s = max(LEAST_WORK_S, WORK * self._still_s)
        gets_on = not self._traces or any(
            abs(new.used_s - old.used_s) > least_s  # less than before: a child is over
            or abs(new.moved - old.moved) > LEAST_BYTES
            or new.noted != old.noted
            for new, old in ((traces[rank], self._traces[rank]) for rank in traces)
        )
        if store is not None:
            with contextlib.suppress(RuntimeError):  # the node that keeps it is gone: no signs from there
                signs = answer(functools.partial(store.add, SIGNS, int(gets_on)))
                gets_on, self._signs = signs != self._signs, signs
        if gets_on:
            self._traces = traces
        return gets_on

    def _stillest(self, notes: Mapping[int, Note], world: int) -> Stuck:
        """Which of the processes is to blame, when none does anything."""
        now = time.monotonic()
        unheard = [rank for rank in self._workers if rank not in notes]
        waiting = sorted((note for note in notes.values() if note.waiting), key=lambda note: note.moment)
        if waiting and not unheard:
            if len(waiting) == len(notes):
                notes = {rank: replace(note, gave_up=True) for rank, note in notes.items()}
            return hang.find(waiting[0], notes, world=world, now=now)
        rank = min(unheard) if unheard else min(notes, key=lambda rank: notes[rank].moment)
        where = "" if world == len(self._workers) else " on this host or another"
        return self._stuck(rank, f"no process{where} has done anything for {self._still_s:.0f} s", notes)

    def _stuck(self, rank: int, how: str, notes: Mapping[int, Note]) -> Stuck:
        """A process of this node that is to blame, and who waits for it."""
        waiting = [note for note in notes.values() if note.waiting and note.who.rank != rank]
        waits = min(waiting, key=lambda note: note.moment, default=None)
        own = notes.get(rank)
        who = Who(rank=rank, host=socket.gethostname(), pid=self._workers[rank]) if own is None else own.who
        action = "starting, before it could note what it does" if own is None else own.describe()
        more = f"; {waits.who} on {waits.who.host} waited for others: {waits.describe()}" if waits else ""
        return Stuck(
            rank=rank,
            stage=who.stage,
            host=who.host,
            step=None if own is None else own.step,
            action=action,
            tensor=None if waits is None else waits.tensor,
            cause=f"{how} ({action}){more}",
        )


def _trace(pid: int, note: Note | None) -> Trace:
    """Of a process and its children: compilers and loaders of data work for it."""
    used_s, moved = 0.0, 0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                used_s += sum(each.cpu_times()[:4])  # user, system, and the same of children that are over
                if sys.platform == "linux":
                    io = each.io_counters()
                    moved += io.read_chars + io.write_chars + io.read_bytes  # the last: of mapped files
    if note is None:
        return Trace(used_s, moved, 0.0)
    return Trace(0.0 if note.waiting else used_s, moved, note.moment)
