"""Recomputation: which results of a forward are worth keeping, and what is done again where the others are not kept.

``selective`` keeps the results of costly operations: matrix products, convolutions and attention. The runtime asks
the same question of every operator that the profile asked of its recording.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from weft.capture.frames import RawOp
from weft.capture.operations import kind_of
from weft.capture.recording import Cost, RecordedCall, SavedStorage
from weft.capture.sharding import tensors_of
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


class Way:
    """What a mode keeps of the calls of a workload, and does again, if all of them are recomputed so.

    Args:
        mode: one of ``plan.RECOMPUTE``.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self._kept: tuple[set[int], set[int]] = (set(), set())
        self._chosen: dict[int, tuple[Cost, list[Ref], set[int]]] = {}

    def keep(self, size: int, call: RecordedCall, cost: Cost) -> list[SavedStorage]:
        """What a call and its glue keep, without what an earlier call keeps already; calls come in order.

        Args:
            size: which of the two sizes the call was recorded at.
            call: it.
            cost: what it does.
        """
        kept, new = self._kept[size], list(call.glue.saved)
        new += [SavedStorage(s, b) for s, b in zip(call.arguments, call.argument_bytes, strict=True)]
        results, made = self._selected(cost)
        if results:
            # A result that is returned is the argument of a later call.
            outside = dict(zip((ref.storage for ref in cost.returned), call.outputs, strict=True))
            new += [SavedStorage(outside.get(ref.storage, ref.storage), _bytes(ref)) for ref in results]
        found = []
        for saved in new:
            if saved.storage not in kept:
                kept.add(saved.storage)
                found.append(saved)
        # Calls of one kind share the numbers of what stays inside.
        kept.difference_update(made)
        return found

    def again(self, cost: Cost) -> set[int]:
        """Places of the operations of a forward that are done again."""
        selects = self._selects(cost)
        return {place for place, op in enumerate(cost.forward) if not (selects and is_costly(op.func))}

    def _selected(self, cost: Cost) -> tuple[list[Ref], set[int]]:
        """Results that selective recomputation keeps of a call, and the storages of all; found once for a kind."""
        if id(cost) not in self._chosen:
            selects = self._selects(cost)
            results = [ref for op in cost.forward if selects and is_costly(op.func) for ref in op.outputs]
            made = {ref.storage for op in cost.forward if selects for ref in op.outputs}
            self._chosen[id(cost)] = cost, results, made  # with the cost, so that no other has its id
        return self._chosen[id(cost)][1:]

    def _selects(self, cost: Cost) -> bool:
        return self.mode == "selective" and keeps_selected(cost.forward)


def _bytes(ref: Ref) -> int:
    elements = 1
    for size in ref.size:
        elements *= size
    return elements * ref.dtype.itemsize


def _written(op: RawOp) -> Iterator[Ref]:
    for place, argument in enumerate(op.func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors_of(op.kwargs.get(argument.name, op.args[place] if place < len(op.args) else None))
