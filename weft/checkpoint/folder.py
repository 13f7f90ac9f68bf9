"""Folder: where checkpoints are, one folder for each step, and how they appear and go.

    DIR/step-00000040/            complete: it gets this name when all of it is on the disk
    DIR/.step-00000040.7f3a.new   being written, or left by a job that was killed while it wrote
    DIR/.step-00000040.7f3a.was   whole; making room for another of its step, and what there is until that has the name
    DIR/.step-00000040.7f3a.old   being removed

A name that is there is a whole checkpoint, for every reader at every moment. No system can give a name to one folder
and take it from another at once on every file system, so readers know where the other is meanwhile. Who writes holds a
lock on the folder, which goes with the process: what is hidden and not locked was left by a job that is gone.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from weft.checkpoint.index import NAME
from weft.errors import CheckpointError

if sys.platform != "win32":
    import fcntl

WHOLE = re.compile(r"step-([0-9]{8,})|\.step-([0-9]{8,})\.[0-9a-f]+\.was", re.ASCII)
HIDDEN = re.compile(r"\.(step-[0-9]{8,})\.[0-9a-f]+\.(new|was|old)", re.ASCII)


def name_of(step: int) -> str:
    """The name of a step's folder."""
    return f"step-{step:08d}"


def complete(directory: Path) -> list[Path]:
    """The checkpoints of a directory, the newest first."""
    return [path for _, path in _complete(directory)]


def _complete(directory: Path) -> list[tuple[int, Path]]:
    """Checkpoints and their steps."""
    listed = [(path, match) for path in directory.glob("*step-*") if (match := WHOLE.fullmatch(path.name))]
    found = {}
    for path, match in sorted(listed, key=lambda each: each[0].name):  # "." is before "s": who has the name counts
        if (path / NAME).is_file():
            found[int(match[1] or match[2])] = path
    if not all(os.path.lexists(path) for path, _ in listed):  # renamed or removed while this looked
        return _complete(directory)
    return sorted(found.items(), reverse=True)


def candidates(directory: Path) -> list[Path]:
    """What to read of a directory, in the order of trying: itself if it is a checkpoint, or those in it.

    Raises:
        CheckpointError: there is none.
    """
    found = [directory] if (directory / NAME).is_file() else complete(directory)
    if not found:
        raise CheckpointError(f"{directory}: holds no complete checkpoint; start without --resume")
    return found


@dataclass
class Begun:
    """A folder that is being written, locked where the file system can: a descriptor that has the lock."""

    path: Path
    _lock: int | None

    def end(self) -> None:
        """Let go of the lock; also for processes that were forked meanwhile and have the descriptor too."""
        if self._lock is not None:
            descriptor, self._lock = self._lock, None
            with contextlib.suppress(OSError):  # a server that is gone
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def begin(directory: Path, step: int, mark: str) -> Begun:
    """A new folder to write a step's checkpoint into. What a killed job left half written goes, unless another job is
    writing into the directory now.

    Args:
        mark: makes its name one that no other job uses: see ``fresh_mark``.

    Raises:
        OSError: it cannot be made.
    """
    directory.mkdir(parents=True, exist_ok=True)
    hidden = [(path, match) for path in directory.glob(".step-*") if (match := HIDDEN.fullmatch(path.name))]
    if not any(_is_locked(path) for path, _ in hidden):
        for path, match in hidden:
            if match[2] == "was" and not (directory / match[1]).exists():
                path.rename(directory / match[1])
            else:
                shutil.rmtree(path, ignore_errors=True)
    path = partial(directory, step, mark)
    path.mkdir()
    return Begun(path, _lock(path))


def _lock(path: Path) -> int | None:
    """Lock a folder; None where that cannot be done.

    Raises:
        BlockingIOError: it is locked.
    """
    if sys.platform == "win32":  # a folder cannot be opened there
        return None
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # some file systems have no locks
        if descriptor is not None:
            os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def _is_locked(path: Path) -> bool:
    try:
        Begun(path, _lock(path)).end()
    except BlockingIOError:
        return True
    return False


def partial(directory: Path, step: int, mark: str) -> Path:
    """Where a step's checkpoint is written."""
    return directory / f".{name_of(step)}.{mark}.new"


def fresh_mark() -> int:
    """A number that no other save has."""
    return secrets.randbits(48)


def publish(written: Path, directory: Path, step: int) -> Path:
    """Give what has been written its name. One of the same step that was there is set aside: see ``settle``.

    Raises:
        OSError: it cannot be renamed.
    """
    sync(written)
    final = directory / name_of(step)
    before = _aside(final, "was") if final.exists() else None  # by a job that went on from an earlier one
    try:
        written.rename(final)
    except OSError:
        if before is not None:
            before.rename(final)
        raise
    return final


def settle(directory: Path, step: int, keep: int | None = None) -> None:
    """Wait until the disk has the name of a step's checkpoint, then remove those it replaces: one of the same step, and
    of those up to it all but the newest ``keep``. What cannot be done is warned of: the new one is there.
    """
    try:
        sync(directory)
        for path in directory.glob(f".{name_of(step)}.*.was"):
            shutil.rmtree(path, ignore_errors=True)
        if keep is not None:
            prune(directory, step, keep)
    except OSError as error:
        warnings.warn(
            f"{directory / name_of(step)} is written, but others that should go may be left beside it: "
            f"{error.strerror or error}; look after the disk",
            RuntimeWarning,
            stacklevel=2,
        )


def prune(directory: Path, step: int, keep: int) -> None:
    """Remove checkpoints of a directory that has a new one of a step: of those up to it the newest ``keep`` stay.

    Later ones stay and do not count. They are there where training went back to an earlier step, because somebody
    wanted it or because they are damaged; until training has come past them, whoever resumes takes the newest of all
    that is whole.

    Raises:
        OSError: one cannot be renamed.
    """
    for path in [path for found, path in _complete(directory) if found <= step][keep:]:
        shutil.rmtree(_aside(path, "old"), ignore_errors=True)


def sync(directory: Path) -> None:
    """Wait until the disk has a directory's names."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(path: Path, end: str) -> Path:
    """Rename a checkpoint: its hidden name."""
    return path.rename(path.with_name(f".{path.name}.{fresh_mark():x}.{end}"))
