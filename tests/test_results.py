"""Results on disk: whatever ends a run, going on gives the file of a run that was not interrupted."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import InputError
from weft.inference import formats
from weft.inference.columns import columns_of
from weft.inference.results import Results, folder_of, opened

SAMPLES, BATCH = 10, 3
IDENTITY = {"target": "a.py", "arguments": {"layers": "2"}, "checkpoint": None}


def predictions(begin: int, end: int) -> dict[str, torch.Tensor]:
    numbers = torch.arange(begin, end)
    return {"loss": numbers / 7, "logits": (numbers[:, None, None] * 10 + torch.arange(6).view(2, 3)).double()}


def go_on(results: Results, batch: int = BATCH) -> None:
    """What a job does: the rest of the samples, batch by batch."""
    if results.finished:
        return
    results.part_bytes = 0  # a part for every batch
    for begin in range(results.done, SAMPLES, batch):
        end = min(begin + batch, SAMPLES)
        found = predictions(begin, end)
        results.add(found["loss"] if results.output.suffix == ".npy" else found, end - begin)
    results.publish()


def run(output: Path, **how: bool) -> None:
    with opened(output, SAMPLES, IDENTITY, **how) as results:
        go_on(results)


class KilledError(BaseException):
    """The process is gone."""


@contextlib.contextmanager
def killed_at(operation: int, share: float) -> Iterator[list[str]]:
    """Ends a block before its n-th operation on the file system. Of files that were not brought to disk a share is
    left. Yields the operations done."""
    done: list[str] = []
    synced: set[str] = set()
    loose: list[Path] = []

    def killing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            file = Path(os.readlink(f"/proc/self/fd/{args[0]}")) if name == "fsync" else Path(args[0])
            if len(done) == operation:
                for path in [*loose, file] if name == "fsync" else loose:
                    if path.is_file():
                        os.truncate(path, int(path.stat().st_size * share))
                raise KilledError
            done.append(name)
            if name == "fsync":
                synced.add(str(file))
            if name == "replace" and str(file) not in synced:
                loose.append(Path(args[1]))
            return real(*args, **kwargs)

        return call

    with contextlib.ExitStack() as patches:
        for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
            patches.enter_context(mock.patch.object(os, name, killing(name, getattr(os, name))))
        yield done


def operations(output: Path, **how: bool) -> int:
    with killed_at(-1, 0) as done:
        run(output, **how)
    return len(done)


@settings(max_examples=60)
@given(st.data(), st.sampled_from([".parquet", ".npy"]), st.booleans(), st.lists(st.floats(0, 1), max_size=4))
def test_killed_anywhere_and_resumed_gives_the_same_file(
    data: st.DataObject, suffix: str, old: bool, kills: list[float]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        whole, output = Path(name, f"whole{suffix}"), Path(name, f"output{suffix}")
        most = operations(whole)
        if old:  # an earlier run's file, which is to be replaced
            output.write_bytes(b"old")
        how = {"overwrite": old}
        for share in kills:
            at = data.draw(st.integers(0, most))
            with contextlib.suppress(KilledError), killed_at(at, share):
                run(output, **how)
            folder, now = folder_of(output), output.read_bytes() if output.exists() else b""
            assert now in (whole.read_bytes(), b"old" if old else b"")
            begun = (folder / "_run.json").exists()
            parts = sorted(folder.glob(f"part-*{suffix}"))
            if suffix == ".parquet" and parts and begun:  # what is there is a prefix
                losses = np.concatenate([pq.read_table(part)["loss"].to_numpy() for part in parts])
                assert np.array_equal(losses, predictions(0, len(losses))["loss"].numpy())
            if begun or now == whole.read_bytes():
                how = {"resume": True}
        run(output, **how)
        assert output.read_bytes() == whole.read_bytes()
        assert sorted(os.listdir(name)) == sorted([whole.name, output.name])
        run(output, resume=True)  # finished already
        assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("suffix", [".parquet", ".npy"])
def test_every_operation_can_be_the_last(tmp_path: Path, suffix: str) -> None:
    most = operations(tmp_path / f"whole{suffix}")
    for at in range(most):
        output = tmp_path / f"{at}{suffix}"
        with pytest.raises(KilledError), killed_at(at, 0.5):
            run(output)
        run(output, resume=True)
        assert output.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
        assert not folder_of(output).exists()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(1, 200))
def test_parts_leave_no_trace_in_the_whole(lengths: list[int], group_bytes: int) -> None:
    def write(output: Path, parts: list[int]) -> bytes:
        with opened(output, sum(parts), IDENTITY) as results:
            results.part_bytes = 0
            for length in parts:
                results.add(predictions(results.done, results.done + length), length)
            results.publish()
        return output.read_bytes()

    with tempfile.TemporaryDirectory() as name, mock.patch.object(formats, "ROW_GROUP_BYTES", group_bytes):
        cut = write(Path(name, "cut.parquet"), lengths)
        assert cut == write(Path(name, "one.parquet"), [sum(lengths)])


def test_what_is_in_the_files(tmp_path: Path) -> None:
    run(tmp_path / "a.parquet")
    run(tmp_path / "a.npy")
    expected = predictions(0, SAMPLES)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["loss", "logits"]
    assert np.array_equal(table["loss"].to_numpy(), expected["loss"].numpy())
    logits = table["logits"].combine_chunks().to_numpy_ndarray()
    assert logits.dtype == np.float64
    assert np.array_equal(logits, expected["logits"].numpy())
    assert np.array_equal(np.load(tmp_path / "a.npy"), expected["loss"].numpy())


def test_parts_are_written_as_they_come(tmp_path: Path) -> None:
    with opened(tmp_path / "a.parquet", SAMPLES, IDENTITY) as results:
        results.part_bytes = 2 * 3 * 52  # two batches of 3 samples of 4 + 48 bytes
        for begin in (0, 3, 6):
            results.add(predictions(begin, begin + 3), 3)
    folder = tmp_path / "a.parquet.parts"
    assert [p.name for p in sorted(folder.glob("part-*"))] == ["part-000000000000-000000000006.parquet"]
    assert len(pq.read_table(folder)) == 6  # a folder of parts is a table
    with opened(tmp_path / "a.parquet", SAMPLES, IDENTITY, resume=True) as results:
        assert results.done == 6
        results.part_s = 0
        results.add(predictions(6, 9), 3)
        assert len(list(folder.glob("part-*"))) == 2


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"])
@pytest.mark.parametrize("suffix", [".parquet", ".npy"])
@pytest.mark.parametrize("shape", [(), (2,), (2, 3, 1)])
def test_dtypes_and_shapes_go_on_as_they_are(tmp_path: Path, dtype: str, suffix: str, shape: tuple[int, ...]) -> None:
    output = tmp_path / f"a{suffix}"
    values = torch.randint(0, 2, (5, *shape)).to(getattr(torch, dtype))
    with opened(output, 5, {}) as results:
        results.add(values[:2], 2)
        results.flush()
    with opened(output, 5, {}, resume=True) as results:
        results.add(values[2:], 3)
        results.publish()
    if suffix == ".npy":
        found = np.load(output)
    else:
        column = pq.read_table(output)["prediction"].combine_chunks()
        numbers = column.storage.flatten() if shape else column
        found = numbers.to_numpy(zero_copy_only=False).reshape(values.shape)
    assert found.dtype == dtype
    assert np.array_equal(found, values.numpy())


class Pair(NamedTuple):
    mean: torch.Tensor
    rest: Any


def test_columns_have_the_names_of_their_places() -> None:
    ones = torch.ones(2, dtype=torch.bfloat16)
    nested = OrderedDict(a=ones, b=[ones, Pair(ones, {"c": ones})], d={0: ones})
    assert [*columns_of(nested, 2)] == ["a", "b.0", "b.1.mean", "b.1.rest.c", "d.0"]
    assert columns_of(ones, 2)["prediction"].dtype == np.float32
    for wrong, said in [
        ({"a": None}, "a is of type NoneType; return tensors"),
        ([], "gave no tensor"),
        (torch.ones(()), r"prediction has shape \(\) for a batch of 2 samples"),
        ({"a": torch.ones(3)}, r"a has shape \(3,\) for a batch of 2 samples"),
        ({"a": {"b": ones}, "a.b": ones}, "two of its tensors are called 'a.b'"),
    ]:
        with pytest.raises(InputError, match=said):
            columns_of(wrong, 2)


def test_what_cannot_be_gone_on_with_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "a.parquet"

    def attempt(said: str, path: Path = output, identity: Any = IDENTITY, samples: int = SAMPLES, **how: bool) -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match=said), opened(path, samples, identity, **how):
            pass
        assert sorted(tmp_path.rglob("*")) == before

    attempt("written as .parquet or .npy", tmp_path / "a.csv")
    attempt("no folder", tmp_path / "no" / "a.npy")
    attempt("leave one of them out", resume=True, overwrite=True)
    with opened(output, SAMPLES, IDENTITY) as results:
        results.add(predictions(0, 3), 3)
        results.flush()
        attempt("another process is writing there", resume=True)
    attempt("an unfinished run is there; add --resume")
    attempt("has checkpoint None and this one 'b'", identity={**IDENTITY, "checkpoint": "b"}, resume=True)
    attempt("has samples 10 and this one 11", samples=11, resume=True)
    with (
        opened(output, SAMPLES, IDENTITY, resume=True) as results,
        pytest.raises(InputError, match=r"gave loss float64, logits .* for a batch and loss float32, logits"),
    ):
        results.add({name: x.double() for name, x in predictions(3, 6).items()}, 3)
    run(output, resume=True)
    attempt("it is there already; give another name, or --overwrite")
    attempt("it is not of this run", identity={**IDENTITY, "target": "b.py"}, resume=True)
    run(output, overwrite=True)


def test_a_run_that_is_refused_at_once_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError), opened(tmp_path / "a.npy", SAMPLES, {}) as results:
        results.add(predictions(0, 3), 3)
    assert os.listdir(tmp_path) == []


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"need pyarrow.*pip install 'weft\[predict\]', or give --output FILE.npy"):
        formats.format_of(tmp_path / "a.parquet")


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    for name, wrong, said in [
        ("a.npy", predictions(0, 3), r"gives 2 tensors \(loss, logits\) and a .npy file holds one"),
        ("b.parquet", torch.ones(3, dtype=torch.complex64), "complex64, which Parquet does not have"),
        ("c.parquet", torch.ones(3, 0), "has no numbers"),
    ]:
        with opened(tmp_path / name, SAMPLES, {}) as results, pytest.raises(InputError, match=said):
            results.add(wrong, 3)
    with opened(tmp_path / "d.npy", SAMPLES, {}) as results:
        results.add(torch.ones(3, 4), 3)
        with pytest.raises(InputError, match=r"float32\[5\] for a batch and prediction float32\[4\] for those before"):
            results.add(torch.ones(3, 5), 3)
