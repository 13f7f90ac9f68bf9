"""Hang: which rank the others wait for in vain, by what all of them noted last.

A rank that is stuck leaves no record; those that wait for it fail of a timeout, at about the same time, and none of
them is to blame. So whoever fails of a timeout, or of a peer that did, marks its logbook, gives the others a moment to
do the same, and looks at those that did not: one that is stopped, else the one furthest behind. Among ranks at one step
that is one that computes, rather than one that waits, and the one that has noted nothing for longest.

What torch says (2.13): Gloo raises RuntimeError "Timed out waiting 3000ms for recv operation to complete" (or send) in
``wait``, and closes its connections, so that others which wait for this rank fail at that moment of a lost peer. Those
linger until it has found out: who started the processes ends all as soon as one is gone. NCCL's watchdog aborts the
process, which leaves no record: then the logbooks are read by who started it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from weft.runtime.logbook import LOST, Note, Who, give_up, read_all

SETTLE_S = 1.0
"""What a rank that gave up leaves others to do the same, before it looks who did not."""

LINGER_S, MOMENT_S, LOOK_S = SETTLE_S + 0.5, 0.5, 0.05
"""How long at most one that lost a peer leaves another to find out who is stuck; how long it waits for a sign of such a
one, where it cannot see all; and how often it looks."""

ELSEWHERE = "an unknown host"


@dataclass(frozen=True, kw_only=True)
class Stuck:
    """A rank that others waited for in vain.

    Attributes:
        rank, stage, host: which; the host is ELSEWHERE where its logbook cannot be read.
        step: that it was doing, counted from 0; None before the first.
        action: what it was doing, in words.
        tensor: what was waited for; None where it was no tensor of another stage.
        cause: the whole story, in one line.
    """

    rank: int
    stage: int | None
    host: str
    step: int | None
    action: str
    tensor: str | None
    cause: str


def look(job: Path, rank: int, world: int) -> Stuck | None:
    """What this process of a job, which has waited too long, finds out; None where it noted nothing itself."""
    moment, own = time.monotonic(), job / f"{rank}.log"
    if not own.exists():
        return None
    give_up(own)
    time.sleep(SETTLE_S)
    notes = read_all(job)
    return find(notes[rank], notes, world=world, now=moment) if rank in notes else None


def linger(job: Path, rank: int, world: int) -> None:
    """What this process of a job, which has lost a peer, does before it leaves: it waits for one that waited too long,
    which closed its connections at that moment and is about to find out for whom it did (``look``).

    Not where a process is gone, or has left a record: that is the peer, or nothing more is to be found out.
    """
    own, begun = job / f"{rank}.log", time.monotonic()
    if not own.exists():
        return
    give_up(own, LOST)
    while (passed := time.monotonic() - begun) < LINGER_S and not any(job.glob("*.failure")):
        others = [note for other, note in read_all(job).items() if other != rank]
        if any(is_gone(note.who) for note in others):
            return
        # The peer may have been on a host that is gone.
        if passed > MOMENT_S and len(others) + 1 < world and not any(note.timed_out for note in others):
            return
        time.sleep(LOOK_S)


def find(mine: Note, notes: Mapping[int, Note], *, world: int, now: float, gone: Collection[int] = ()) -> Stuck:
    """Which rank is stuck.

    Args:
        mine: of a rank that waited too long.
        notes: of all ranks whose logbooks can be read here, by rank.
        world: ranks of the job.
        now: when it gave up, on the machine's monotonic clock.
        gone: ranks that ended of waiting without a mark.
    """
    waited = f"{mine.who} on {mine.who.host} gave up after {now - mine.moment:.0f} s: {mine.describe()}"
    others = [n for rank, n in notes.items() if rank != mine.who.rank and not n.gave_up and rank not in gone]
    stopped = {n.who.rank for n in others if is_stopped(n.who)}
    behind = sorted(others, key=lambda n: (n.who.rank not in stopped, _step(n), n.waiting, n.moment))
    far = len(notes) < world and mine.awaited is not None and mine.awaited not in notes
    if behind and not (far and behind[0].waiting and behind[0].who.rank not in stopped):
        note = behind[0]
        how = "stopped by a signal" if note.who.rank in stopped else f"nothing new for {now - note.moment:.0f} s"
        cause = f"{how} ({note.describe()}); {waited}"
        return _stuck(note, mine.tensor, cause)
    if far:
        assert mine.awaited is not None
        return Stuck(
            rank=mine.awaited,
            stage=mine.peer,
            host=ELSEWHERE,
            step=None,
            action="not known here",
            tensor=mine.tensor,
            cause=f"nothing came from it, or could go to it; {waited}",
        )
    reason = "ranks whose logbooks are not here are stuck" if len(notes) < world else "all ranks wait for one another"
    return _stuck(mine, mine.tensor, f"{reason}, or the link between them is dead, or they disagree; {waited}")


def is_stopped(who: Who) -> bool:
    """Whether a process of this machine is stopped (SIGSTOP, Ctrl-Z, a debugger), as far as the system tells."""
    if who.host != socket.gethostname():
        return False
    return status_of(who.pid) in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


def is_gone(who: Who) -> bool:
    """Whether a process of this machine has ended."""
    return who.host == socket.gethostname() and status_of(who.pid) in (None, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def status_of(pid: int) -> str | None:
    """Of a process of this machine, as psutil names it; None where there is none."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.Error:
        return None


def wake(job: Path) -> None:
    """Let processes of a failed job go on that are stopped: they would take no SIGTERM, by which the agent ends them,
    and it would wait half a minute."""
    for note in read_all(job).values():
        if is_stopped(note.who):
            with contextlib.suppress(OSError):  # it is gone
                os.kill(note.who.pid, signal.SIGCONT)


def world_size() -> int:
    """Processes of the job, as the one that started this process says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _step(note: Note) -> int:
    return -1 if note.step is None else note.step


def _stuck(note: Note, tensor: str | None, cause: str) -> Stuck:
    who = note.who
    return Stuck(
        rank=who.rank,
        stage=who.stage,
        host=who.host,
        step=note.step,
        action=note.describe(),
        tensor=tensor,
        cause=cause,
    )
