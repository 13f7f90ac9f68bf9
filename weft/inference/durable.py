"""Durable files: written whole or not at all, whatever ends the process or the machine.

A file is written under another name, brought to the disk, and put in its place in one operation of the file system,
which is brought to the disk too, before anything that relies on it happens.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from weft.errors import InputError

if sys.platform != "win32":
    import fcntl

PARTIAL = ".partial"
"""End of the name of a file that is being written. One that is found was left by a process that ended."""


def write(path: Path, fill: Callable[[BinaryIO], object], *, through: Path | None = None) -> None:
    """Put a file in place: ``fill`` writes its content.

    Args:
        path: the file; what is there is replaced.
        fill: writes the content, in order.
        through: the name to write it under first, on the same file system; None: beside it.
    """
    partial = path.with_name(path.name + PARTIAL) if through is None else through
    with open(partial, "wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    if sys.platform == "win32":  # a folder cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other processes out of the block by a lock on a file, which goes with the process however it ends.

    Raises:
        InputError: another process is in.
    """
    with open(path, "ab") as file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(
                    f"{path.parent}: another process is writing there; wait for it, or give another --output"
                ) from error
        yield
