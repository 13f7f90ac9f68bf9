"""Which process failed first, and of what: the one error a user sees.

When a process of a job dies, its peers die too, of the connection that it closed. Each process that raises leaves a
record; one that is killed leaves none, only its exit code. The root is, in this order:

1. a process that left no record and was not ended by us (SIGKILL, a segmentation fault, ``os._exit``): nothing that
   happens to its peers can cause that;
2. the earliest record that is not about a lost peer;
3. a silent abort (NCCL's watchdog aborts a process whose peer is gone, so it ranks below a record);
4. the earliest record about a lost peer.
"""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cloudpickle
import torch
import torch.distributed as dist

from weft.errors import InputError, NonFiniteError, WeftError, WorkerError

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
    """

    rank: int
    moment: float
    cause: str
    traceback: str
    lost_peer: bool
    error: InputError | NonFiniteError | None = None

    @classmethod
    def of(cls, error: BaseException, rank: int, memory: str = "") -> Failure:
        """The record of an exception; ``memory`` describes the limit of the process, if it has one."""
        return cls(
            rank=rank,
            moment=time.monotonic(),
            cause=cause_of(error, memory),
            traceback="".join(traceback.format_exception(error)),
            lost_peer=any(_lost_peer(link) for link in chain(error)),
            error=error if isinstance(error, (InputError, NonFiniteError)) else None,
        )

    def save(self, path: Path) -> None:
        """Write the record; a reader sees all of it or none."""
        part = path.with_suffix(".part")
        part.write_bytes(cloudpickle.dumps(self))
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


def read_failure(job: Path, exits: dict[int, int]) -> Exception:
    """The one error of a failed job, from what its processes left."""
    failures = [Failure.load(path) for path in job.glob("*.failure")]
    stages = {int(path.stem): int(path.read_text()) for path in job.glob("*.stage")}
    return first(failures, exits, stages)


def first(failures: Sequence[Failure], exits: Mapping[int, int], stages: Mapping[int, int]) -> WeftError:
    """The error to raise for a job of which some processes failed.

    Args:
        failures: the records that were left.
        exits: exit code of every failed rank, negative for a signal.
        stages: pipeline stage of the ranks that said it.
    """
    recorded = {failure.rank for failure in failures}
    silent = {rank: code for rank, code in exits.items() if rank not in recorded and code != -signal.SIGTERM}
    killed = [rank for rank, code in sorted(silent.items()) if code != -signal.SIGABRT]
    by_time = sorted(failures, key=lambda failure: (failure.lost_peer, failure.moment))
    if killed:
        return _silent(killed[0], exits[killed[0]], stages)
    if silent and (not by_time or by_time[0].lost_peer):
        rank = min(silent)
        return _silent(rank, exits[rank], stages)
    if by_time:
        root = by_time[0]
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
