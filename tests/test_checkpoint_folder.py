"""The folder of checkpoints: which are there at every moment, whatever is saved over them, removed or interrupted."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from weft.checkpoint import folder
from weft.checkpoint.index import NAME


def written(directory: Path, step: int, content: str = "") -> Path:
    """Something to publish."""
    path = folder.begin(directory, step, f"{folder.fresh_mark():x}")
    (path / NAME).write_text(content)
    (path / "numbers").write_text(content)
    return path


def published(directory: Path, *steps: int) -> None:
    for step in steps:
        folder.publish(written(directory, step), directory, step)


def names(directory: Path) -> list[str]:
    """All that is there, hidden or not."""
    return sorted(path.name for path in directory.iterdir())


def test_the_checkpoint_just_written_stays_where_training_went_back(tmp_path: Path) -> None:
    published(tmp_path, 10, 20, 30, 40, 50, 25)
    folder.prune(tmp_path, 25, 2)
    assert names(tmp_path) == [folder.name_of(step) for step in (20, 25, 30, 40, 50)]
    published(tmp_path, 45)
    folder.prune(tmp_path, 45, 3)
    assert names(tmp_path) == [folder.name_of(step) for step in (30, 40, 45, 50)]


def test_steps_are_counted_as_numbers(tmp_path: Path) -> None:
    published(tmp_path, 99_999_999, 100_000_000)
    folder.prune(tmp_path, 99_999_999, 1)
    assert names(tmp_path) == ["step-100000000", "step-99999999"]
    folder.prune(tmp_path, 100_000_000, 1)
    assert names(tmp_path) == ["step-100000000"]


class Killed(BaseException):
    """What ends a process in these tests."""


def emptied(path: Path, ignore_errors: bool = False) -> None:
    """What a process that is killed may have done of removing a tree."""
    next(path.iterdir()).unlink()


def ended_at(moment: int, stack: ExitStack) -> None:
    """End whatever runs before or after one of its changes to the disk, which are counted; or within a removal."""
    count = itertools.count()

    def dangerous(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*given: Any, **named: Any) -> Any:
            if next(count) == moment:
                raise Killed
            if change is rmtree and next(count) == moment:
                emptied(*given)
                raise Killed
            found = change(*given, **named)
            if next(count) == moment:
                raise Killed
            return found

        return changed

    rmtree = shutil.rmtree
    stack.enter_context(mock.patch.object(Path, "rename", dangerous(Path.rename)))
    stack.enter_context(mock.patch.object(shutil, "rmtree", dangerous(rmtree)))
    stack.enter_context(mock.patch.object(folder, "sync", dangerous(folder.sync)))


def test_a_step_saved_again_is_there_at_every_moment(tmp_path: Path) -> None:
    """A process is killed at each step of putting a checkpoint in the place of one of the same step."""
    seen = []
    for moment in itertools.count():
        directory = tmp_path / str(moment)
        folder.publish(written(directory, 3, "before"), directory, 3)
        path = written(directory, 3, "after")
        with ExitStack() as stack:
            ended_at(moment, stack)
            try:
                folder.publish(path, directory, 3)
            except Killed:
                ended = True
            else:
                ended = False
        found = folder.candidates(directory)
        assert len(found) == 1
        seen.append({(found[0] / name).read_text() for name in (NAME, "numbers")})
        assert folder.begin(directory, 4, "0").is_dir()
        assert names(directory) == [".step-00000004.0.new", "step-00000003"]
        assert {(directory / "step-00000003" / name).read_text() for name in (NAME, "numbers")} == seen[-1]
        if not ended:
            break
    assert seen == sorted(seen, key=[{"before"}, {"after"}].index)
    assert len(seen) > 8


def test_a_step_that_cannot_be_saved_again_is_as_it_was(tmp_path: Path) -> None:
    folder.publish(written(tmp_path, 3, "before"), tmp_path, 3)
    path = written(tmp_path, 3, "after")
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self == path:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with mock.patch.object(Path, "rename", refused), pytest.raises(OSError, match="Input/output error"):
        folder.publish(path, tmp_path, 3)
    assert names(tmp_path) == [path.name, "step-00000003"]
    assert (tmp_path / "step-00000003" / NAME).read_text() == "before"


def test_a_reader_finds_what_is_renamed_while_it_looks(tmp_path: Path) -> None:
    published(tmp_path, 3)
    looked = Path.is_file

    def late(self: Path) -> bool:
        if self.parent.name == "step-00000003":
            self.parent.rename(tmp_path / ".step-00000003.7f3a.was")
        return looked(self)

    with mock.patch.object(Path, "is_file", late):
        assert [path.name for path in folder.complete(tmp_path)] == [".step-00000003.7f3a.was"]
