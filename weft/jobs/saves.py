"""Saves: the checkpoints of a training job, which goes on from them and goes on without one that cannot be written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch.distributed as dist

from weft.checkpoint.folder import complete
from weft.checkpoint.index import NAME
from weft.errors import CheckpointError, NonFiniteError, ReplicaError, SaveError
from weft.runtime.checkpoint import pieces_of
from weft.runtime.engine import Engine


def check_place(directory: str | None, resume: bool) -> None:
    """Whether a job that begins can save there.

    Raises:
        CheckpointError: it has checkpoints, which are not to be gone on from, or is one.
    """
    if directory is None:
        return
    if (Path(directory) / NAME).exists():
        raise CheckpointError(f"{directory}: is one checkpoint; give the directory it is in, {Path(directory).parent}")
    if not resume and complete(Path(directory)):
        raise CheckpointError(
            f"{directory}: holds checkpoints already; add --resume to go on from the newest, or give another directory"
        )


class Saves:
    """What a job that trains does about checkpoints, on every rank.

    Args:
        engine: what trains.
        directory: of the checkpoints; None: there are none.
        every: so many steps one is written beside training; None: only at the end.
        keep: how many of the directory stay.
        say: tells people; rank 0's is used.

    Raises:
        CheckpointError: a parameter or buffer is of a dtype that no checkpoint can hold.
    """

    def __init__(
        self, engine: Engine, directory: str | None, *, every: int | None, keep: int, say: Callable[[str], None]
    ) -> None:
        self._engine, self._directory, self._every, self._keep, self._say = engine, directory, every, keep, say
        self._saved: int | None = None
        if directory is not None:
            pieces_of(engine.part, None)

    def resume(self, *, required: bool) -> None:
        """Go on from the newest checkpoint.

        Args:
            required: there must be one. Where processes may be started again there may be none yet.

        Raises:
            CheckpointError: there is none, or none that can be read.
        """
        if self._directory is None:
            return
        there = [required or bool(complete(Path(self._directory)))]
        dist.broadcast_object_list(there, src=0)
        if there[0]:
            self._engine.load(self._directory)
            self._saved = self._engine.step_count

    def due(self, step: int, end: int) -> bool:
        """Whether one is written after a step, of those up to ``end``."""
        return self._directory is not None and (step == end or self._beside(step))

    def after(self, step: int) -> None:
        """Begin to write one, where one is due while training goes on."""
        if self._directory is not None and self._beside(step):
            self._tried(self._engine.finish_saving)
            if self._tried(partial(self._engine.save, self._directory, keep=self._keep, wait=False)):
                self._saved = step

    @contextlib.contextmanager
    def finished(self) -> Iterator[None]:
        """When training ends inside of what all ranks see alike, the checkpoint on its way is still written."""
        try:
            yield
        except (NonFiniteError, ReplicaError):
            self._tried(self._engine.finish_saving)
            raise

    def last(self) -> None:
        """Have one of the last step.

        Raises:
            SaveError: it could not be written.
        """
        if self._directory is not None and not (
            self._tried(self._engine.finish_saving) and self._saved == self._engine.step_count
        ):
            self._engine.save(self._directory, keep=self._keep)

    def _beside(self, step: int) -> bool:
        return self._every is not None and step % self._every == 0

    def _tried(self, save: Callable[[], object]) -> bool:
        """Save, or say why not: training is worth more than one checkpoint, and the next one may succeed. Whether it
        was saved, on which all ranks agree."""
        try:
            save()
        except SaveError as error:
            if dist.get_rank() == 0:
                self._say(f"warning: {error}; training goes on, with the checkpoints that are there")
            return False
        return True
