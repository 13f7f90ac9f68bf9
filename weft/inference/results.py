"""Results: predictions on disk, every sample's once and in order, whatever ends the process.

    out.parquet.parts/                              while the run goes on
        _run.json                                   what the run is of
        _lock                                       held by the process that writes
        part-000000000000-000000000512.parquet      predictions of samples 0 to 511
        part-000000000512-000000001024.parquet      and so on
    out.parquet                                     at the end, in one go; the folder is removed

A part is there whole or not at all (``durable``), and its name says whose predictions it holds: putting it in place is
the one act that counts samples as done. There is no second place that counts them, so there are no two that could
disagree. Parts are written in order, so what is there is a prefix of the results at any time, and readable as it is: a
folder of Parquet files is a table to most readers, which leave out names that begin with ``_``.

A run that was killed goes on behind its last part. One that was killed while it published does so again, from the same
parts. The file that comes out is, to the byte, that of a run that was not interrupted, if the model computes the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weft.errors import InputError
from weft.inference import durable
from weft.inference.columns import Columns, Kind, columns_of, concatenate, kinds_of, size_of
from weft.inference.formats import Format, format_of

PART_BYTES = 2**25
PART_S = 10.0
"""A part is written when it has as many bytes, or when so many seconds have passed since the last one."""

RUN = "_run.json"
LOCK = "_lock"
PART = re.compile(r"part-(\d{12})-(\d{12})")


class Results:
    """The predictions of a run. Made by ``opened``.

    Attributes:
        output: the file they go to.
        samples: how many samples there are in all.
        done: samples whose predictions are kept: on disk, or about to be.
        finished: whether ``output`` holds all of them.
        kinds: what the columns hold, once a batch has told.
    """

    def __init__(self, output: Path, form: Format, samples: int, identity: Mapping[str, Any]) -> None:
        self.output, self.samples, self.finished = output, samples, False
        self.done = 0
        self.kinds: dict[str, Kind] | None = None
        self.part_bytes, self.part_s = PART_BYTES, PART_S
        self._form, self._identity = form, identity
        self._waiting: list[Columns] = []
        self._written_at = time.monotonic()

    def add(self, predictions: Any, samples: int) -> None:
        """The predictions of the next samples.

        Raises:
            InputError: they are no tensors with the samples in dimension 0, or unlike those before.
        """
        assert not self.finished
        columns = columns_of(predictions, samples)
        kinds = kinds_of(columns)
        if self.kinds is None:
            self._form.check(kinds)
            if self.done:
                compare(self._form.kinds(self._parts()[0][0]), kinds)
            self.kinds = kinds
        compare(self.kinds, kinds)
        self._waiting.append(columns)
        self.done += samples
        waiting = sum(map(size_of, self._waiting))
        if waiting >= self.part_bytes or time.monotonic() - self._written_at >= self.part_s:
            self.flush()

    def flush(self) -> None:
        """Bring to disk what was added."""
        if not self._waiting:
            return
        columns = concatenate(self._waiting)
        begin = self.done - len(next(iter(columns.values())))
        name = f"part-{begin:012d}-{self.done:012d}{self._form.suffix}"
        durable.write(folder_of(self.output) / name, lambda file: self._form.write(file, columns))
        self._waiting.clear()
        self._written_at = time.monotonic()

    def publish(self) -> None:
        """Put the file in place; all samples' predictions were added."""
        assert self.done == self.samples
        self.flush()
        parts = [path for path, _, _ in self._parts()]
        durable.write(
            self.output,
            lambda file: self._form.join(file, parts, self.samples, self._identity),
            through=folder_of(self.output) / f"_whole{durable.PARTIAL}",
        )
        self._close()
        self.finished = True

    def leave(self) -> None:
        """Leave nothing of a run that cannot go on and has written nothing."""
        if not self.finished and not self._parts():
            self._close()

    def resume(self) -> None:
        """Go on behind the parts that are there."""
        for path in folder_of(self.output).glob(f"*{durable.PARTIAL}"):
            os.unlink(path)
        parts = self._parts()
        self.done = parts[-1][2] if parts else 0

    def begin(self) -> None:
        """Begin anew: what is in the folder goes, and never counts as of this run, wherever this is interrupted."""
        folder = folder_of(self.output)
        self._note(fresh=False)
        clear(folder)
        self._note(fresh=True)

    def _close(self) -> None:
        folder = folder_of(self.output)
        os.unlink(folder / RUN)  # first: without it, the rest is of no run
        durable.sync(folder)
        clear(folder)

    def _note(self, *, fresh: bool) -> None:
        text = json.dumps({"run": self._identity, "fresh": fresh}, indent=2) + "\n"
        durable.write(folder_of(self.output) / RUN, lambda file: file.write(text.encode()))

    def _parts(self) -> list[tuple[Path, int, int]]:
        """The parts in order: each with its first sample and the one after its last."""
        parts: list[tuple[Path, int, int]] = []
        folder = folder_of(self.output)
        for path in sorted(folder.glob(f"part-*{self._form.suffix}")):
            found = PART.fullmatch(path.stem)
            begin, end = (int(found[1]), int(found[2])) if found else (-1, -1)
            if begin != (parts[-1][2] if parts else 0) or not begin < end <= self.samples:
                raise InputError(
                    f"{folder}: {path.name} does not follow what is before it; begin anew with --overwrite"
                )
            parts.append((path, begin, end))
        return parts


@contextlib.contextmanager
def opened(
    output: Path, samples: int, identity: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
) -> Iterator[Results]:
    """The results of a run, at its beginning or where an earlier process left them.

    Args:
        output: the file; its name says the format.
        samples: how many samples there are.
        identity: what the results are of, as plain data: another run's are not continued.
        resume: continue a run that is there, if there is one.
        overwrite: begin anew, whatever is there.

    Raises:
        InputError: there is a file or an unfinished run, and nothing said what to do with it; or it is of something
            else; or another process is at it; or the place cannot be written to.
    """
    form = format_of(output)
    identity = {**json.loads(json.dumps(identity)), "samples": samples}
    check(output, samples, identity, form, resume=resume, overwrite=overwrite)
    results = Results(output, form, samples, identity)
    folder = folder_of(output)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--output {output}: {error.strerror}; name a file in a folder that can be written to"
        ) from error
    with durable.alone(folder / LOCK):
        run = standing(folder)
        if run is None and output.exists() and not overwrite:
            clear(folder)
            results.done, results.finished = samples, True
        elif overwrite or run is None or not run["fresh"]:
            results.begin()
        else:
            results.resume()
        try:
            yield results
        except InputError:
            results.leave()
            raise


def check(
    output: Path, samples: int, identity: Mapping[str, Any], form: Format, *, resume: bool, overwrite: bool
) -> None:
    """Raises InputError if a run cannot begin, or go on, here."""
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: there is no folder {output.parent}; name a file in a folder there is")
    if overwrite and resume:
        raise InputError("--resume goes on with a run and --overwrite begins anew; leave one of them out")
    if overwrite:
        return
    run = standing(folder_of(output))
    if run is not None:
        if not resume:
            raise InputError(
                f"{folder_of(output)}: an unfinished run is there; add --resume to go on with it, or --overwrite to "
                "begin anew"
            )
        for name in sorted({*identity, *run["run"]}):
            there, here = run["run"].get(name), identity.get(name)
            if there != here:
                raise InputError(
                    f"{folder_of(output)}: the run that is there has {name} {there!r} and this one {here!r}; give the "
                    "same to go on with it, or --overwrite to begin anew"
                )
    elif output.exists():
        if not resume:
            raise InputError(f"--output {output}: it is there already; give another name, or --overwrite")
        if not form.is_of(output, samples, identity):
            raise InputError(f"--output {output}: it is not of this run; give another name, or --overwrite")


def folder_of(output: Path) -> Path:
    """Where the parts of a file are kept until it is whole."""
    return output.with_name(output.name + ".parts")


def standing(folder: Path) -> dict[str, Any] | None:
    """What the run in a folder is of, and whether all that is there is its own (``fresh``); None if there is no run."""
    try:
        found = json.loads((folder / RUN).read_text())
        return {"run": dict(found["run"]), "fresh": bool(found["fresh"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / RUN}: cannot be read as a run: {error}; remove the folder") from error


def clear(folder: Path) -> None:
    """Remove what results keep in a folder but the run's own note, and the folder if it is empty then."""
    if not folder.is_dir():
        return
    names = [path for path in folder.iterdir() if path.name != RUN and path.name != LOCK]
    for path in sorted(names):
        if PART.match(path.name) or path.name.endswith(durable.PARTIAL):
            os.unlink(path)
    if not (folder / RUN).exists():
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / LOCK)
        with contextlib.suppress(OSError):  # somebody else keeps something there
            os.rmdir(folder)


def compare(before: Mapping[str, Kind], now: Mapping[str, Kind]) -> None:
    """Raises InputError if columns are unlike those before."""
    if [*before.values()] == [*now.values()] and ([*before] == [*now] or [*before] == [""]):
        return
    told = [", ".join(f"{name} {kind}".strip() for name, kind in kinds.items()) for kinds in (before, now)]
    raise InputError(
        f"predict: gave {told[1]} for a batch and {told[0]} for those before; give every batch's predictions the same "
        "names, dtypes and shapes per sample (pad what differs in length)"
    )
