"""Index: what a checkpoint holds, as plain data beside the files of tensors.

Tensors have the names of a single device's model, so nothing here says how a plan divided them; each is kept in chunks,
boxes of the whole tensor in the file of the rank that wrote them. Whatever an index says is checked when it is read:
names of files are of one form, so that none leads elsewhere; chunks lie in their tensor and make up all of it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.checkpoint.tensors import Form, checksum, is_dtype, is_shape
from weft.errors import CheckpointError, PlanError
from weft.plain import UnreadableError, is_whole, read_json, shown
from weft.plan import Plan

NAME = "checkpoint.json"
VERSION = 1
FILE = re.compile(r"rank-[0-9]{5}\.safetensors", re.ASCII)
KINDS = ("parameter", "buffer", "computed", "optimizer")
"""Of tensors. A computed one is a buffer that the model's constructor makes and state dicts leave out."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, in a file.

    Attributes:
        file: its name, in the checkpoint's folder.
        offsets: where the box begins in the tensor.
        shape: of the box.
        checksum: of its bytes.
    """

    file: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    checksum: str

    def key(self, name: str) -> str:
        """What the box is called in its file, ``name`` being the tensor's."""
        return key_of(name, self.offsets)


def key_of(name: str, offsets: tuple[int, ...]) -> str:
    """What a box of a tensor is called in its file."""
    return f"{name}[{','.join(map(str, offsets))}]" if any(offsets) else name


@dataclass(frozen=True)
class Tensors:
    """One tensor of a checkpoint: what it is like, what it is, and its chunks."""

    form: Form
    kind: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, kw_only=True)
class Index:
    """A checkpoint.

    Attributes:
        step: steps done.
        plan: under which it was saved; None for weights that were brought from elsewhere.
        groups: plain settings of the optimizer's parameter groups, in order.
        scheduler: the learning-rate scheduler's state, as far as it is plain data.
        loss_scale: of a float16 plan.
        values: what the optimizer keeps besides tensors, by the tensors' way of naming.
        model: the configuration of a transformers model, as its config.json.
        files: length in bytes by name.
        tensors: by name: ``model.<name>`` and ``optimizer.<name>.<key>``.
    """

    step: int
    plan: Plan | None
    groups: list[dict[str, Any]]
    scheduler: dict[str, Any] = field(default_factory=dict)
    loss_scale: dict[str, Any] | None = None
    values: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] | None = None
    files: Mapping[str, int]
    tensors: Mapping[str, Tensors]

    def save(self, folder: Path) -> None:
        """Write it, with a checksum of its own, and wait until the disk has it."""
        data = {
            "version": VERSION,
            "step": self.step,
            "plan": None if self.plan is None else self.plan.to_json(),
            "groups": self.groups,
            "scheduler": self.scheduler,
            "loss_scale": self.loss_scale,
            "values": self.values,
            "model": self.model,
            "files": dict(self.files),
            "tensors": {
                name: {
                    "dtype": tensor.form.dtype,
                    "shape": list(tensor.form.shape),
                    "kind": tensor.kind,
                    "chunks": [[c.file, list(c.offsets), list(c.shape), c.checksum] for c in tensor.chunks],
                }
                for name, tensor in self.tensors.items()
            },
        }
        write_text(folder / NAME, json.dumps(data | {"checksum": _checksum(data)}, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Read what ``save`` wrote.

        Raises:
            CheckpointError: it is not there, is not what was written, or says what cannot be.
        """
        path = folder / NAME
        try:
            data = read_json(path)
        except UnreadableError as error:
            raise CheckpointError(f"{path}: {error}") from error
        read = _Reader(path)
        data = read.mapping(data, "the file")
        if data.get("version") != VERSION:
            raise read.error(f"version {shown(data.get('version'))} is not {VERSION}")
        read.keys(data, INDEX_KEYS, "the file")
        told = data.pop("checksum")
        if told != _checksum(data):
            raise read.error("its checksum is not that of its content: it was changed after it was written")
        return _index(data, read, path)


INDEX_KEYS = frozenset(
    ["version", "step", "plan", "groups", "scheduler", "loss_scale", "values", "model", "files", "tensors", "checksum"]
)


def write_text(path: Path, text: str) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _checksum(data: dict[str, Any]) -> str:
    return checksum(json.dumps(data, sort_keys=True).encode())


@dataclass(frozen=True)
class _Reader:
    """Asks of plain data that it is what it should be."""

    path: Path

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: cannot be read as a checkpoint: {what}")

    def keys(self, data: Mapping[str, Any], wanted: frozenset[str], what: str) -> None:
        if different := sorted(set(data) ^ wanted):
            said = "lacks" if different[0] in wanted else "has an unknown"
            raise self.error(f"{what} {said} {shown(different[0])}")

    def mapping(self, value: Any, what: str) -> dict[str, Any]:
        found: dict[str, Any] = self._of(value, what, "an object", lambda x: isinstance(x, dict))
        return found

    def sequence(self, value: Any, what: str) -> list[Any]:
        found: list[Any] = self._of(value, what, "a list", lambda x: isinstance(x, list))
        return found

    def count(self, value: Any, what: str) -> int:
        found: int = self._of(value, what, "a whole number", is_whole)
        return found

    def text(self, value: Any, what: str) -> str:
        found: str = self._of(value, what, "text", lambda x: isinstance(x, str))
        return found

    def shape(self, value: Any, what: str) -> tuple[int, ...]:
        return tuple(self._of(value, what, "a list of whole numbers", is_shape))

    def _of(self, value: Any, what: str, wanted: str, holds: Callable[[Any], bool]) -> Any:
        if not holds(value):
            raise self.error(f"{what} must be {wanted}, got {shown(value)}")
        return value


def _index(data: dict[str, Any], read: _Reader, path: Path) -> Index:
    files: dict[str, int] = {}
    for name, size in read.mapping(data["files"], "files").items():
        files[name] = read.count(size, f"the length of {name}")
        if not FILE.fullmatch(name):
            raise read.error(f"{shown(name)} is no name of a file of tensors; they are called rank-00000.safetensors")
    try:
        plan = None if data["plan"] is None else Plan.from_json(data["plan"], source=str(path))
    except PlanError as error:
        raise read.error(str(error)) from error
    groups = [read.mapping(group, "a parameter group") for group in read.sequence(data["groups"], "groups")]
    optional = {key: None if data[key] is None else read.mapping(data[key], key) for key in ("loss_scale", "model")}
    return Index(
        step=read.count(data["step"], "step"),
        plan=plan,
        groups=groups,
        scheduler=read.mapping(data["scheduler"], "scheduler"),
        values=read.mapping(data["values"], "values"),
        files=files,
        tensors={
            name: _tensors(name, told, files, read) for name, told in read.mapping(data["tensors"], "tensors").items()
        },
        **optional,
    )


def _tensors(name: str, told: Any, files: Mapping[str, int], read: _Reader) -> Tensors:
    told = read.mapping(told, name)
    read.keys(told, frozenset(("dtype", "shape", "kind", "chunks")), name)
    if not is_dtype(told["dtype"]) or told["kind"] not in KINDS:
        dtype, kind = shown(told["dtype"]), shown(told["kind"])
        raise read.error(f"{name} is of dtype {dtype} and kind {kind}, which there are not")
    form = Form(told["dtype"], read.shape(told["shape"], f"the shape of {name}"))
    chunks = tuple(_chunk(name, each, form, files, read) for each in read.sequence(told["chunks"], name))
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(form.shape):
        raise read.error(f"the chunks of {name} do not make up its shape {form.shape}")
    return Tensors(form, told["kind"], chunks)


def _chunk(name: str, told: Any, form: Form, files: Mapping[str, int], read: _Reader) -> Chunk:
    what = f"a chunk of {name}"
    told = read.sequence(told, what)
    if len(told) != 4:
        raise read.error(f"{what} must have a file, offsets, a shape and a checksum")
    file, checksum = read.text(told[0], what), read.text(told[3], what)
    offsets, shape = read.shape(told[1], what), read.shape(told[2], what)
    if file not in files:
        raise read.error(f"{what} is in {shown(file)}, which is none of the checkpoint's files")
    inside = len(offsets) == len(shape) == len(form.shape) and all(
        start + length <= whole for start, length, whole in zip(offsets, shape, form.shape, strict=True)
    )
    if not inside:
        raise read.error(f"{what} lies outside its shape {form.shape}")
    return Chunk(file, offsets, shape, checksum)
