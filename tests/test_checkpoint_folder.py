"""The folder of checkpoints: which are there at every moment, whatever is saved over them, removed or interrupted; and
disks that fail."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import workloads

import weft
from weft.capture import capture
from weft.checkpoint import folder
from weft.checkpoint.index import NAME
from weft.cluster import Cluster
from weft.plan import Plan
from weft.planner import make_plan
from weft.runtime.pool import Pool


def written(directory: Path, step: int, content: str = "") -> Path:
    """Something to publish, of a process that is gone."""
    begun = folder.begin(directory, step, f"{folder.fresh_mark():x}")
    begun.end()
    path = begun.path
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
                folder.settle(directory, 3)
            except Killed:
                ended = True
            else:
                ended = False
        found = folder.candidates(directory)
        assert len(found) == 1
        seen.append({(found[0] / name).read_text() for name in (NAME, "numbers")})
        folder.begin(directory, 4, "0").end()
        assert names(directory) == [".step-00000004.0.new", "step-00000003"]
        assert {(directory / "step-00000003" / name).read_text() for name in (NAME, "numbers")} == seen[-1]
        if not ended:
            break
    assert seen == sorted(seen, key=[{"before"}, {"after"}].index)
    assert len(seen) > 8


@pytest.mark.parametrize("fails", ["sync", "prune"])
def test_what_fails_after_a_checkpoint_is_there_is_a_warning(
    pool: Pool, plan: Plan, tmp_path: Path, fails: str
) -> None:
    """It is there: nobody needs to save it again, and the ones before it stay."""

    def job() -> tuple[list[str], list[str]]:
        real = getattr(folder, fails)

        def failing(directory: Path, *given: Any) -> None:
            if directory == tmp_path:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(directory, *given)

        engine = weft.parallelize(workloads.mlp(), plan)
        batches = engine.batches()
        with warnings.catch_warnings(record=True) as caught, mock.patch.object(folder, fails, failing):
            warnings.simplefilter("always")
            for wait in (True, False):
                engine.step(next(batches))
                engine.save(tmp_path, keep=1, wait=wait)
                engine.finish_saving()
        return [str(each.message) for each in caught], names(tmp_path)

    (said, there), _ = pool.run(job, ranks=2)
    assert len([each for each in said if "is written, but others" in each and "Input/output error" in each]) == 2, said
    assert there == ["step-00000001", "step-00000002"]


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


# -- two jobs ---------------------------------------------------------------------------------------------------------

WRITES = """
import sys, time
from pathlib import Path
from weft.checkpoint import folder

begun = folder.begin(Path(sys.argv[1]), 7, "a")
print("writes", flush=True)
time.sleep(600)
"""


def test_what_another_job_writes_stays_until_it_is_gone(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", WRITES, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "writes\n"
        (tmp_path / ".step-00000003.7f3a.was").mkdir()
        begun = folder.begin(tmp_path, 8, "b")
        assert names(tmp_path) == [".step-00000003.7f3a.was", ".step-00000007.a.new", ".step-00000008.b.new"]
    finally:
        other.kill()
        other.communicate()
    begun.end()
    folder.begin(tmp_path, 9, "c")
    assert names(tmp_path) == [".step-00000009.c.new", "step-00000003"]


def test_a_file_system_without_locks_holds_checkpoints_all_the_same(tmp_path: Path) -> None:
    with mock.patch.object(folder.fcntl, "flock", side_effect=OSError(errno.ENOLCK, "No locks available")):
        published(tmp_path, 1)
        folder.begin(tmp_path, 2, "a")
        folder.begin(tmp_path, 3, "b").end()
    assert names(tmp_path) == [".step-00000003.b.new", "step-00000001"]


# -- disks that fail --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(capture(workloads.mlp()), Cluster.local(2), dp_shard=2)


@pytest.fixture
def saved(pool: Pool, plan: Plan, tmp_path: Path) -> Path:
    """Checkpoints of steps 1 and 2."""

    def job() -> None:
        engine = weft.parallelize(workloads.mlp(), plan)
        for _, batch in zip(range(2), engine.batches(), strict=False):
            engine.step(batch)
            engine.save(tmp_path / "saved")

    pool.run(job, ranks=2)
    return tmp_path / "saved"


def test_a_checkpoint_that_the_disk_cannot_read_is_passed_over(pool: Pool, plan: Plan, saved: Path) -> None:
    def job() -> tuple[int, list[str]]:
        read = os.preadv

        def broken(file: int, room: list[memoryview], at: int) -> int:
            if "step-00000002" in os.readlink(f"/proc/self/fd/{file}"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(file, room, at)

        engine = weft.parallelize(workloads.mlp(), plan)
        with warnings.catch_warnings(record=True) as caught, mock.patch.object(os, "preadv", broken):
            warnings.simplefilter("always")
            engine.load(saved)
        return engine.step_count, [str(each.message) for each in caught]

    (step, said), _ = pool.run(job, ranks=2)
    assert step == 1
    assert any("cannot be read: Input/output error" in each for each in said), said


CUT = """
import os, sys
from pathlib import Path
from unittest import mock
from weft.checkpoint import checkpoint
from weft.errors import CheckpointError

def cut(path, read=checkpoint.read_header):
    found = read(path)
    os.truncate(path, 0)
    return found

with mock.patch.object(checkpoint, "read_header", cut):
    try:
        checkpoint.Checkpoint.open(Path(sys.argv[1])).verify()
    except CheckpointError as error:
        print(error)
"""


def test_a_file_that_goes_away_while_it_is_looked_through_ends_no_process(saved: Path) -> None:
    """As pages of a map do that no disk can give any more."""
    command = [sys.executable, "-c", CUT, str(saved / "step-00000002")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, (ended.returncode, ended.stderr)
    assert "bytes are missing; the checkpoint is damaged" in ended.stdout
