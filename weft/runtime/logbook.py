"""Logbook: what each process of a job is doing, in a file of its own that others can read while it hangs or is dead.

A page of memory that is mapped from a file in the job's directory: noting something there is a store, and what was
noted outlives the process. In a training step every action of the schedule is noted when it begins, and what is waited
for when it is waited for.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from weft.schedule import Action, Kind

JOB = "WEFT_JOB"
"""Names the job's directory to its processes. Read when a process starts, describes its stage or opens its logbook."""

RECORD = struct.Struct("<dq2sqq?96s")
"""Seconds on the machine's monotonic clock; the step being done, -1 before the first; the kind of action, its
microbatch and the other stage; whether other ranks are waited for; and in words what is done or waited for."""

GAVE_UP = RECORD.size
"""Where one byte says that the process gave up waiting for others, and why: TIMED_OUT, LOST."""

TIMED_OUT, LOST = 1, 2
"""It waited too long, or those that it waited for were gone."""

WHO = 256
"""Where the process says who it is, in JSON; zeros follow."""


@dataclass(frozen=True, kw_only=True)
class Who:
    """Who notes.

    Attributes:
        rank: global rank.
        host, pid: where it runs, and its number there.
        stage: of the pipeline; None where there is no plan yet.
        pipeline: global ranks of its pipeline, by stage.
        timeout_s: what it waits for others; None where it is the process group's.
    """

    rank: int
    host: str
    pid: int
    stage: int | None = None
    pipeline: tuple[int, ...] = ()
    timeout_s: float | None = None

    def __str__(self) -> str:
        return f"rank {self.rank}" if self.stage is None else f"rank {self.rank} (stage {self.stage})"


@dataclass(frozen=True, kw_only=True)
class Note:
    """What a process noted last.

    Attributes:
        who: the process.
        moment: when, on the machine's monotonic clock.
        step: the step it was doing, counted from the start of training; None before the first.
        kind: of the action of the schedule; None outside of them.
        microbatch, peer: of that action, -1 where there is none; ``peer`` is a stage.
        waiting: whether it waited for other ranks.
        what: the tensor it waited for, or what it did outside of the schedule.
        gave_up: whether it waited too long, or lost one for which it waited.
        timed_out: whether it waited too long.
    """

    who: Who
    moment: float
    step: int | None = None
    kind: Kind | None = None
    microbatch: int = -1
    peer: int = -1
    waiting: bool = False
    what: str = ""
    gave_up: bool = False
    timed_out: bool = False

    @property
    def awaited(self) -> int | None:
        """The rank it waited for, where it is one."""
        one = self.waiting and 0 <= self.peer < len(self.who.pipeline)
        return self.who.pipeline[self.peer] if one else None

    def describe(self) -> str:
        """What it was doing, in words."""
        of = "" if self.microbatch < 0 else f" of microbatch {self.microbatch}"
        match self.kind:
            case Kind.FORWARD | Kind.BACKWARD:
                doing = f"{'forward' if self.kind is Kind.FORWARD else 'backward'}{of}"
            case Kind.RECEIVE_ACTIVATION | Kind.RECEIVE_GRADIENT:
                doing = f"waiting for {self.tensor or 'a tensor'}{of} from stage {self.peer}"
            case Kind.SEND_ACTIVATION | Kind.SEND_GRADIENT:
                doing = f"sending {self.tensor or 'tensors'}{of} to stage {self.peer}"
            case Kind.REDUCE:
                doing = "summing gradients over the replicas"
            case _:
                doing = self.what
        return doing or "starting" if self.step is None else f"step {self.step + 1}, {doing or 'beginning'}"

    @property
    def tensor(self) -> str | None:
        """The tensor it waited for, in words."""
        if not self.what or self.kind not in (*RECEIVES, *SENDS):
            return None
        return f"the gradient of {self.what}" if self.kind in GRADIENTS else self.what


RECEIVES = (Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT)
SENDS = (Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT)
GRADIENTS = (Kind.SEND_GRADIENT, Kind.RECEIVE_GRADIENT)


class Logbook:
    """This process's own. Without a job's directory it notes nothing that anybody else reads.

    Args:
        path: of the file; None: in memory only.
        rank: of this process.
    """

    def __init__(self, path: Path | None, rank: int = 0) -> None:
        if path is None:
            self._page = mmap.mmap(-1, mmap.PAGESIZE)
        else:
            with path.open("w+b") as file:
                file.truncate(mmap.PAGESIZE)
                self._page = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self._rank, self._step, self._action = rank, -1, Action(Kind.STEP)
        self.introduce()
        self.note("")

    @classmethod
    def here(cls) -> Logbook:
        """The one of this process of a job, or one for nobody."""
        job, rank = os.environ.get(JOB), int(os.environ.get("RANK", "0"))
        return cls(None if job is None else Path(job, f"{rank}.log"), rank)

    def introduce(
        self, *, stage: int | None = None, pipeline: Sequence[int] = (), timeout_s: float | None = None
    ) -> None:
        """Say who this is: see ``Who``."""
        who = {"rank": self._rank, "host": socket.gethostname(), "pid": os.getpid(), "stage": stage}
        text = json.dumps({**who, "pipeline": [*pipeline], "timeout_s": timeout_s}).encode()
        if WHO + len(text) > len(self._page):  # hundreds of stages
            text = json.dumps({**who, "pipeline": [], "timeout_s": timeout_s}).encode()
        self._page[WHO:] = text.ljust(len(self._page) - WHO, b"\0")

    def begin_step(self, step: int) -> None:
        """A step begins, counted from the start of training."""
        self._step = step
        self.note("")

    def perform(self, action: Action) -> None:
        """An action of the schedule begins."""
        self._action = action
        kind, m, peer, _ = action
        waiting = kind is Kind.REDUCE
        RECORD.pack_into(self._page, 0, time.monotonic(), self._step, kind.encode(), m, peer, waiting, b"")

    def wait(self, kind: Kind, microbatch: int, peer: int, name: str) -> None:
        """A tensor is waited for: an output of a call, or its gradient. One that is sent waits to be taken."""
        RECORD.pack_into(
            self._page, 0, time.monotonic(), self._step, kind.encode(), microbatch, peer, True, name.encode()
        )

    def note(self, what: str, *, waiting: bool = False) -> None:
        """Something outside of the schedule begins, in words; ``waiting``: all ranks do it together."""
        RECORD.pack_into(self._page, 0, time.monotonic(), self._step, b"", -1, -1, waiting, what.encode())

    def hook(self, unit: str) -> Callable[..., None]:
        """Called before a module, it notes that the parameters of this unit are gathered."""
        return lambda *_: self.note(f"gathering the parameters of {unit}", waiting=True)

    def resume(self) -> None:
        """What the action of the schedule waited for in between is there."""
        self.perform(self._action)

    def last(self) -> Note:
        """What was noted last."""
        return parse(self._page[:])


def read(path: Path) -> Note | None:
    """What was noted last in a file; None if it is none, or nothing has been noted yet, or the process is just writing
    who it is."""
    try:
        content = path.read_bytes()
        return parse(content) if any(content[WHO:]) else None
    except (OSError, ValueError, TypeError, KeyError):  # the last three: some of it is new and some is not
        return None


def parse(page: bytes) -> Note:
    """What stands on a page."""
    moment, step, kind, microbatch, peer, waiting, what = RECORD.unpack_from(page)
    who = json.loads(page[WHO:].rstrip(b"\0"))
    return Note(
        who=Who(**{**who, "pipeline": tuple(who["pipeline"])}),
        moment=moment,
        step=None if step < 0 else step,
        kind=Kind(kind.rstrip(b"\0").decode()) if kind.rstrip(b"\0") else None,
        microbatch=microbatch,
        peer=peer,
        waiting=waiting,
        what=what.rstrip(b"\0").decode(errors="ignore"),
        gave_up=bool(page[GAVE_UP]),
        timed_out=page[GAVE_UP] == TIMED_OUT,
    )


def read_all(job: Path) -> dict[int, Note]:
    """What the processes of a job on this machine noted last, by rank."""
    notes = [read(path) for path in job.glob("*.log")]
    return {note.who.rank: note for note in notes if note is not None}


def give_up(path: Path, why: int = TIMED_OUT) -> None:
    """Mark a process of a job as one that gave up waiting for others, since it waited too long or they were gone."""
    if path.exists():  # else it never noted anything
        with path.open("r+b") as file:
            file.seek(GAVE_UP)
            file.write(bytes([why]))


def step_of(job: Path) -> int | None:
    """The furthest step that a process of a job was doing; None where none had begun one."""
    return max((note.step for note in read_all(job).values() if note.step is not None), default=None)
