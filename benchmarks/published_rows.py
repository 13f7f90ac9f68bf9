"""Published measurements as runs: reads the three kinds of table in ``benchmarks/data``, and others like them."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from published_megatron import read_megatron
from published_run import Run, Skipped
from published_training import read_single_node, read_training

DATA = Path(__file__).resolve().parent / "data"
READERS: dict[str, Callable[[dict[str, str], int], Run | Skipped]] = {
    "training": read_training,
    "single-node": read_single_node,
    "megatron-memory": read_megatron,
}
FILES = {
    "training": "training_runs.csv",
    "single-node": "single_node_a100.csv",
    "megatron-memory": "megatron_memory.csv",
}
MARKS = {"training": "tokens_per_s_per_gpu", "single-node": "step_time_s", "megatron-memory": "test_case"}
"""A column that tells a kind of table; ``step_time_s`` only after the others."""


def kind_of(path: Path) -> str:
    """Which kind of table a file is, by its columns.

    Raises:
        ValueError: it is none of them.
    """
    with path.open(newline="", encoding="utf-8") as file:
        columns = next(csv.reader(file), [])
    for kind in ("training", "megatron-memory", "single-node"):
        if MARKS[kind] in columns:
            return kind
    raise ValueError(f"{path}: its columns are of none of {', '.join(MARKS)}; say which with --kind")


def read(path: Path, kind: str | None = None) -> tuple[list[Run], list[Skipped]]:
    """Runs of a table, and the rows that cannot be modelled; a column that is missing counts as empty.

    Args:
        path: CSV file.
        kind: one of READERS; None tells it from the columns.
    """
    reader = READERS[kind or kind_of(path)]
    runs: list[Run] = []
    skipped: list[Skipped] = []
    with path.open(newline="", encoding="utf-8") as file:
        for index, cells in enumerate(csv.DictReader(file), start=1):
            row = defaultdict(str, {n: v.strip() for n, v in cells.items() if n is not None and isinstance(v, str)})
            found = reader(row, index)
            if isinstance(found, Run):
                runs.append(found)
            else:
                skipped.append(found)
    return runs, skipped
