"""Frames: what a Trace writes down of a stretch of a run: operations, storages made and freed, what autograd saves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from weft.capture.profile import Source
from weft.capture.tape import Ref


@dataclass(frozen=True, slots=True)
class RawOp:
    """One operation at one size of the batch.

    Attributes:
        func: the operator; ``name`` is its name, ``"aten.addmm"``.
        kind: as profile.Operation.
        flops, bytes: what it costs; both 0 for an operation on views only.
        args, kwargs: arguments, with a Ref for every tensor.
        outputs: the tensors it returns.
        gradients: those of its arguments that require a gradient.
        node: number of its autograd node; an operation of the backward has that of the node that runs it.
    """

    func: Any
    name: str
    kind: str
    flops: int
    bytes: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Ref, ...]
    gradients: frozenset[Ref]
    node: int

    @property
    def form(self) -> tuple[Any, ...]:
        """What makes it the same operation as another one: name and shapes."""
        return self.name, self.flops, self.bytes, tuple((r.size, r.stride, r.dtype) for r in self.outputs)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a tensor of the glue comes from: outputs of calls, and names of parameters and buffers read on the way."""

    sources: frozenset[Source] = frozenset()
    reads: frozenset[str] = frozenset()

    def __or__(self, other: Origin) -> Origin:
        if other is NOWHERE or other == self:
            return self
        return other if self is NOWHERE else Origin(self.sources | other.sources, self.reads | other.reads)


NOWHERE = Origin()


@dataclass(slots=True, eq=False)
class Frame:
    """What is being recorded: a unit's call, a stretch of glue, or the backward of either.

    Attributes:
        unit: name of the unit, "" for glue.
        call: number of the call.
        forward: whether this is a forward.
        arguments: storages the call was given; reading them needs no further note.
        operations: in order, operations on views included.
        events: (storage, bytes) when a storage is made, (storage, -bytes) when it is freed.
        saved: bytes autograd keeps for the backward, by storage.
        reads: names of the parameters and buffers read.
        extra: origin of tensors read that are neither arguments nor the unit's own.
        looked: whether Python looked at a value.
        changed: arguments written to.
        touched: storages any operation was given.
        real: whether the tensors are real.
        seen: on real tensors, the origin of what Python looked at.
    """

    unit: str
    call: int
    forward: bool = True
    arguments: frozenset[int] = frozenset()
    operations: list[RawOp] = field(default_factory=list)
    events: list[tuple[int, int]] = field(default_factory=list)
    saved: dict[int, int] = field(default_factory=dict)
    reads: set[str] = field(default_factory=set)
    extra: Origin = NOWHERE
    looked: bool = False
    changed: set[int] = field(default_factory=set)
    touched: set[int] = field(default_factory=set)
    real: bool = False
    seen: Origin = NOWHERE

    def workspace(self, passing: frozenset[int] = frozenset()) -> int:
        """Peak bytes of live temporaries: what is made here and not saved. ``passing`` (gradients of parameters)
        count only for the moment they are made: they are added to ``.grad`` at once."""
        live = peak = 0
        for storage, size in self.events:
            if storage not in self.saved:
                peak = max(peak, live + size)
                live += 0 if storage in passing else size
        return peak
