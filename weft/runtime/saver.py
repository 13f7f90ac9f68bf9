"""Saver: writes checkpoints while training goes on.

    save      the ranks agree who writes what; each copies what it writes          training waits for this
    a thread  every rank writes its file, rank 0 the index; then the folder        training goes on
              gets its name

The thread has a process group of its own, so that what it says to other ranks does not mix with training. A rank whose
disk is full says so in it: all ranks learn that a save failed, what was written of it is removed, and the checkpoints
before it stay.
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
class Writing:
    """A save on its way: what a thread needs of it.

    Attributes:
        directory, path: of checkpoints, and the folder that is written.
        values: what this rank writes: copies, or the trained tensors themselves.
        index: what is known of the checkpoint before files are written.
        keep: how many checkpoints stay, or None: all.
    """

    directory: Path
    path: Path
    share: Share
    values: Iterable[Tensor]
    index: Index
    keep: int | None


@dataclass
class Saver:
    """One rank's saves. All ranks make their calls in the same order."""

    _signature: Signature | None = None
    _share: Share | None = None
    _group: dist.ProcessGroup | None = None
    _copies: list[Tensor] = field(default_factory=list)
    _thread: threading.Thread | None = None
    _failed: str | None = None

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
            keep: how many checkpoints stay, this one included; None: all.
            wait: until it is written; else copies are made and a thread writes them. Under a limit of memory, which
                copies would take from training, this waits too.

        Returns:
            the folder it has when it is complete.

        Raises:
            SaveError: it, or the one that was on its way before it, could not be written.
            CheckpointError: what is trained cannot be in a checkpoint.
        """
        self.wait()
        share, path = self._agree(directory, index.step, pieces)
        values = [pieces[number].values for number in share.mine]
        wait = wait or is_limited()
        ready = (value.contiguous().cpu() for value in values) if wait else self._copied(values)
        writing = Writing(directory, path, share, ready, index, keep)
        if wait:
            self._run(writing)
            self.wait()
        else:
            self._thread = threading.Thread(target=self._run, args=(writing,), name="weft checkpoint")
            self._thread.start()
        return directory / folder.name_of(index.step)

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
            try:
                folder.begin(directory, step, f"{mark:x}")
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

    def _copied(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Copies in the processor's memory, which the next save uses again."""
        if not self._copies:
            pinned = any(value.device.type != "cpu" for value in values)
            self._copies = [torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned) for value in values]
        for copy, value in zip(self._copies, values, strict=True):
            copy.copy_(value, non_blocking=True)
        if any(value.device.type != "cpu" for value in values):
            torch.accelerator.synchronize()
        return self._copies

    def _run(self, writing: Writing) -> None:
        """Write, in the thread."""
        try:
            self._write(writing)
        except Exception as error:  # whatever stopped a thread: the next call of save or wait raises it
            self._failed = f"the checkpoint of step {writing.index.step} could not be written: {error}"

    def _write(self, writing: Writing) -> None:
        rank, error, sums, length = dist.get_rank(), "", list[str](), 0
        file = f"rank-{rank:05d}.safetensors"
        mine = writing.share.everyone[rank]
        try:
            forms = {key_of(name, offsets): Form(dtype, lengths) for name, _, _, offsets, lengths, dtype in mine}
            if mine:
                sums, length = write(writing.path / file, forms, writing.values)
        except OSError as raised:
            error = f"rank {rank}: {file}: {raised.strerror or raised}"
        told = _gathered((file, length, sums, writing.index.values, error), self._group)
        outcome = [next((each[-1] for each in told if each[-1]), "")]
        if rank == 0:
            try:
                if not outcome[0]:
                    _finish(writing, told)
            except OSError as raised:
                outcome = [f"{writing.path}: {raised.strerror or raised}"]
            if outcome[0]:
                shutil.rmtree(writing.path, ignore_errors=True)
        if self._group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0]:
            raise SaveError(outcome[0])


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
    if writing.keep is not None:
        folder.prune(writing.directory, writing.keep)


def _gathered(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, over a group of all of them; None: the job's."""
    every = [None] * dist.get_world_size()
    if len(every) == 1:
        return [value]
    dist.all_gather_object(every, value, group=group)
    return every
