"""The folder of checkpoints: which are there at every moment, whatever is saved over them, removed or interrupted."""

from __future__ import annotations

from pathlib import Path

from weft.checkpoint import folder
from weft.checkpoint.index import NAME


def written(directory: Path, step: int, content: str = "") -> Path:
    """Something to publish."""
    path = folder.begin(directory, step, f"{folder.fresh_mark():x}")
    (path / NAME).write_text(content)
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
