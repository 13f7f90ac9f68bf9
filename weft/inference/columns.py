"""Columns: the predictions of a batch as named arrays, one row for each sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from weft.errors import InputError

SINGLE = "prediction"
"""Name of the column of predictions that are one tensor."""

Columns = dict[str, "np.ndarray[Any, Any]"]


class Kind(NamedTuple):
    """What a column holds: the dtype of its numbers, as numpy names it, and the shape of one sample's."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape) if self.shape else ''}"


def columns_of(predictions: Any, samples: int) -> Columns:
    """The columns of a batch's predictions.

    A tensor is the column ``prediction``; entries of tuples and dicts are columns by their place or key, and further
    ones inside of these with a dot between (``"logits.0"``). bfloat16, which numpy does not have, becomes float32.

    Args:
        predictions: tensors in any nesting of tuples, lists and dicts; [samples, ...] each.
        samples: of the batch.

    Raises:
        InputError: something else is in it, or a tensor does not have the samples in dimension 0.
    """
    columns: Columns = {}
    for name, tensor in _tensors(predictions, ""):
        name = name or SINGLE
        if tensor.dim() == 0 or len(tensor) != samples:
            raise InputError(
                f"predict: {name} has shape {tuple(tensor.shape)} for a batch of {samples} samples; "
                "return tensors with the samples in dimension 0"
            )
        if name in columns:
            raise InputError(f"predict: two of its tensors are called {name!r}; give them other names")
        whole = tensor.detach().cpu()
        columns[name] = (whole.float() if whole.dtype == torch.bfloat16 else whole).contiguous().numpy()
    if not columns:
        raise InputError("predict: gave no tensor; return at least one, with the samples in dimension 0")
    return columns


def kinds_of(columns: Columns) -> dict[str, Kind]:
    """What columns hold."""
    return {name: Kind(array.dtype.name, array.shape[1:]) for name, array in columns.items()}


def size_of(columns: Columns) -> int:
    """Bytes of columns."""
    return sum(array.nbytes for array in columns.values())


def concatenate(several: list[Columns]) -> Columns:
    """Columns of several batches, one after the other."""
    return {name: np.concatenate([columns[name] for columns in several]) for name in several[0]}


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _tensors(entry, f"{name}.{key}" if name else str(key))
    elif isinstance(value, tuple | list):
        names = getattr(value, "_fields", range(len(value)))  # a named tuple's, or places
        for key, entry in zip(names, value, strict=True):
            yield from _tensors(entry, f"{name}.{key}" if name else str(key))
    else:
        raise InputError(
            f"predict: {name or 'what it gave'} is of type {type(value).__name__}; return tensors, or tuples or dicts "
            "of tensors"
        )
