"""Folder: where checkpoints are, one folder for each step, and how they appear and go.

    DIR/step-00000040/            complete: it gets this name when all of it is on the disk
    DIR/.step-00000040.7f3a.new   being written, or left by a job that was killed while it wrote
    DIR/.step-00000040.7f3a.was   whole; making room for another of its step, and what there is until that has the name
    DIR/.step-00000040.7f3a.old   being removed

A name that is there is a whole checkpoint, for every reader at every moment. No system can give a name to one folder
and take it from another at once on every file system, so readers know where the other is meanwhile.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import warnings
from pathlib import Path

from weft.checkpoint.index import NAME
from weft.errors import CheckpointError

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
    if not all(path.exists() for path, _ in listed):  # renamed or removed while this looked
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


def begin(directory: Path, step: int, mark: str) -> Path:
    """A new folder to write a step's checkpoint into. What a killed job left half written goes.

    Args:
        mark: makes its name one that no other job uses: see ``fresh_mark``.

    Raises:
        OSError: it cannot be made.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.glob(".step-*"):
        match = HIDDEN.fullmatch(path.name)
        if match and match[2] == "was" and not (directory / match[1]).exists():
            path.rename(directory / match[1])
        elif match:
            shutil.rmtree(path, ignore_errors=True)
    path = partial(directory, step, mark)
    path.mkdir()
    return path


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
