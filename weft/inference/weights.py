"""Weights: tensors in safetensors files, read box by box, under the names a transformers model has for them.

Files may keep a tensor in another form than the model does: under another name, without a base model's prefix, once for
several tied names, or in pieces (an expert's matrices, which the model has in one tensor). transformers tells how one
becomes the other, and which names are read over; here it is done for the part of a tensor that is asked for only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.checkpoint.tensors import BrokenFileError, Entry, read_header
from weft.errors import ModelError
from weft.plain import UnreadableError, read_json, shown
from weft.workload import Box, Stored

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOLD = 5
"""Names that a message lists."""


@dataclass(frozen=True)
class Joined:
    """Several tensors, one after the other along a dimension."""

    parts: Sequence[Stored]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    def read(self, box: Box) -> Tensor:
        """The values in a box of it."""
        found, at = [], 0
        for part in self.parts:
            length = part.shape[self.dim]
            start, stop = max(box[self.dim].start - at, 0), min(box[self.dim].stop - at, length)
            if start < stop:
                found.append(part.read((*box[: self.dim], slice(start, stop), *box[self.dim + 1 :])))
            at += length
        return found[0] if len(found) == 1 else torch.cat(found, self.dim)


@dataclass(frozen=True)
class Stacked:
    """Several tensors of one shape as one with a dimension more."""

    parts: Sequence[Stored]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        one = self.parts[0].shape
        return (*one[: self.dim], len(self.parts), *one[self.dim :])

    def read(self, box: Box) -> Tensor:
        """The values in a box of it."""
        chosen = self.parts[box[self.dim].start : box[self.dim].stop]
        return torch.stack([part.read((*box[: self.dim], *box[self.dim + 1 :])) for part in chosen], self.dim)


def entries_of(directory: Path) -> dict[str, Entry]:
    """The tensors of a directory's safetensors files, by their names there. Only the files' headers are read.

    Raises:
        ModelError: there are none, or one that the index names is missing.
    """
    entries: dict[str, Entry] = {}
    for path in files_of(directory):
        entries |= header_of(path)
    return entries


def files_of(directory: Path) -> list[Path]:
    """The safetensors files of a directory.

    Raises:
        ModelError: there are none, or one that the index names is missing, or the index names none, or elsewhere.
    """
    names = _named_files(directory / INDEX) if (directory / INDEX).is_file() else [SINGLE]
    for name in names:
        if not (directory / name).is_file():
            raise ModelError(
                f"{directory}: {name} is missing; the weights must be there as safetensors, as "
                "model.save_pretrained(directory) writes them"
            )
    return [directory / name for name in names]


def _named_files(index: Path) -> list[str]:
    """The files that an index names: of its own directory, though each may be a link, as in a cache of downloads.

    Raises:
        ModelError: it is no such index.
    """
    try:
        told = read_json(index)
    except UnreadableError as error:
        raise ModelError(f"{index}: {error}; download it again") from error
    places = told.get("weight_map") if isinstance(told, dict) else None
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{index}: has no weight_map that tells the file of every tensor; download it again")
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelError(
                f"{index}: says that {shown(name)} is in {shown(file)}, which is no name of a file beside it; download "
                "it again"
            )
    return sorted(set(places.values()))


def header_of(path: Path) -> dict[str, Entry]:
    """The tensors of a file.

    Raises:
        ModelError: it is no such file, or it is not whole.
    """
    try:
        return read_header(path)
    except (OSError, BrokenFileError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors: {error}; download it again") from error


def match(model: Any, entries: Mapping[str, Entry], *, where: object) -> dict[str, Stored]:
    """How to read the parameters and persistent buffers of a transformers model, by a name each has in the model.

    Args:
        model: the model, whole; its tensors may be fake.
        entries: what the files have.
        where: the directory, for messages.

    Raises:
        ModelError: a tensor is missing, of another shape, unknown, or kept in a form that is not known here.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    held = model.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    plain: dict[str, Stored] = {}
    pieces: defaultdict[str, defaultdict[str, list[Stored]]] = defaultdict(lambda: defaultdict(list))
    unexpected = []
    for key in sorted(entries, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, held)
        if name not in held and key in held:
            name, pattern = key, None
        if name not in held:
            unexpected.append(key)
        elif pattern is None:
            plain[name] = entries[key]
        else:
            pieces[name][pattern].append(entries[key])
    found = plain | {name: convert(by_pattern, parts, where=where) for name, parts in pieces.items()}
    unexpected = [key for key in unexpected if not named(key, model._keys_to_ignore_on_load_unexpected)]
    there = {id(held[name]) for name in found}  # tied names are one tensor
    made = model._keys_to_ignore_on_load_missing  # tables that the constructor computes, among others
    missing = [
        name
        for name, tensor in held.items()
        if id(tensor) not in there and (tensor.requires_grad or not named(name, made))
    ]
    if missing or unexpected:
        told = [
            f"{what} {', '.join(names[:TOLD])}{f' and {len(names) - TOLD} more' if len(names) > TOLD else ''}"
            for what, names in (("lacks", missing), ("has what the model has not:", unexpected))
            if names
        ]
        raise ModelError(
            f"{where}: its files do not fit {type(model).__name__}: it {', and '.join(told)}; give a directory that "
            "model.save_pretrained(directory) wrote for this architecture"
        )
    for name, stored in found.items():
        if tuple(held[name].shape) != stored.shape:
            raise ModelError(
                f"{where}: {name} has shape {stored.shape} in its files and {tuple(held[name].shape)} by its "
                "config.json; give a directory whose files belong together"
            )
    return found


def named(name: str, patterns: Sequence[str] | None) -> bool:
    """Whether one of some patterns is found in a name."""
    return any(re.search(pattern, name) for pattern in patterns or ())


def convert(by_pattern: Mapping[str, Any], parts: Mapping[str, Sequence[Stored]], *, where: object) -> Stored:
    """A tensor of the model from those that files have in its place.

    Args:
        by_pattern: transformers' converter for each pattern of names.
        parts: the tensors, in order, for each pattern they match.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    converter = by_pattern[next(iter(parts))]
    groups: list[Sequence[Stored]] = [parts[pattern] for pattern in converter.source_patterns if pattern in parts]
    for operation in converter.operations:
        if isinstance(operation, MergeModulelist):
            groups = [[Stacked(group, operation.dim)] for group in groups]
        elif isinstance(operation, Concatenate):
            groups = [[Joined([part for group in groups for part in group], operation.dim)]]
        else:
            raise ModelError(
                f"{where}: transformers makes {converter.target_patterns[0]} of what is in its files by "
                f"{type(operation).__name__}, which cannot be done piece by piece here; give weft a workload of your "
                "own whose factory calls from_pretrained"
            )
    ((only,),) = groups
    return only
