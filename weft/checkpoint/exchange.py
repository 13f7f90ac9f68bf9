"""Exchange: weights out of a checkpoint as other programs read them, and into one; a tensor at a time.

What goes out are parameters and the buffers that state dicts have, whole, under the model's own names: one safetensors
file, or several with an index, and a transformers model's config.json, so that ``from_pretrained`` reads the directory.
What comes in becomes a checkpoint of step 0, which any plan trains on from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.checkpoint import folder
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.index import Chunk, Index, Tensors, write_text
from weft.checkpoint.tensors import Form, write
from weft.errors import CheckpointError
from weft.workload import Stored

MODEL = "model."
SINGLE, CONFIG = "model.safetensors", "config.json"
INDEX = f"{SINGLE}.index.json"
METADATA = {"format": "pt"}  # transformers asks for it
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Exported:
    """What was written: where, the names of the files of tensors, and bytes of tensors."""

    path: Path
    files: tuple[str, ...]
    tensors: int
    size: int


def export(checkpoint: Checkpoint, path: Path, *, shard_bytes: int = SHARD_BYTES) -> Exported:
    """Write a checkpoint's model for other programs.

    Args:
        checkpoint: what to write of; its checksums are compared first.
        path: a new directory, or a new file that ends in ``.safetensors``.
        shard_bytes: how large a file of a directory may be, unless one tensor is larger.

    Raises:
        CheckpointError: the checkpoint is damaged, or something is at ``path``.
        OSError: it cannot be written.
    """
    if path.exists():
        raise CheckpointError(f"{path}: is there already; give a name that is not")
    checkpoint.verify()
    forms = {
        name.removeprefix(MODEL): tensor.form
        for name, tensor in checkpoint.index.tensors.items()
        if tensor.kind in ("parameter", "buffer")
    }
    size = sum(form.size for form in forms.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{folder.fresh_mark():x}.new")
    try:
        if path.suffix == ".safetensors":
            write(aside, forms, _values(checkpoint, forms), METADATA)
            files: tuple[str, ...] = (path.name,)
        else:
            aside.mkdir()
            files = _export_directory(checkpoint, aside, forms, shard_bytes)
            folder.sync(aside)
        aside.rename(path)
    except BaseException:  # Ctrl-C too: half of it helps nobody
        shutil.rmtree(aside, ignore_errors=True)
        aside.unlink(missing_ok=True)
        raise
    return Exported(path, files, len(forms), size)


def _export_directory(
    checkpoint: Checkpoint, path: Path, forms: Mapping[str, Form], shard_bytes: int
) -> tuple[str, ...]:
    groups = shards(forms, shard_bytes)
    names = [SINGLE]
    if len(groups) > 1:
        names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
        place = {name: file for file, group in zip(names, groups, strict=True) for name in group}
        size = sum(form.size for form in forms.values())
        write_text(path / INDEX, json.dumps({"metadata": {"total_size": size}, "weight_map": place}, indent=2) + "\n")
    for file, group in zip(names, groups, strict=True):
        own = {name: forms[name] for name in group}
        write(path / file, own, _values(checkpoint, own), METADATA)
    if checkpoint.index.model is not None:
        write_text(path / CONFIG, json.dumps(checkpoint.index.model, indent=2, sort_keys=True) + "\n")
    return tuple(names)


def shards(forms: Mapping[str, Form], shard_bytes: int) -> list[list[str]]:
    """The names of the tensors of each file, in order, none above a size unless one tensor is."""
    found: list[list[str]] = [[]]
    size = 0
    for name, form in forms.items():
        if found[-1] and size + form.size > shard_bytes:
            found.append([])
            size = 0
        found[-1].append(name)
        size += form.size
    return found


def _values(checkpoint: Checkpoint, forms: Mapping[str, Form]) -> Iterator[Tensor]:
    for name, form in forms.items():
        yield checkpoint.stored(MODEL + name).read(tuple(slice(0, length) for length in form.shape))


def bring(
    weights: Mapping[str, Stored], kinds: Mapping[str, str], directory: Path, model: dict[str, Any] | None
) -> Path:
    """Make a checkpoint of step 0 of weights that are stored elsewhere.

    Args:
        weights: by the model's names.
        kinds: what each is: ``"parameter"`` or ``"buffer"``.
        directory: of checkpoints.
        model: the configuration of a transformers model.

    Returns:
        its folder.

    Raises:
        CheckpointError: there are checkpoints already.
        OSError: it cannot be written.
    """
    if folder.complete(directory):
        raise CheckpointError(f"{directory}: holds checkpoints already; give another directory")
    begun = folder.begin(directory, 0, f"{folder.fresh_mark():x}")
    path = begun.path
    try:
        file = "rank-00000.safetensors"
        forms = {MODEL + name: _form(stored) for name, stored in weights.items()}
        sums, length = write(path / file, forms, (_whole(stored) for stored in weights.values()))
        tensors = {
            MODEL + name: Tensors(form, kinds[name], (Chunk(file, (0,) * len(form.shape), form.shape, total),))
            for name, form, total in zip(weights, forms.values(), sums, strict=True)
        }
        Index(step=0, plan=None, groups=[], model=model, files={file: length}, tensors=tensors).save(path)
        published = folder.publish(path, directory, 0)
        folder.settle(directory, 0)
        return published
    except BaseException:  # Ctrl-C too: half of it helps nobody
        shutil.rmtree(path, ignore_errors=True)
        raise
    finally:
        begun.end()


def _form(stored: Stored) -> Form:
    """Of a tensor that is stored: one number tells its dtype."""
    one = stored.read(tuple(slice(0, min(1, length)) for length in stored.shape))
    return Form(Form.of(one).dtype, tuple(stored.shape))


def _whole(stored: Stored) -> Tensor:
    return stored.read(tuple(slice(0, length) for length in stored.shape)).contiguous()


def described(checkpoints: Sequence[Path]) -> Iterator[tuple[Path, Checkpoint | CheckpointError]]:
    """Checkpoints that are read, and looked through for damage, one after the other."""
    for path in checkpoints:
        try:
            found = Checkpoint.open(path)
            found.verify()
        except CheckpointError as error:
            yield path, error
        else:
            yield path, found
