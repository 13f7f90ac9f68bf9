"""Recomputation: which results of a forward are worth keeping, and what is done again where the others are not kept.

``selective`` keeps the results of costly operations: matrix products, convolutions and attention. The runtime asks
the same question of every operator that the profile asked of its recording.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from weft.capture.frames import RawOp
from weft.capture.operations import kind_of
from weft.capture.tape import Ref

COSTLY = ("matmul", "attention", "convolution")
"""Kinds of operation whose results selective recomputation keeps."""


def is_costly(func: Any) -> bool:
    """Whether selective recomputation keeps the results of an operator."""
    return kind_of(func) in COSTLY and not func._schema.is_mutable


def keeps_selected(forward: Iterable[RawOp]) -> bool:
    """Whether the results of costly operations can be kept: not where the forward writes to one, as ``relu_`` does."""
    kept: set[int] = set()
    for op in forward:
        if any(ref.storage in kept for ref in _written(op)):
            return False
        if is_costly(op.func):
            kept.update(ref.storage for ref in op.outputs)
    return True


def kept_results(forward: Sequence[RawOp], mode: str) -> dict[int, int]:
    """Bytes of the results that a mode keeps, by storage; the arguments of the call are kept besides."""
    if mode == "full" or not keeps_selected(forward):
        return {}
    return {ref.storage: _bytes(ref) for op in forward if is_costly(op.func) for ref in op.outputs}


def done_again(forward: Sequence[RawOp], mode: str) -> list[bool]:
    """Which operations of a forward are done again in the backward."""
    selected = mode == "selective" and keeps_selected(forward)
    return [not (selected and is_costly(op.func)) for op in forward]


def _bytes(ref: Ref) -> int:
    elements = 1
    for size in ref.size:
        elements *= size
    return elements * ref.dtype.itemsize


def _written(op: RawOp) -> Iterator[Ref]:
    for place, argument in enumerate(op.func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = op.kwargs.get(argument.name, op.args[place] if place < len(op.args) else None)
            yield from (ref for ref in (given if isinstance(given, list | tuple) else [given]) if isinstance(ref, Ref))
