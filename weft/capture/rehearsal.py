"""Rehearsal: running a unit on fake tensors, whole or on shares, and comparing the two operation by operation.

That the rules find a proposal exact does not say that the user's code runs on shares: it may have a head count written
into a reshape, or compute a scale from a size. So the unit is run as one rank of so many would run it, and must do what
the whole unit does: the same operators in the same order, on the same numbers, with results of the whole's sizes where
they are whole and of a share's where they are divided.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from weft.capture.blame import first_line
from weft.capture.border import enter
from weft.capture.frames import RawOp
from weft.capture.isolation import restored, saving, snapshot
from weft.capture.operations import STAND_INS
from weft.capture.recording import Example, TensorLeaf
from weft.capture.shares import Shares
from weft.capture.tape import Ref, flat_tensors, written_arguments
from weft.plan import TensorStyle

Storage = int
DYNAMIC = frozenset({"aten.nonzero", "aten.index", "aten.masked_select"})
"""Operators whose results' shapes may follow from values."""


class Step(NamedTuple):
    """One operation of a rehearsal.

    Attributes:
        name: of the operator.
        numbers: its arguments that are no tensors.
        sizes: of its results.
        inside: the modules it runs in, outermost first.
        given, made: storages of its arguments and results.
    """

    name: str
    numbers: tuple[Any, ...]
    sizes: tuple[tuple[int, ...], ...]
    inside: tuple[str, ...]
    given: tuple[Storage, ...]
    made: tuple[Storage, ...]


class Visit(NamedTuple):
    """One call of a module in a rehearsal: its steps ``start`` to ``end``, storages of what went in and came out."""

    module: str
    start: int
    end: int
    given: tuple[Storage, ...]
    returned: tuple[Storage, ...]


@dataclass(slots=True)
class Run:
    """What a rehearsal did; ``error`` is why it stopped, "" if it did not. ``shapes``: of what the unit returned."""

    steps: list[Step] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    error: str = ""


class Stage(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's class has an untyped __init_subclass__
    """Writes down the steps of a unit above a FakeTensorMode. ``hidden``: what runs is none of them.

    Args:
        ops: the unit's operations, as recorded.
    """

    def __init__(self, ops: Sequence[RawOp]) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # untyped in torch
        self.run, self.hidden = Run(), 0
        self.recorded: dict[str, list[Ref]] = {}
        for op in ops:
            if op.name in DYNAMIC:
                self.recorded.setdefault(op.name, []).append(op.outputs[0])
        self.counts: dict[str, int] = {}
        self.inside: list[str] = []
        self.storages: dict[int, Storage] = {}
        self.alive: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run on fake tensors and write down."""
        kwargs = kwargs or {}
        name = func._schema.name.replace("::", ".")
        try:
            out = STAND_INS.get(func, func)(*args, **kwargs)
        except DynamicOutputShapeException:
            # Its shape follows from values; these are the same as when it was recorded.
            forms = self.recorded.get(name, [])[self.counts.get(name, 0) :][:1]
            if self.hidden or not forms:
                raise
            out = torch.empty(forms[0].size, dtype=forms[0].dtype, device=next(flat_tensors((args, kwargs))).device)
        self.counts[name] = self.counts.get(name, 0) + (not self.hidden)
        made = list(flat_tensors(out))
        if not self.hidden and (made or list(flat_tensors(written_arguments(func, args, kwargs)))):
            self.run.steps.append(
                Step(
                    name,
                    numbers((args, kwargs)),
                    tuple(tuple(t.shape) for t in made),
                    tuple(self.inside),
                    tuple(self.storage(t) for t in flat_tensors((args, kwargs))),
                    tuple(map(self.storage, made)),
                )
            )
        return out

    def storage(self, tensor: Tensor) -> Storage:
        """A storage by a number; it is kept alive, so that no other has its."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = len(self.alive)
            self.alive.append(storage)
        return self.storages[storage._cdata]

    @contextmanager
    def hiding(self) -> Iterator[None]:
        """What runs here is no step of the unit's."""
        self.hidden += 1
        try:
            yield
        finally:
            self.hidden -= 1

    def watch(self, module: nn.Module, name: str) -> None:
        """Note the calls of a module."""
        forward = module.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            start, given = len(self.run.steps), self._storages((args, kwargs))
            self.inside.append(name)
            result = forward(*args, **kwargs)
            self.inside.pop()
            self.run.visits.append(Visit(name, start, len(self.run.steps), given, self._storages(result)))
            return result

        module.__dict__["forward"] = watched

    def _storages(self, value: Any) -> tuple[Storage, ...]:
        return tuple(self.storage(t) for t in tree_leaves(value) if isinstance(t, Tensor))


def rehearse(
    model: nn.Module,
    example: Example,
    ops: Sequence[RawOp],
    styles: Mapping[str, TensorStyle],
    degree: int,
    plain: frozenset[str],
) -> Run:
    """Run a unit as one of ``degree`` ranks would.

    Args:
        model: the model, fake.
        example: a call of the unit; ``ops``: its operations, as recorded.
        styles: how it is divided; nothing runs it whole.
        degree: ranks.
        plain: modules that do nothing but multiply by their weight and add their bias.
    """
    unit = model.get_submodule(example.unit)
    mode: FakeTensorMode = next(p for p in unit.parameters()).fake_mode  # type: ignore[attr-defined] # fake
    stage = Stage(ops)
    try:
        with mode, restored(unit), torch.enable_grad():
            shares = Shares(model, unit, styles, degree=degree, plain=plain, hidden=stage.hiding)
            shares.put()
            for name, module in unit.named_modules():
                stage.watch(module, join(example.unit, name))
            args, kwargs = tree_unflatten([_fake(x) for x in example.arguments], example.spec)
            with stage, saving(lambda tensor: None):  # as when it was recorded
                result = unit(*args, **kwargs)
        stage.run.shapes = [tuple(x.shape) for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
    except Exception as error:  # the user's code on sizes it may not expect: any failure means it cannot be divided
        stage.run.error = first_line(error) or type(error).__name__
    return stage.run


def numbers(value: Any) -> tuple[Any, ...]:
    """What is no tensor in the arguments of an operation, in order."""
    if isinstance(value, (Tensor, Ref)):
        return ()
    if isinstance(value, dict):
        return tuple((name, x) for name, v in value.items() for x in numbers(v))
    if isinstance(value, (list, tuple)):
        return tuple(x for v in value for x in numbers(v))
    return (value,)


def _fake(value: Any) -> Any:
    if not isinstance(value, TensorLeaf):
        return snapshot(value)
    tensor = value.empty()
    return enter(tensor)[1] if value.requires_grad else tensor


def join(path: str, name: str) -> str:
    """The name of what is called ``name`` inside ``path``."""
    return f"{path}.{name}" if path and name else path or name
