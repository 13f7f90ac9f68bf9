"""Recording: a run of a workload's loss on fake tensors, as data: calls of units, and what each kind of call costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import TreeSpec

from weft.capture.frames import RawOp
from weft.capture.known import Conditions
from weft.capture.profile import LOSS, Source
from weft.capture.tape import Ref
from weft.capture.trees import Tree

if TYPE_CHECKING:
    from weft.capture.effects import Effect  # which knows TensorLeaf


@dataclass(frozen=True, slots=True)
class TensorLeaf:
    """The form of a tensor that a call returns."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device_type: str
    requires_grad: bool

    @property
    def bytes(self) -> int:
        """Size of its elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def empty(self) -> torch.Tensor:
        """A new tensor of this form."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device_type)


@dataclass(frozen=True, slots=True)
class SavedStorage:
    """A storage kept for backward: its number in the recording, its bytes, and which argument or output it is, if
    any."""

    storage: int
    bytes: int
    argument: int | None = None
    output: int | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """What a call, or a stretch of glue, does. Operations on views are included, at no cost. ``returned``: its
    outputs."""

    forward: tuple[RawOp, ...] = ()
    backward: tuple[RawOp, ...] = ()
    saved: tuple[SavedStorage, ...] = ()
    workspace_bytes: int = 0
    returned: tuple[Ref, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """The call a kind was recorded from: its unit, and its arguments, with a TensorLeaf for every tensor."""

    unit: str
    spec: TreeSpec
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One call of a unit, and the glue before it.

    Attributes:
        name, unit: as profile.Call.
        occurrence: 1 for the first call of the unit.
        tree: how the outputs are put together (``trees.unflatten(leaves, tree)``).
        leaves: its outputs: a TensorLeaf, or the Python value itself.
        sources: outputs of earlier calls that its arguments derive from; ``leaf`` counts tensors only.
        reads: parameters, buffers and plain tensor attributes, by first name: the unit's own and others it read.
        glue_reads: those the glue read on the way to its arguments.
        kind: index into ``Recording.costs``.
        glue: cost of the glue between the call before and this one.
        seen: outputs of earlier calls that the glue before this one looked at the values of, if it had to be run on
            real tensors; ``seen_reads``: likewise parameters and buffers. Every stage that gets this far needs them.
        python_draws: whether it draws from Python's or NumPy's generator.
        looks: whether it looks at values.
        effects: what it left in objects it was given; the tensors come after those it returned.
        used: which of its tensor arguments it does anything with.
        rewritten: which of the tensors it returns are written to by glue.
        arguments: storages of its tensor arguments, in order, of ``argument_bytes`` each (a view keeps all of its
            storage alive); ``outputs``: storages of the tensors it returned.
    """

    name: str
    unit: str
    occurrence: int
    tree: Tree
    leaves: tuple[Any, ...]
    sources: tuple[Source, ...]
    reads: tuple[str, ...]
    glue_reads: tuple[str, ...]
    kind: int
    glue: Cost = field(default_factory=Cost)
    seen: tuple[Source, ...] = ()
    seen_reads: tuple[str, ...] = ()
    python_draws: bool = False
    looks: bool = False
    effects: tuple[Effect, ...] = ()
    used: frozenset[int] = frozenset()
    rewritten: frozenset[int] = frozenset()
    arguments: tuple[int, ...] = ()
    argument_bytes: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    @property
    def tensors(self) -> tuple[TensorLeaf, ...]:
        """The tensors among the outputs, in order: what ``Source.leaf`` counts."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, TensorLeaf))


def loss_call(kind: int, tree: Tree, sources: Sequence[Source], glue_reads: Sequence[str]) -> RecordedCall:
    """The pseudo-call that closes a recording: the glue after the last unit."""
    return RecordedCall(
        name=LOSS,
        unit="",
        occurrence=1,
        tree=tree,
        leaves=(),
        sources=tuple(sources),
        reads=(),
        glue_reads=tuple(glue_reads),
        kind=kind,
    )


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Recording:
    """A run of a workload's loss: its calls in order, LOSS last, and what each kind of call costs.

    Attributes:
        costs, examples: what each kind costs, and what it was recorded from.
        names: first names of parameters, buffers and attributes, by storage, for Refs in operations.
        with_gradient: outputs of calls that get a gradient from the loss.
        units: the units.
        conditions: what the forward's way depended on besides shapes.
        python_draws: whether the glue draws from Python's or NumPy's generator.
        counted: whether the loss is ``(sum, count)``.
        alike: (unit, unit) that differ in their number only and were found to run the same operations.
    """

    calls: tuple[RecordedCall, ...]
    costs: tuple[Cost, ...]
    examples: tuple[Example, ...]
    names: dict[int, str]
    with_gradient: frozenset[Source]
    units: tuple[str, ...]
    alike: frozenset[tuple[str, str]]
    conditions: Conditions = field(default_factory=Conditions)
    python_draws: bool = False
    counted: bool = False

    @property
    def drawn(self) -> bool:
        """Whether draws decided which way it went, and only recording again tells what others would decide."""
        return self.python_draws or bool(self.conditions.decisions and not self.conditions.ops)

    @property
    def varies(self) -> bool:
        """Whether another way through the model, or through one of its units, may be taken for the same shapes."""
        return bool(self.conditions.ops) or self.drawn or any(call.seen or call.looks for call in self.calls)
