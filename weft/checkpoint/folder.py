"""Folder: where checkpoints are, one folder for each step, and how they appear and go.

    DIR/step-00000040/            complete: it gets this name when all of it is on the disk
    DIR/.step-00000040.7f3a.new   being written, or left by a job that was killed while it wrote
    DIR/.step-00000040.7f3a.old   being removed

A name that is there is a whole checkpoint, for every reader at every moment.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from weft.checkpoint.index import NAME
from weft.errors import CheckpointError

STEP = re.compile(r"step-([0-9]{8,})", re.ASCII)
HIDDEN = re.compile(r"\.step-[0-9]{8,}\.[0-9a-f]+\.(new|old)", re.ASCII)


def name_of(step: int) -> str:
    """The name of a step's folder."""
    return f"step-{step:08d}"


def complete(directory: Path) -> list[Path]:
    """The checkpoints of a directory, the newest first."""
    return [path for _, path in _complete(directory)]


def _complete(directory: Path) -> list[tuple[int, Path]]:
    """Checkpoints and their steps."""
    found = [(int(match[1]), path) for path in directory.glob("step-*") if (match := STEP.fullmatch(path.name))]
    return [(step, path) for step, path in sorted(found, reverse=True) if (path / NAME).is_file()]


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
        if HIDDEN.fullmatch(path.name):
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
    """Give what has been written its name; one of the same step that was there goes.

    Raises:
        OSError: it cannot be renamed.
    """
    sync(written)
    final = directory / name_of(step)
    if final.exists():  # of this step again, by a job that went on from an earlier one
        _remove(final)
    written.rename(final)
    sync(directory)
    return final


def prune(directory: Path, step: int, keep: int) -> None:
    """Remove checkpoints of a directory that has a new one of a step: of those up to it the newest ``keep`` stay.

    Later ones stay and do not count. They are there where training went back to an earlier step, because somebody
    wanted it or because they are damaged; until training has come past them, whoever resumes takes the newest of all
    that is whole.
    """
    for path in [path for found, path in _complete(directory) if found <= step][keep:]:
        _remove(path)


def sync(directory: Path) -> None:
    """Wait until the disk has a directory's names."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    aside = path.with_name(f".{path.name}.{fresh_mark():x}.old")
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
