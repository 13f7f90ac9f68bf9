"""Recorder: one run of the user's ``loss(model, batch)`` on fake tensors, cut into calls of units and the glue
between them.

Every call of a unit is intercepted (its ``forward`` is overridden on the instance while the recorder runs, so that
hooks still run). The unit runs on tensors of its own, which share nothing with the glue's, so its backward can be run
by itself; what it returns to the glue is new again. A unit that is built like one seen before, and called on inputs
of the same form, is not run again: its outputs are made from what was recorded. So the cost of recording does not
grow with depth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from weft.capture.blame import told
from weft.capture.blocks import Likeness
from weft.capture.border import enter, form, forms_of, gradients_of, output_leaf
from weft.capture.frames import NOWHERE, Frame, Origin
from weft.capture.initial import map_tensors
from weft.capture.isolation import quiet, restored, snapshot
from weft.capture.kinds import Kind
from weft.capture.losses import loss_parts
from weft.capture.profile import LOSS, Source
from weft.capture.recording import Cost, Example, RecordedCall, Recording, SavedStorage, TensorLeaf
from weft.capture.trace import Trace, sequence_number
from weft.errors import LossError, ModelError

__all__ = ["Cost", "RecordedCall", "Recording", "TensorLeaf", "record"]


def record(
    model: nn.Module,
    units: Sequence[str],
    loss: Callable[[nn.Module, Any], Any],
    batch: Any,
    *,
    backward: bool = True,
    alike: Collection[tuple[str, str]] = (),
) -> Recording:
    """Run a loss once on fake tensors and say which unit's call costs what and needs what.

    Args:
        model: a model made by ``initial.build_fake``. It is left as it was.
        units: names from ``units.find_units``.
        loss: ``loss(model, batch)``.
        batch: tensors in any nesting; their values are looked at only where the model does.
        backward: record the backward, too.
        alike: ``Recording.alike`` of the same model on another batch: these need not be run to be compared again.

    Raises:
        ModelError: the model cannot be run on fake tensors.
        LossError: the loss is neither a scalar nor ``(sum, count)``, or (with backward) depends on no parameter.
    """
    return _Recorder(model, units, backward, set(alike)).record(loss, batch)


@dataclass(slots=True)
class _Recorder:
    model: nn.Module
    units: Sequence[str]
    backward: bool
    alike: set[tuple[str, str]]
    trace: Trace = field(init=False)
    first: dict[int, str] = field(init=False)
    kinds: list[Kind] = field(init=False, default_factory=list)
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
            stack.enter_context(quiet())
            stack.enter_context(restored(self.model))
            for name in self.units:
                self._intercept(name, self.model.get_submodule(name))
            stack.enter_context(mode)
            fakes = tree_map_only(Tensor, self._fake, batch)
            stack.enter_context(self.trace)
            stack.enter_context(saved_tensors_hooks(self.trace.pack, lambda t: t))
            self._start_stretch()
            result = told("", loss, self.model, fakes)
            self._finish(result)
            self.trace.frame = None
        return Recording(
            calls=tuple(self.calls),
            costs=tuple(kind.cost for kind in self.kinds),
            examples=tuple(Example(kind.unit, kind.spec, tuple(kind.arguments)) for kind in self.kinds),
            names=dict(self.trace.names),
            units=tuple(self.units),
            alike=frozenset(self.alike),
        )

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
                self.trace.check_unchanged(self.trace.ref(tensor), f"unit {unit!r} is given")
                origin |= self.trace.origin(tensor)
            self.roots += [t for t in given if t.requires_grad]
            self.bounds.append(sequence_number())
            kind, extra, reads = self._kind(number, unit, module, forward, leaves, spec)
            origin |= extra
            for position in self.kinds[kind].changes:
                self.trace.changed[self.trace.ref(given[position]).storage] = number
            outputs, fresh = self._outputs(number, self.kinds[kind])
            own = [self.first[id(t)] for t in self._tensors_of(module)]
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
                    arguments=tuple(self.trace.ref(t).storage for t in given),
                    argument_bytes=tuple(t.untyped_storage().nbytes() for t in given),
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
            match kind.likeness(unit, module, state, leaves, spec):
                case Likeness.SAME:
                    return index, NOWHERE, set()
                case Likeness.SAME_BUT_NUMBERED:
                    if (kind.unit, unit) in self.alike:
                        return index, NOWHERE, set()
                    numbered.append(index)
        # Objects are kept as they are now: a unit may change what it is given (a cache).
        arguments = [form(leaf if numbered else snapshot(leaf)) for leaf in leaves]
        frame, run = self._run(number, unit, module, forward, leaves, spec)
        replayable = not frame.looked and frame.extra is NOWHERE and not frame.reads - self._names_of(module)
        for index in numbered:
            if replayable and self.kinds[index].runs(frame.operations):
                self.alike.add((self.kinds[index].unit, unit))
                return index, NOWHERE, set()
        out_leaves, out_spec, cost, changes = run()
        self.kinds.append(
            Kind(
                unit=unit,
                module=module,
                state=state,
                given=forms_of(leaves),
                arguments=arguments,
                spec=spec,
                out_leaves=out_leaves,
                out_spec=out_spec,
                cost=cost,
                changes=changes,
                replayable=replayable,
            )
        )
        return len(self.kinds) - 1, frame.extra, frame.reads

    def _run(
        self, number: int, unit: str, module: nn.Module, forward: Callable[..., Any], leaves: list[Any], spec: TreeSpec
    ) -> tuple[Frame, Callable[[], tuple[tuple[Any, ...], TreeSpec, Cost, frozenset[int]]]]:
        """Run a unit's forward on tensors of its own; what is returned runs its backward and sums up."""
        ends: dict[int, Tensor] = {}
        entered: dict[int, Tensor] = {}
        for leaf in leaves:
            if isinstance(leaf, Tensor) and id(leaf) not in entered:
                entered[id(leaf)] = leaf
                if leaf.requires_grad:
                    ends[id(leaf)], entered[id(leaf)] = enter(leaf)
        arguments = [entered[id(x)] if isinstance(x, Tensor) else x for x in leaves]
        given = [self.trace.ref(x).storage for x in arguments if isinstance(x, Tensor)]
        frame = Frame(unit, number, arguments=frozenset(given))
        args, kwargs = tree_unflatten(arguments, spec)
        with self.trace.recording(frame):
            result = told(unit, forward, *args, **kwargs)
        workspace = frame.workspace()

        def finish() -> tuple[tuple[Any, ...], TreeSpec, Cost, frozenset[int]]:
            flat, out_spec = tree_flatten(result)
            out_leaves = tuple(output_leaf(unit, x) for x in flat)
            tensors = [x for x in flat if isinstance(x, Tensor)]
            refs = tuple(self.trace.ref(x) for x in tensors)
            returned = [ref.storage for ref in refs]
            back = Frame(unit, number, forward=False)
            peak = workspace
            roots = [t for t in tensors if t.requires_grad]
            if self.backward and roots:
                weights = [t for t in self._read_tensors(frame) if t.requires_grad]
                gradients = [self._given(t) for t in roots]
                with self.trace.recording(back):
                    results = told(unit, gradients_of, roots, [*ends.values(), *weights], gradients)
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
            changes = frozenset(i for i, storage in enumerate(given) if storage in frame.changed)
            cost = Cost(tuple(frame.operations), tuple(back.operations), saved, peak, refs)
            return out_leaves, out_spec, cost, changes

        return frame, finish

    def _outputs(self, number: int, kind: Kind) -> tuple[Any, list[Tensor]]:
        """New tensors for the glue, in the form of a recorded call's outputs."""
        fresh: list[Tensor] = []
        values: list[Any] = []
        for leaf in kind.out_leaves:
            value = leaf
            if isinstance(leaf, TensorLeaf):
                value = torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=leaf.device_type)
                if leaf.requires_grad:
                    end, value = enter(value)
                    self.ends.append(end)
                self.trace.returned(value, Source(number, len(fresh)))
                fresh.append(value)
            values.append(value)
        return tree_unflatten(values, kind.out_spec), fresh

    def _finish(self, result: Any) -> None:
        """Check the loss, run the backward of the glue, and close the recording with LOSS."""
        self.trace.frame = None
        parts = loss_parts(result)
        total = parts[0]
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
                told("", gradients_of, roots, [*self.ends, *weights], gradients)
            self.trace.segments = None
        origin = NOWHERE
        for part in parts:
            origin |= self.trace.origin(part)
        _, spec = tree_flatten(None)
        self.kinds.append(Kind("", self.model, (), (), (), spec, (), spec, Cost(), frozenset(), replayable=False))
        self.calls.append(
            RecordedCall(
                name=LOSS,
                unit="",
                occurrence=1,
                spec=spec,
                leaves=(),
                sources=tuple(sorted(origin.sources)),
                reads=(),
                glue_reads=tuple(sorted(origin.reads)),
                kind=len(self.kinds) - 1,
            )
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
