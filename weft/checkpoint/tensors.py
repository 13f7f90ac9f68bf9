"""Tensors in safetensors files: written one after the other, read box by box.

A file is eight bytes that say how long its header is, the header as JSON (dtype, shape and place of every tensor), and
the numbers. The library of that name holds all tensors of a file in memory to write it, and gives no checksums; reading
here maps the file, so that what is looked at is in the system's cache of files and no memory of this process. Headers
and checksums are of bytes that are read, not mapped: what a disk cannot read is an error then, not a signal (SIGBUS)
that ends the process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_128, xxh3_128_hexdigest

from weft.plain import LARGEST, UnreadableError, is_whole, parse_json, shown
from weft.workload import Box

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""By their names in safetensors files."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

LENGTH_BYTES, ALIGNMENT, HEADER_BYTES = 8, 64, 100_000_000
"""Of the header's length, of the place where numbers begin in files written here, and of the longest header there is
(safetensors' own limit)."""

MOST_DIMENSIONS = 64
"""torch's own limit; numpy's is the same."""

WRITTEN_AT_ONCE, READ_AT_ONCE = 2**26, 2**20
"""Bytes; those read stay in a processor's cache until they are summed up."""


class BrokenFileError(ValueError):
    """A file that is no safetensors file, or not whole. The message says why, without the path."""


@dataclass(frozen=True)
class Form:
    """What a tensor is like: its dtype by its name in files, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """Of a tensor. Raises KeyError for a dtype that files cannot have."""
        return cls(NAMES[tensor.dtype], tuple(tensor.shape))

    @property
    def size(self) -> int:
        """Bytes."""
        return self.itemsize * math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        content: the file's bytes, mapped to be read only.
        begin: where its numbers begin there.
    """

    content: np.ndarray[Any, np.dtype[np.uint8]] = field(repr=False)
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def form(self) -> Form:
        """What it is like."""
        return Form(NAMES[self.dtype], self.shape)

    def read(self, box: Box) -> Tensor:
        """The values in a box of it: no more is read."""
        part = np.array(self._numbers[box])  # numpy does not know all dtypes, but how to copy their bytes
        return torch.from_numpy(part).view(self.dtype)

    def read_into(self, box: Box, target: Tensor) -> None:
        """Put the values in a box of it into a tensor of that box's shape, without a copy between where dtypes are the
        same."""
        if target.device.type == "cpu" and target.dtype == self.dtype:
            there = target.detach().view(_bits(self.dtype)).numpy()
            np.copyto(there, self._numbers[box].view(there.dtype))
        else:
            target.copy_(self.read(box))

    def checksum(self, file: int) -> str:
        """Of its bytes, read from its file, which is open.

        Raises:
            BrokenFileError: some are missing.
            OSError: they cannot be read.
        """
        found, at, end = xxh3_128(), self.begin, self.begin + self.form.size
        room = memoryview(bytearray(min(READ_AT_ONCE, self.form.size)))
        while at < end:
            count = os.preadv(file, [room[: end - at]], at)
            if not count:
                raise BrokenFileError(f"its last {end - at} bytes are missing")
            found.update(room[:count])
            at += count
        return str(found.hexdigest())

    @property
    def _numbers(self) -> np.ndarray[Any, Any]:
        size = self.dtype.itemsize
        return self.content[self.begin : self.begin + self.form.size].view(f"u{size}").reshape(self.shape)


def _bits(dtype: torch.dtype) -> torch.dtype:
    """The whole numbers of a dtype's size."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def checksum(content: Any) -> str:
    """XXH3 of 128 bits, in hexadecimal: tells damage, at the speed of memory; not meant against forgery."""
    return str(xxh3_128_hexdigest(content))


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file.

    Raises:
        BrokenFileError: it is no such file, or it is not whole.
        OSError: it cannot be read.
    """
    length = path.stat().st_size
    if length < LENGTH_BYTES:
        raise BrokenFileError(f"{length} bytes are no safetensors file")
    with path.open("rb") as file:
        begin = LENGTH_BYTES + int.from_bytes(file.read(LENGTH_BYTES), "little")
        if begin > min(length, HEADER_BYTES):
            raise BrokenFileError(f"its header would be {begin - LENGTH_BYTES} bytes long, of {length} in all")
        text = file.read(begin - LENGTH_BYTES)
        content = np.memmap(file, np.uint8, mode="r")
    try:
        header = parse_json(text)
    except UnreadableError as error:
        raise BrokenFileError(f"its header {error}") from error
    if not isinstance(header, dict):
        raise BrokenFileError("its header is no JSON object")
    header.pop("__metadata__", None)
    return {name: _entry(name, told, content, begin) for name, told in header.items()}


def _entry(name: str, told: Any, content: np.ndarray[Any, np.dtype[np.uint8]], begin: int) -> Entry:
    """A tensor by what a header tells of it.

    Raises:
        BrokenFileError: it is not what a header tells, or lies beyond the file.
    """
    told = told if isinstance(told, dict) else {}
    dtype, shape, offsets = told.get("dtype"), told.get("shape"), told.get("data_offsets")
    if not is_dtype(dtype) or not is_shape(shape) or not is_shape(offsets) or len(offsets) != 2:
        raise BrokenFileError(f"its header has no dtype, shape and offsets that can be for {shown(name)}")
    form = Form(dtype, tuple(shape))
    if offsets[1] - offsets[0] != form.size:
        size = offsets[1] - offsets[0]
        raise BrokenFileError(f"{shown(name)} of shape {shown(form.shape)} does not take {size} bytes")
    if missing := max(0, begin + offsets[1] - len(content)):
        raise BrokenFileError(f"its last {missing} bytes are missing")
    return Entry(content, begin + offsets[0], form.shape, DTYPES[dtype])


def is_dtype(value: Any) -> bool:
    """Whether a value of JSON is the name of a dtype."""
    return isinstance(value, str) and value in DTYPES


def is_shape(value: Any) -> bool:
    """Whether a value of JSON is a list of whole numbers that a tensor can have, none of them negative. Of one without
    numbers the other lengths are looked at too: no file bounds them."""
    if not isinstance(value, list) or len(value) > MOST_DIMENSIONS or not all(map(is_whole, value)):
        return False
    return 0 not in value or math.prod(max(1, length) for length in value) <= LARGEST


def write(
    path: Path, forms: Mapping[str, Form], values: Iterable[Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[list[str], int]:
    """Write a file of tensors, and wait until the disk has it.

    Args:
        path: of the file, which must not be there.
        forms: by the tensors' names, in their order.
        values: contiguous CPU tensors in that order; only one is used at a time.
        metadata: text that the header tells besides.

    Returns:
        checksums of the tensors, and the file's length in bytes.

    Raises:
        OSError: it cannot be written.
    """
    begin, header = 0, dict[str, Any]({"__metadata__": dict(metadata)} if metadata else {})
    for name, form in forms.items():
        header[name] = {
            "dtype": form.dtype,
            "shape": list(form.shape),
            "data_offsets": [begin, begin + form.size],
        }
        begin += form.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT)
    found = []
    with path.open("xb", buffering=0) as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for form, value in zip(forms.values(), values, strict=True):
            assert Form.of(value) == form
            content = value.detach().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(content), WRITTEN_AT_ONCE):
                _write_all(file, content[start : start + WRITTEN_AT_ONCE])
            found.append(checksum(content))
        os.fsync(file.fileno())
    return found, LENGTH_BYTES + len(text) + begin


def _write_all(file: Any, content: memoryview) -> None:
    """A disk that is nearly full takes a part without an error."""
    while content:
        content = content[file.write(content) :]
