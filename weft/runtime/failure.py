"""Which process failed first, and of what: the one error a user sees.

When a process of a job dies, its peers die too, of the connection that it closed. Each process that raises leaves a
record; one that is killed leaves none, only its exit code. The root is, in this order:

1. a process that left no record and was not ended by us (SIGKILL, a segmentation fault, ``os._exit``): nothing that
   happens to its peers can cause that;
2. the earliest record that is not about other ranks;
3. the earliest record of one that waited too long, which names the rank that is stuck (``hang``);
4. a silent abort (NCCL's watchdog aborts a process whose peer is gone or stuck, so it ranks below a record);
5. the earliest record about a lost peer.
"""

from __future__ import annotations

import functools
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ParamSpec, Protocol, TypeVar, cast

import cloudpickle
import torch
import torch.distributed as dist

from weft.errors import InputError, NonFiniteError, StuckError, WeftError, WorkerError
from weft.runtime import hang
from weft.runtime.hang import Stuck
from weft.runtime.logbook import JOB, Logbook, Note, read_all

P = ParamSpec("P")
T = TypeVar("T")

HOUSE = Path(__file__).resolve().parents[1]
"""Directory of weft itself."""

PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "gloo/transport",
    "remote process exited",
)
"""What Gloo and NCCL say, in a plain RuntimeError, when the other end is gone."""

TIMED_OUT = ("Timed out waiting", "Watchdog caught collective operation timeout")
"""What Gloo and NCCL say when a peer does not do its part."""

OUT_OF_MEMORY = ("can't allocate memory", "std::bad_alloc", "Cannot allocate memory")
"""What an allocation says on the CPU when the operating system refuses it."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What a process wrote down before it died.

    Attributes:
        rank: global rank.
        moment: seconds on the machine's monotonic clock, which all its processes share.
        cause: one line.
        traceback: as Python prints it.
        lost_peer: it failed only because another process was gone.
        error: the exception itself where the same would happen every time (the user's input is wrong, or a batch gives
            numbers that are not finite), so that it is raised again as it was.
        stuck: it failed of waiting for this one.
    """

    rank: int
    moment: float
    cause: str
    traceback: str
    lost_peer: bool
    error: InputError | NonFiniteError | None = None
    stuck: Stuck | None = None

    @classmethod
    def of(cls, error: BaseException, rank: int, memory: str = "", *, job: Path | None = None) -> Failure:
        """The record of an exception in the process of a rank.

        Args:
            memory: describes the limit of the process, if it has one.
            job: directory of the job, where others' logbooks are looked at if this one waited too long for them, or
                lost one that may have: that takes a second or two.
        """
        moment = time.monotonic()
        lost, stuck = any(_lost_peer(link) for link in chain(error)), None
        if job is not None and any(_timed_out(link) for link in chain(error)):
            stuck = hang.look(job, rank, hang.world_size())
        elif job is not None and lost:
            hang.linger(job, rank, hang.world_size())
        return cls(
            rank=rank,
            moment=moment,
            cause=cause_of(error, memory),
            traceback="".join(traceback.format_exception(error)),
            lost_peer=lost and stuck is None,
            error=error if isinstance(error, InputError | NonFiniteError) else None,
            stuck=stuck,
        )

    def save(self, path: Path) -> None:
        """Write the record; a reader sees all of it or none."""
        part = path.with_suffix(".part")
        part.write_bytes(cloudpickle.dumps(self))
        if self.stuck is not None:
            hang.wake(path.parent)  # first: others leave when they see the record, and then all are ended
        part.rename(path)

    @classmethod
    def load(cls, path: Path) -> Failure:
        """Read what ``save`` wrote."""
        failure = cloudpickle.loads(path.read_bytes())
        assert isinstance(failure, cls)
        return failure


def chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it came from, as Python prints them."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def cause_of(error: BaseException, memory: str = "") -> str:
    """What happened, in one line: type and message, and where memory ran out."""
    text = " ".join(str(error).split())
    if isinstance(error, SystemExit):
        return f"exited with code {error.code}" if isinstance(error.code, int) else str(error.code)
    if any(out_of_memory(link) for link in chain(error)):
        limit = f": the process reached {memory}" if memory else ""
        return f"out of memory{limit}{_where(error)}"
    if isinstance(error, WeftError):
        return text
    name = type(error).__qualname__
    return f"{name}: {text}{_where(error)}" if text else f"{name}{_where(error)}"


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation was refused."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(said in str(error) for said in OUT_OF_MEMORY)


class Noting(Protocol):
    """What keeps a logbook."""

    @property
    def logbook(self) -> Logbook:
        """Of this process."""


def named(step: Callable[P, T]) -> Callable[P, T]:
    """A method of what keeps a logbook, which names whom it waited for where nobody above this process would: in a job
    that torchrun started, say."""

    @functools.wraps(step)
    def watched(*args: P.args, **settings: P.kwargs) -> T:
        try:
            return step(*args, **settings)
        except RuntimeError as error:
            if JOB in os.environ or not any(_timed_out(link) for link in chain(error)):
                raise
            mine, now = cast(Noting, args[0]).logbook.last(), time.monotonic()
            world = hang.world_size()
            raise _stuck(hang.find(mine, {mine.who.rank: mine}, world=world, now=now)) from error

    return watched


def read_failure(job: Path, exits: Mapping[int, int]) -> Exception:
    """The one error of a failed job, from what its processes left."""
    failures = [Failure.load(path) for path in job.glob("*.failure")]
    stages = {int(path.stem): int(path.read_text()) for path in job.glob("*.stage")}
    return first(failures, exits, stages, read_all(job))


def first(
    failures: Sequence[Failure],
    exits: Mapping[int, int],
    stages: Mapping[int, int],
    notes: Mapping[int, Note] = MappingProxyType({}),
) -> WeftError:
    """The error to raise for a job of which some processes failed.

    Args:
        failures: the records that were left.
        exits: exit code of every failed rank, negative for a signal.
        stages: pipeline stage of the ranks that said it.
        notes: what the processes here noted last, by rank.
    """
    recorded = {failure.rank for failure in failures}
    silent = {rank: code for rank, code in exits.items() if rank not in recorded and code != -signal.SIGTERM}
    killed = [rank for rank, code in sorted(silent.items()) if code != -signal.SIGABRT]
    by_time = sorted(failures, key=lambda failure: (failure.lost_peer, failure.stuck is not None, failure.moment))
    if killed:
        return _silent(killed[0], exits[killed[0]], stages)
    if silent and (not by_time or by_time[0].lost_peer):
        rank = min(silent)
        if stuck := _aborted_waiting(rank, silent, notes):
            return _stuck(stuck)
        return _silent(rank, exits[rank], stages)
    if by_time:
        root = by_time[0]
        if root.stuck is not None:
            return _stuck(root.stuck, root.traceback)
        if root.error is not None:
            return root.error
        return WorkerError(rank=root.rank, stage=stages.get(root.rank), cause=root.cause, traceback=root.traceback)
    rank = min(exits)  # all of them ended by SIGTERM, which someone else sent
    return _silent(rank, exits[rank], stages)


def exit_cause(code: int) -> str:
    """An exit code as people say it."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (by someone, or by the operating system when memory ran out)" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}"


def _silent(rank: int, code: int, stages: Mapping[int, int]) -> WorkerError:
    return WorkerError(rank=rank, stage=stages.get(rank), cause=exit_cause(code))


def _stuck(stuck: Stuck, traceback: str = "") -> StuckError:
    return StuckError(**asdict(stuck), traceback=traceback)


def _aborted_waiting(rank: int, silent: Mapping[int, int], notes: Mapping[int, Note]) -> Stuck | None:
    """Whom a process waited for that aborted, if it had noted nothing for as long as it waits for others."""
    note, now = notes.get(rank), time.monotonic()
    if note is None or note.who.timeout_s is None or now - note.moment < note.who.timeout_s:
        return None
    return hang.find(note, notes, world=len(notes), now=now, gone=silent.keys())


def _timed_out(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(said in str(error) for said in TIMED_OUT)


def _lost_peer(error: BaseException) -> bool:
    if isinstance(error, dist.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in PEER_LOST)


def _where(error: BaseException) -> str:
    """The innermost line of the user's own code, or of ours where there is none of theirs."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_source(frame.filename)]
    theirs = [frame for frame in frames if HOUSE not in Path(frame.filename).parents]
    if not (found := theirs or frames):
        return ""
    return f" ({Path(found[-1].filename).name}:{found[-1].lineno} in {found[-1].name})"


def _is_source(filename: str) -> bool:
    return not filename.startswith("<") and "site-packages" not in Path(filename).parts
