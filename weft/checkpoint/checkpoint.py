"""Checkpoint: one on the disk, open to be read: checked, then read tensor by tensor, box by box.

What is read is mapped from the files, so a reader needs memory for what it asks for only, whatever plan wrote it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from weft.checkpoint.index import Chunk, Index, Tensors
from weft.checkpoint.tensors import DTYPES, BrokenFileError, Entry, read_header
from weft.errors import CheckpointError
from weft.workload import Box

T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: its folder.
        index: what it holds.
    """

    path: Path
    index: Index

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """The checkpoint in a folder. Only its index is read.

        Raises:
            CheckpointError: it cannot be read as one.
        """
        return cls(path, Index.load(path))

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Look whether the files are what was written: their lengths and forms, and the checksums of one of ``parts``
        equal parts of all chunks. Somebody must look at every part.

        Raises:
            CheckpointError: they are not.
        """
        for file, length in self.index.files.items():
            found = self._of(file, (self.path / file).stat).st_size
            if found != length:
                raise self._broken(file, f"is {found} bytes long and should be {length}")
        chunks = [(name, tensor, chunk) for name, tensor in self.index.tensors.items() for chunk in tensor.chunks]
        ends = list(accumulate(self._entry(*each).form.size for each in chunks))
        total = ends[-1] if ends else 0
        bounds = [0, *(bisect_right(ends, total * number // parts) for number in range(1, parts)), len(chunks)]
        mine: dict[str, list[tuple[str, Tensors, Chunk]]] = {}
        for name, tensor, chunk in chunks[bounds[part] : bounds[part + 1]]:
            mine.setdefault(chunk.file, []).append((name, tensor, chunk))
        for file, held in mine.items():
            self._of(file, partial(self._compare, file, held))

    def _compare(self, file: str, chunks: Sequence[tuple[str, Tensors, Chunk]]) -> None:
        """Look whether some chunks of a file are what was written."""
        with (self.path / file).open("rb", buffering=0) as content:
            for name, tensor, chunk in chunks:
                if self._entry(name, tensor, chunk).checksum(content.fileno()) != chunk.checksum:
                    raise self._broken(file, f"does not hold {chunk.key(name)} as written: its checksum differs")

    def stored(self, name: str) -> StoredTensor:
        """One of its tensors. Raises KeyError if it has none of this name."""
        return StoredTensor(self, name, self.index.tensors[name])

    def chunks_in(self, name: str, tensor: Tensors, box: Box) -> Iterator[tuple[Entry, Box, Box]]:
        """What of a tensor's box is in which entry: the box of the entry, and its place in the box asked for."""
        for chunk in tensor.chunks:
            inside, place = [], []
            for wanted, offset, length in zip(box, chunk.offsets, chunk.shape, strict=True):
                low, high = max(wanted.start, offset), min(wanted.stop, offset + length)
                if low >= high:
                    break
                inside.append(slice(low - offset, high - offset))
                place.append(slice(low - wanted.start, high - wanted.start))
            else:
                yield self._entry(name, tensor, chunk), tuple(inside), tuple(place)

    @cached_property
    def _headers(self) -> dict[str, dict[str, Entry]]:
        return {}

    def _entry(self, name: str, tensor: Tensors, chunk: Chunk) -> Entry:
        """A chunk in its file.

        Raises:
            CheckpointError: it is not there as the index says.
        """
        if chunk.file not in self._headers:
            self._headers[chunk.file] = self._of(chunk.file, lambda: read_header(self.path / chunk.file))
        entry = self._headers[chunk.file].get(chunk.key(name))
        if entry is None or entry.shape != chunk.shape or entry.form.dtype != tensor.form.dtype:
            raise self._broken(chunk.file, f"does not hold {chunk.key(name)} as {chunk.shape} of {tensor.form.dtype}")
        return entry

    def _of(self, file: str, read: Callable[[], T]) -> T:
        """What is read of a file.

        Raises:
            CheckpointError: it cannot be.
        """
        try:
            return read()
        except BrokenFileError as error:
            raise self._broken(file, f"cannot be read as safetensors: {error}") from error
        except OSError as error:
            raise self._broken(file, f"cannot be read: {error.strerror}") from error

    def _broken(self, file: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path / file} {what}; the checkpoint is damaged")


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor of a checkpoint, to be read in boxes (``workload.Stored``)."""

    checkpoint: Checkpoint
    name: str
    tensor: Tensors

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.tensor.form.shape

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""
        return DTYPES[self.tensor.form.dtype]

    def read(self, box: Box) -> Tensor:
        """The values in a box of it."""
        found = torch.zeros([side.stop - side.start for side in box], dtype=self.dtype)
        self.read_into(box, found)
        return found

    def read_into(self, box: Box, target: Tensor) -> None:
        """Put the values in a box of it into a tensor of that box's shape."""
        for entry, inside, place in self.checkpoint.chunks_in(self.name, self.tensor, box):
            entry.read_into(inside, target[place])
