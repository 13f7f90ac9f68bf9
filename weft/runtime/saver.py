"""Saver: writes checkpoints while training goes on.

    save      the ranks agree who writes what                                      training waits for this
    a thread  every rank copies what it writes                                     forwards and backwards go on
              and writes its file, rank 0 the index; then the folder gets its      training goes on
              name

Parameters and the optimizer's state change in the optimizer only, which waits for the copies; buffers, which change in
forwards, are copied at once, and so is what lies on an accelerator. The thread has a process group of its own, so that
what it says to other ranks does not mix with training. A rank whose disk is full says so in it: all ranks learn that a
save failed, what was written of it is removed, and the checkpoints before it stay.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weft.checkpoint import folder
from weft.checkpoint.index import Chunk, Index, Tensors, key_of
from weft.checkpoint.tensors import Form, write
from weft.errors import CheckpointError, SaveError
from weft.runtime.checkpoint import Piece, Signature, signature_of
from weft.runtime.memory import is_limited

SETTLED = ("parameter", "optimizer")
"""Kinds of tensors that nothing but the optimizer changes."""

DISK_TIMEOUT = timedelta(minutes=30)
"""What the ranks' threads wait for the slowest disk. Training waits as it does for any other collective."""


@dataclass(frozen=True)
class Share:
    """Which of all ranks' boxes this rank writes.

    Attributes:
        mine: the numbers of this rank's pieces that it writes.
        everyone: what each rank writes, in order; the same everywhere.
    """

    mine: list[int]
    everyone: list[Signature]

    @classmethod
    def of(cls, every: Sequence[Signature], rank: int) -> Share:
        """Divide what ranks have so that each box is written once and all write alike.

        Raises:
            CheckpointError: ranks have tensors of one name and of different shapes.
        """
        holders: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[tuple[int, int]]] = {}
        whole: dict[str, Any] = {}
        for owner, signature in enumerate(every):
            for number, (name, shape, _, offsets, lengths, dtype) in enumerate(signature):
                if whole.setdefault(name, (shape, dtype)) != (shape, dtype):
                    raise CheckpointError(
                        f"{name} is {whole[name]} on one rank and {(shape, dtype)} on rank {owner}; all ranks must "
                        "train the same model"
                    )
                holders.setdefault((name, offsets, lengths), []).append((owner, number))
        loads, chosen = [0] * len(every), [list[int]() for _ in every]
        for (_, _, lengths), having in holders.items():
            owner, number = min(having, key=lambda each: loads[each[0]])
            loads[owner] += max(1, torch.Size(lengths).numel())
            chosen[owner].append(number)
        return cls(chosen[rank], [[every[r][i] for i in numbers] for r, numbers in enumerate(chosen)])


@dataclass(frozen=True)
class Later:
    """A tensor that is yet to be copied.

    Attributes:
        piece: which.
        copy: where to.
        version: counts what changed it before the save.
    """

    piece: Piece
    copy: Tensor
    version: int


@dataclass(frozen=True)
class Writing:
    """A save on its way: what a thread needs of it.

    Attributes:
        directory, path: of checkpoints, and the folder that is written.
        values: what this rank writes: copies, or the trained tensors themselves.
        later: what is yet to be copied.
        index: what is known of the checkpoint before files are written.
        keep: how many checkpoints up to this one stay, or None: all.
        error: why this rank has nothing to write.
    """

    directory: Path
    path: Path
    share: Share
    values: Iterable[Tensor]
    later: Sequence[Later]
    index: Index
    keep: int | None
    error: str = ""


@dataclass
class Saver:
    """One rank's saves. All ranks make their calls in the same order."""

    _signature: Signature | None = None
    _share: Share | None = None
    _group: dist.ProcessGroup | None = None
    _copies: list[Tensor] = field(default_factory=list)
    _thread: threading.Thread | None = None
    _copied: threading.Event | None = None
    _at_once: bool = False
    _failed: str | None = None
    _begun: folder.Begun | None = None

    def save(
        self,
        directory: Path,
        pieces: Sequence[Piece],
        index: Index,
        *,
        keep: int | None = None,
        wait: bool = True,
    ) -> Path:
        """Write a checkpoint.

        Args:
            directory: of checkpoints.
            pieces: what this rank has.
            index: step, plan and settings; values of this rank's only. Files and tensors are added here.
            keep: how many checkpoints up to this one stay, this one included; None: all.
            wait: until it is written; else a thread copies and writes it: see ``settle``. Under a limit of memory,
                which copies would take from training, this waits too.

        Returns:
            the folder it has when it is complete.

        Raises:
            SaveError: it, or the one that was on its way before it, could not be written.
            CheckpointError: what is trained cannot be in a checkpoint.
        """
        self.wait()
        share, path = self._agree(directory, index.step, pieces)
        mine = [pieces[number] for number in share.mine]
        if wait or is_limited():
            ready = (piece.values.contiguous().cpu() for piece in mine)
            self._run(Writing(directory, path, share, ready, (), index, keep))
            self.wait()
        else:
            error = ""
            try:
                copies, later = self._copies_of(mine)
            except (RuntimeError, MemoryError) as raised:
                self._copies, copies, later, error = [], [], [], _short_of_memory(raised)
            writing = Writing(directory, path, share, copies, later, index, keep, error)
            self._copied = threading.Event()
            self._thread = threading.Thread(target=self._run, args=(writing,), name="weft checkpoint")
            self._thread.start()
        return directory / folder.name_of(index.step)

    def settle(self) -> None:
        """Wait until parameters and the optimizer's state may change."""
        if self._copied is not None:
            self._copied.wait()
            self._copied = None

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            SaveError: what was could not be.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise SaveError(failed)

    def _agree(self, directory: Path, step: int, pieces: Sequence[Piece]) -> tuple[Share, Path]:
        """Who writes what, and where; the folder is there."""
        if self._group is None and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=DISK_TIMEOUT)
        signature = signature_of(pieces)
        first = dist.get_rank() == 0
        mark, reason = folder.fresh_mark() if first else 0, ""
        if first:
            self._end()
            try:
                self._begun = folder.begin(directory, step, f"{mark:x}")
            except OSError as error:
                reason = f"{directory}: cannot hold a checkpoint: {error.strerror or error}"
        told = torch.tensor([signature != self._signature, mark, bool(reason)], dtype=torch.long)
        if self._group is not None:
            dist.all_reduce(told, op=dist.ReduceOp.MAX)
        changed, mark, failed = told.tolist()
        if failed:
            raise SaveError(reason or f"{directory}: rank 0 cannot make a folder for a checkpoint there")
        if changed or self._share is None:
            self._signature, self._share = signature, Share.of(_gathered(signature), dist.get_rank())
            self._copies = []
        return self._share, folder.partial(directory, step, f"{mark:x}")

    def _copies_of(self, mine: Sequence[Piece]) -> tuple[list[Tensor], list[Later]]:
        """Room for copies in the processor's memory, which the next save uses again; and what is yet to be copied."""
        pinned = any(piece.values.device.type != "cpu" for piece in mine)
        if not self._copies:
            kinds = [(piece.values.shape, piece.values.dtype) for piece in mine]
            self._copies = [torch.empty(shape, dtype=dtype, pin_memory=pinned) for shape, dtype in kinds]
        later = []
        for piece, copy in zip(mine, self._copies, strict=True):
            if piece.kind in SETTLED and piece.values.device.type == "cpu" and not self._at_once:
                later.append(Later(piece, copy, piece.version))
            else:
                copy.copy_(piece.values, non_blocking=True)
        if pinned:
            torch.accelerator.synchronize()
        return self._copies, later

    def _copy(self, later: Sequence[Later]) -> str:
        """Copy, in the thread. Returns what went wrong, or nothing."""
        try:
            for each in later:
                each.copy.copy_(each.piece.values)
        except (RuntimeError, MemoryError) as error:  # other ranks' threads wait to hear of it
            return _short_of_memory(error)
        changed = [each.piece.name for each in later if each.piece.version != each.version]
        if not changed:
            return ""
        self._at_once = True
        return f"{changed[0]} changed, outside of the optimizer, while it was copied; the next save copies at once"

    def _run(self, writing: Writing) -> None:
        """Copy what is yet to be copied, let the optimizer go on, and write; in the thread, where there is one."""
        try:
            try:
                error = writing.error or self._copy(writing.later)
            finally:
                if self._copied is not None:
                    self._copied.set()
            self._write(writing, error)
        except Exception as error:  # whatever stopped a thread: the next call of save or wait raises it
            self._failed = f"the checkpoint of step {writing.index.step} could not be written: {error}"
        finally:
            self._end()

    def _end(self) -> None:
        """Let others know that rank 0 writes no more."""
        if self._begun is not None:
            self._begun.end()
            self._begun = None

    def _write(self, writing: Writing, error: str) -> None:
        rank, sums, length = dist.get_rank(), list[str](), 0
        file = f"rank-{rank:05d}.safetensors"
        mine = writing.share.everyone[rank]
        try:
            forms = {key_of(name, offsets): Form(dtype, lengths) for name, _, _, offsets, lengths, dtype in mine}
            if mine and not error:
                sums, length = write(writing.path / file, forms, writing.values)
        except OSError as raised:
            error = f"rank {rank}: {file}: {raised.strerror or raised}"
        except (RuntimeError, MemoryError) as raised:  # for a copy: other ranks wait to hear of it
            error = _short_of_memory(raised)
        told = _gathered((file, length, sums, writing.index.values, error), self._group)
        outcome = [next((each[-1] for each in told if each[-1]), "")]
        if rank == 0:
            try:
                if not outcome[0]:
                    _finish(writing, told)
            except OSError as raised:
                outcome = [f"{writing.path}: {raised.strerror or raised}"]
            except MemoryError as raised:
                outcome = [_short_of_memory(raised)]
            if outcome[0]:
                shutil.rmtree(writing.path, ignore_errors=True)
        if self._group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0]:
            raise SaveError(outcome[0])
        if rank == 0:
            folder.settle(writing.directory, writing.index.step, writing.keep)


def _finish(writing: Writing, told: Sequence[tuple[str, int, list[str], dict[str, Any], str]]) -> None:
    """What rank 0 does when all files are there."""
    files, values = {}, dict[str, Any]()
    found: dict[str, tuple[Form, str, list[Chunk]]] = {}
    for (file, length, sums, own, _), signature in zip(told, writing.share.everyone, strict=True):
        values |= own
        if signature:
            files[file] = length
        for (name, shape, kind, offsets, lengths, dtype), total in zip(signature, sums, strict=True):
            _, _, chunks = found.setdefault(name, (Form(dtype, shape), kind, []))
            chunks.append(Chunk(file, offsets, lengths, total))
    tensors = {name: Tensors(form, kind, tuple(chunks)) for name, (form, kind, chunks) in found.items()}
    replace(writing.index, files=files, tensors=tensors, values=values).save(writing.path)
    folder.publish(writing.path, writing.directory, writing.index.step)


def _short_of_memory(error: RuntimeError | MemoryError) -> str:
    """What other ranks are told where this one has no memory for a copy; PyTorch raises it as either."""
    return f"rank {dist.get_rank()}: {str(error) or 'no memory is left'}"


def _gathered(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, over a group of all of them; None: the job's."""
    every = [None] * dist.get_world_size()
    if len(every) == 1:
        return [value]
    dist.all_gather_object(every, value, group=group)
    return every
