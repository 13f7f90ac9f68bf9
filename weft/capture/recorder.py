"""Recorder: one run of the user's ``loss(model, batch)`` on fake tensors, cut into calls of units and the glue between them.

Every call of a unit is intercepted (its ``forward`` is overridden on the instance while the recorder runs, so that hooks
still run). The unit runs on tensors of its own, which share nothing with the glue's, so its backward can be run by itself;
what it returns to the glue is new again. A unit that is built like one seen before, and called on inputs of the same form,
is not run again: its outputs are made from what was recorded. So the cost of recording does not grow with depth.
"""

from __future__ import annotations

import dataclasses
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from weft.capture.blocks import Likeness, likeness, same_value
from weft.capture.initial import map_tensors
from weft.capture.profile import LOSS, Source
from weft.capture.trace import NOWHERE, Frame, Origin, RawOp, Trace, is_library
from weft.errors import LossError, ModelError, WeftError


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


@dataclass(frozen=True, slots=True)
class SavedStorage:
    """A storage kept for backward: its number in the recording, its bytes, and which argument or output it is, if any."""

    storage: int
    bytes: int
    argument: int | None = None
    output: int | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """What a call, or a stretch of glue, does. Operations on views are included, at no cost."""

    forward: tuple[RawOp, ...] = ()
    backward: tuple[RawOp, ...] = ()
    saved: tuple[SavedStorage, ...] = ()
    workspace_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One call of a unit, and the glue before it.

    Attributes:
        name, unit: as profile.Call.
        occurrence: 1 for the first call of the unit.
        spec: how the outputs are put together (``tree_unflatten(leaves, spec)``).
        leaves: its outputs: a TensorLeaf, or the Python value itself.
        sources: outputs of earlier calls that its arguments derive from; ``leaf`` counts tensors only.
        reads: parameters, buffers and plain tensor attributes, by first name: the unit's own and others it read.
        glue_reads: those the glue read on the way to its arguments.
        kind: index into ``Recording.costs``.
        glue: cost of the glue between the call before and this one.
        arguments: storages of its tensor arguments, in order; ``outputs``: of the tensors it returned.
    """

    name: str
    unit: str
    occurrence: int
    spec: TreeSpec
    leaves: tuple[Any, ...]
    sources: tuple[Source, ...]
    reads: tuple[str, ...]
    glue_reads: tuple[str, ...]
    kind: int
    glue: Cost
    arguments: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def tensors(self) -> tuple[TensorLeaf, ...]:
        """The tensors among the outputs, in order: what ``Source.leaf`` counts."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, TensorLeaf))


@dataclass(frozen=True, slots=True)
class Recording:
    """A run of a workload's loss: its calls in order, LOSS last, and what each kind of call costs.

    Attributes:
        names: first names of parameters, buffers and attributes, by storage, for Refs in operations.
        examples: for each kind the arguments of the call recorded, with Refs for tensors, and the unit.
    """

    calls: tuple[RecordedCall, ...]
    costs: tuple[Cost, ...]
    names: dict[int, str]
    units: tuple[str, ...]


def record(
    model: nn.Module,
    units: Sequence[str],
    loss: Callable[[nn.Module, Any], Any],
    batch: Any,
    *,
    backward: bool = True,
) -> Recording:
    """Run a loss once on fake tensors and say which unit's call costs what and needs what.

    Args:
        model: a model made by ``initial.build_fake``. It is left as it was.
        units: names from ``units.find_units``.
        loss: ``loss(model, batch)``.
        batch: tensors in any nesting; their values are looked at only where the model does.
        backward: record the backward, too.

    Raises:
        ModelError: the model cannot be run on fake tensors.
        LossError: the loss is neither a scalar nor ``(sum, count)``, or (with backward) depends on no parameter.
    """
    return _Recorder(model, units, backward).record(loss, batch)


@dataclass(slots=True)
class _Kind:
    """A recorded call that others may be replayed from."""

    unit: str
    module: nn.Module
    state: tuple[Any, ...]
    arguments: Sequence[Any]
    spec: TreeSpec
    out_leaves: tuple[Any, ...]
    out_spec: TreeSpec
    cost: Cost
    replayable: bool


@dataclass(slots=True)
class _Recorder:
    model: nn.Module
    units: Sequence[str]
    backward: bool
    trace: Trace = field(init=False)
    first: dict[int, str] = field(init=False)
    kinds: list[_Kind] = field(init=False, default_factory=list)
    calls: list[RecordedCall] = field(init=False, default_factory=list)
    occurrences: dict[str, int] = field(init=False, default_factory=dict)
    stretches: list[Frame] = field(init=False, default_factory=list)
    bounds: list[int] = field(init=False, default_factory=list)
    roots: list[Tensor] = field(init=False, default_factory=list)
    ends: list[Tensor] = field(init=False, default_factory=list)

    def record(self, loss: Callable[[nn.Module, Any], Any], batch: Any) -> Recording:
        tensors: dict[Tensor, str] = {}
        self.first = {}

        def note(name: str, tensor: Tensor) -> Tensor:
            if isinstance(tensor, FakeTensor):
                tensors.setdefault(tensor, name)
            self.first.setdefault(id(tensor), name)
            return tensor

        map_tensors(self.model, note)
        if not any(isinstance(t, nn.Parameter) for t in tensors):
            raise ModelError(f"{type(self.model).__name__} has no parameters; there is nothing to train")
        mode = next(t for t in tensors if isinstance(t, FakeTensor)).fake_mode
        self.trace = Trace(mode, tensors)
        with ExitStack() as stack:
            stack.enter_context(_quiet())
            stack.enter_context(_restored(self.model))
            for name in self.units:
                self._intercept(name, self.model.get_submodule(name))
            stack.enter_context(mode)
            fakes = tree_map_only(Tensor, self._fake, batch)
            stack.enter_context(self.trace)
            stack.enter_context(saved_tensors_hooks(self.trace.pack, lambda t: t))
            self._start_stretch()
            result = self._told("", loss, self.model, fakes)
            self._finish(result)
            self.trace.frame = None
        return Recording(tuple(self.calls), tuple(k.cost for k in self.kinds), dict(self.trace.names), tuple(self.units))

    def _fake(self, value: Tensor) -> Tensor:
        if isinstance(value, FakeTensor):
            return value
        fake: Tensor = self.trace.mode.from_tensor(value)
        self.trace.know(fake, value)
        return fake

    def _intercept(self, name: str, module: nn.Module) -> None:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            frame = self.trace.frame
            if frame is None or frame.unit or not frame.forward:
                return original(*args, **kwargs)
            return self._call(name, module, original, args, kwargs)

        module.__dict__["forward"] = forward

    def _start_stretch(self) -> None:
        self.stretches.append(Frame("", len(self.calls)))
        self.trace.frame = self.stretches[-1]

    def _call(self, unit: str, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Stand between the glue and a unit: run it, or replay one like it, and note what it was given and gave."""
        number = len(self.calls)
        occurrence = self.occurrences[unit] = self.occurrences.get(unit, 0) + 1
        name = unit if occurrence == 1 else f"{unit}@{occurrence}"
        self.trace.call_names.append(name)
        with self.trace.recording(None):
            leaves, spec = tree_flatten((args, kwargs))
            given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            origin = NOWHERE
            for tensor in given:
                origin |= self.trace.origin(tensor)
            self.roots += [t for t in given if t.requires_grad]
            self.bounds.append(torch.autograd._get_sequence_nr())
            kind, extra, reads = self._kind(number, unit, module, forward, leaves, spec)
            origin |= extra
            outputs, fresh = self._outputs(number, self.kinds[kind])
            own: list[str] = []
            for tensor in self._tensors_of(module):
                own.append(self.first[id(tensor)])
            self.calls.append(
                RecordedCall(
                    name=name,
                    unit=unit,
                    occurrence=occurrence,
                    spec=self.kinds[kind].out_spec,
                    leaves=self.kinds[kind].out_leaves,
                    sources=tuple(sorted(origin.sources)),
                    reads=tuple(dict.fromkeys([*own, *sorted(reads)])),
                    glue_reads=tuple(sorted(origin.reads)),
                    kind=kind,
                    glue=Cost(),
                    arguments=tuple(self.trace.ref(t).storage for t in given),
                    outputs=tuple(self.trace.ref(t).storage for t in fresh),
                )
            )
        self._start_stretch()
        return outputs

    def _kind(
        self, number: int, unit: str, module: nn.Module, forward: Callable[..., Any], leaves: list[Any], spec: TreeSpec
    ) -> tuple[int, Origin, set[str]]:
        """The kind of a call, recorded now if no earlier one is like it."""
        state = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
        numbered: list[int] = []
        for index, kind in enumerate(self.kinds):
            if kind.replayable and kind.state == state and kind.spec == spec and _alike(kind.arguments, leaves):
                match likeness(kind.module, module, kind.unit, unit):
                    case Likeness.SAME:
                        return index, NOWHERE, set()
                    case Likeness.SAME_BUT_NUMBERED:
                        numbered.append(index)
        frame, run = self._run(number, unit, module, forward, leaves, spec)
        replayable = not frame.looked and frame.extra is NOWHERE and not frame.reads - self._names_of(module)
        for index in numbered:
            if replayable and _forms(frame.operations) == _forms(self.kinds[index].cost.forward):
                return index, NOWHERE, set()
        out_leaves, out_spec, cost = run()
        self.kinds.append(
            _Kind(unit, module, state, [_form(x) for x in leaves], spec, out_leaves, out_spec, cost, replayable)
        )
        return len(self.kinds) - 1, frame.extra, frame.reads

    def _run(
        self, number: int, unit: str, module: nn.Module, forward: Callable[..., Any], leaves: list[Any], spec: TreeSpec
    ) -> tuple[Frame, Callable[[], tuple[tuple[Any, ...], TreeSpec, Cost]]]:
        """Run a unit's forward on tensors of its own; what is returned runs its backward and sums up."""
        ends: dict[int, Tensor] = {}
        entered: dict[int, Tensor] = {}
        for leaf in leaves:
            if isinstance(leaf, Tensor) and id(leaf) not in entered:
                entered[id(leaf)] = leaf
                if leaf.requires_grad:
                    ends[id(leaf)], entered[id(leaf)] = _enter(leaf)
        arguments = [entered[id(x)] if isinstance(x, Tensor) else x for x in leaves]
        given = [self.trace.ref(x).storage for x in arguments if isinstance(x, Tensor)]
        frame = Frame(unit, number, arguments=frozenset(given))
        args, kwargs = tree_unflatten(arguments, spec)
        with self.trace.recording(frame):
            result = self._told(unit, forward, *args, **kwargs)
        workspace = frame.workspace()

        def finish() -> tuple[tuple[Any, ...], TreeSpec, Cost]:
            flat, out_spec = tree_flatten(result)
            out_leaves = tuple(_leaf(unit, x) for x in flat)
            tensors = [x for x in flat if isinstance(x, Tensor)]
            returned = [self.trace.ref(x).storage for x in tensors]
            back = Frame(unit, number, forward=False)
            peak = workspace
            roots = [t for t in tensors if t.requires_grad]
            if self.backward and roots:
                weights = [t for t in self._read_tensors(frame) if t.requires_grad]
                gradients = [self._given(t) for t in roots]
                with self.trace.recording(back):
                    results = self._told(unit, _gradients, roots, [*ends.values(), *weights], gradients)
                passing = frozenset(self.trace.ref(g).storage for g in results[len(ends) :] if g is not None)
                peak = max(peak, back.workspace(passing))
            saved = tuple(
                SavedStorage(
                    storage,
                    size,
                    given.index(storage) if storage in given else None,
                    returned.index(storage) if storage in returned else None,
                )
                for storage, size in frame.saved.items()
            )
            return out_leaves, out_spec, Cost(tuple(frame.operations), tuple(back.operations), saved, peak)

        return frame, finish

    def _outputs(self, number: int, kind: _Kind) -> tuple[Any, list[Tensor]]:
        """New tensors for the glue, in the form of a recorded call's outputs."""
        fresh: list[Tensor] = []
        values: list[Any] = []
        for leaf in kind.out_leaves:
            value = leaf
            if isinstance(leaf, TensorLeaf):
                value = torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=leaf.device_type)
                if leaf.requires_grad:
                    end, value = _enter(value)
                    self.ends.append(end)
                self.trace.returned(value, Source(number, len(fresh)))
                fresh.append(value)
            values.append(value)
        return tree_unflatten(values, kind.out_spec), fresh

    def _finish(self, result: Any) -> None:
        """Check the loss, run the backward of the glue, and close the recording with LOSS."""
        self.trace.frame = None
        parts = list(result) if isinstance(result, tuple) and len(result) == 2 else [result]
        total = parts[0]
        if not isinstance(total, Tensor) or total.numel() != 1 or not total.is_floating_point():
            raise LossError(f"loss(model, batch) must return a scalar or (sum, count), got {_describe(result)}")
        if len(parts) == 2 and not (isinstance(parts[1], (int, float)) or (isinstance(parts[1], Tensor) and parts[1].numel() == 1)):
            raise LossError(f"loss(model, batch) must return a scalar or (sum, count), got {_describe(result)}")
        if self.backward and not total.requires_grad:
            raise LossError("loss(model, batch) does not depend on any trainable parameter; return a loss that does")
        backs = [Frame("", frame.call, forward=False) for frame in self.stretches]
        if self.backward:
            glue_reads = {name for o in map(self.trace.origin, [total, *self.roots]) for name in o.reads}
            weights = [t for t in self._tensors_of(self.model) if t.requires_grad and self.first[id(t)] in glue_reads]
            roots = [total, *self.roots]
            gradients = [self._given(t) for t in roots]
            self.trace.segments = (self.bounds, backs)
            with self.trace.recording(backs[-1]):
                self._told("", _gradients, roots, [*self.ends, *weights], gradients)
            self.trace.segments = None
        origin = NOWHERE
        for part in parts:
            if isinstance(part, Tensor):
                origin |= self.trace.origin(part)
        _, spec = tree_flatten(None)
        self.kinds.append(_Kind("", self.model, (), (), spec, (), spec, Cost(), False))
        self.calls.append(
            RecordedCall(
                LOSS, "", 1, spec, (), tuple(sorted(origin.sources)), (), tuple(sorted(origin.reads)),
                len(self.kinds) - 1, Cost(), (), (),
            )  # fmt: skip
        )
        for i, (frame, back) in enumerate(zip(self.stretches, backs, strict=True)):
            saved = tuple(SavedStorage(storage, size) for storage, size in frame.saved.items())
            peak = max(frame.workspace(), back.workspace())
            glue = Cost(tuple(frame.operations), tuple(back.operations), saved, peak)
            self.calls[i] = dataclasses.replace(self.calls[i], glue=glue)

    def _given(self, tensor: Tensor) -> Tensor:
        """A gradient that comes from elsewhere: seen before recording, so that it is not counted as made here."""
        gradient = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        self.trace.ref(gradient)
        return gradient

    def _tensors_of(self, module: nn.Module) -> list[Tensor]:
        tensors: dict[int, Tensor] = {}

        def note(name: str, tensor: Tensor) -> Tensor:
            if id(tensor) in self.first:
                tensors[id(tensor)] = tensor
            return tensor

        map_tensors(module, note)
        return list(tensors.values())

    def _names_of(self, module: nn.Module) -> set[str]:
        return {self.first[id(t)] for t in self._tensors_of(module)}

    def _read_tensors(self, frame: Frame) -> list[Tensor]:
        return [t for t in self._tensors_of(self.model) if self.first[id(t)] in frame.reads]

    def _told(self, unit: str, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the user's code; whatever it raises is told once, with its place."""
        try:
            return run(*args, **kwargs)
        except WeftError:
            raise
        except Exception as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if not is_library(f.filename)]
            place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
            who = f"unit {unit!r}" if unit else "the model"
            line = next(iter(str(error).splitlines()), "")
            raise ModelError(f"{who} raised {type(error).__name__} on fake tensors: {line}{place}") from error


class _Enter(torch.autograd.Function):
    """A tensor of the same form in a storage of its own, and no leaf, so that in-place operations on it are allowed."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _enter(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf that ends a piece of the graph, and the tensor to compute with."""
    end = tensor.detach().requires_grad_()
    return end, _Enter.apply(end)  # type: ignore[no-untyped-call]


def _gradients(roots: Sequence[Tensor], ends: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not ends:
        return ()
    return torch.autograd.grad(roots, ends, gradients, allow_unused=True)


def _form(leaf: Any) -> Any:
    """An argument as later ones are compared with it; the form of a tensor, anything else itself."""
    if isinstance(leaf, Tensor):
        return TensorLeaf(tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device.type, leaf.requires_grad)
    return leaf


def _alike(recorded: Sequence[Any], leaves: Sequence[Any]) -> bool:
    return len(recorded) == len(leaves) and all(map(same_value, recorded, map(_form, leaves)))


def _forms(operations: Sequence[RawOp]) -> list[Any]:
    return [op.form for op in operations]


def _leaf(unit: str, value: Any) -> Any:
    """An output as it is kept."""
    if isinstance(value, Tensor):
        return _form(value)
    if dataclasses.is_dataclass(value) and any(isinstance(x, Tensor) for x in vars(value).values()):
        raise ModelError(
            f"unit {unit!r} returns a {type(value).__name__}, whose tensors weft cannot see; return a tensor, tuple, list or "
            f"dict, or register the class with torch.utils._pytree.register_dataclass"
        )
    return value


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(map(_describe, value))}"
    return f"a {type(value).__name__}"


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put every module's attributes back: forwards cache tensors in them."""
    before = [(module, dict(vars(module)), {k: dict(vars(module)[k]) for k in ("_parameters", "_buffers")}) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, registries in before:
            vars(module).clear()
            vars(module).update(attributes)
            for key, values in registries.items():
                vars(module)[key].clear()
                vars(module)[key].update(values)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the fake tensors' log to ourselves: what it would say is raised as an error."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
