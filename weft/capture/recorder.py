"""Recorder: one run of the user's ``loss(model, batch)`` on fake tensors, cut into calls of units and the glue
between them.

Every call of a unit is intercepted (its ``forward`` is overridden on the instance while the recorder runs, so that
hooks still run). The unit runs on tensors of its own, which share nothing with the glue's, so its backward can be run
by itself; what it returns to the glue is new again. A unit that is built like one seen before, and called on inputs
of the same form, is not run again: its outputs are made from what was recorded. So depth costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import TreeSpec, tree_flatten

from weft.capture.alone import Alone, Outcome
from weft.capture.blame import FakeRunError, LeftBehindError, told
from weft.capture.blocks import Likeness
from weft.capture.border import enter, form, forms_of, gradient_for, gradients_of
from weft.capture.draws import derived, has_drawn, python_state
from weft.capture.effects import exchange
from weft.capture.enclosing import EnclosedError, check_enclosed, enclosed
from weft.capture.frames import NOWHERE, Frame, Origin
from weft.capture.initial import FakeModel, map_tensors
from weft.capture.isolation import quiet, restored, revert, saving, snapshot
from weft.capture.kinds import Kind
from weft.capture.known import Conditions
from weft.capture.losses import loss_parts
from weft.capture.names import Names
from weft.capture.profile import Source
from weft.capture.reach import with_gradient
from weft.capture.recording import Cost, Example, RecordedCall, Recording, SavedStorage, TensorLeaf, loss_call
from weft.capture.retracing import Track, retraced
from weft.capture.setting import Setting
from weft.capture.trace import Trace, sequence_number
from weft.capture.trees import flatten, unflatten
from weft.errors import LossError, ModelError, WeftError

__all__ = ["Cost", "RecordedCall", "Recording", "TensorLeaf", "record"]

EXTREMES = (0.0, 1 - 2**-24)
"""What uniform random numbers may come to: one of them lets most code that drops layers keep them all."""


def record(
    model: nn.Module | FakeModel,
    units: Sequence[str],
    loss: Callable[[nn.Module, Any], Any],
    batch: Any,
    *,
    backward: bool = True,
    alike: Collection[tuple[str, str]] = (),
    seed: int | None = None,
) -> Recording:
    """Run a loss once on fake tensors and say which unit's call costs what and needs what.

    What cannot be run on fake tensors is run on real ones: a unit by itself; for the glue all of it, unit by unit.

    Args:
        model: a model made by ``initial.build_fake``, or what that gave: then real runs have its initial weights.
            It is left as it was.
        units: names from ``units.find_units``; those of the recording may be fewer (``enclosing``).
        loss: ``loss(model, batch)``.
        batch: tensors in any nesting; their values are looked at only where the model does.
        backward: record the backward, too.
        alike: ``Recording.alike`` of the same model on another batch: these need not be run to be compared again.
        seed: of the glue's random draws, which may decide which units are called. None: whichever decisions call most.

    Raises:
        ModelError: the model can be run neither on fake tensors nor on real ones.
        LossError: the loss is neither a scalar nor ``(sum, count)``, or (with backward) depends on no parameter.
    """

    def once(forced: float | None = None) -> Recording:
        def attempt(*, real: bool, effects: bool) -> Recording:
            setting = Setting(model, units, seed or 0, forced, real)
            return _Recorder(setting, backward, effects, set(alike)).record(loss, batch)

        try:
            try:
                return attempt(real=False, effects=False)
            except LeftBehindError:
                return attempt(real=False, effects=True)
        except FakeRunError as error:
            try:
                return attempt(real=True, effects=True)
            except WeftError:
                raise error from error.__cause__

    try:
        recording = once()
    except EnclosedError as error:
        units = enclosed(units, error.around)
        recording = once()
    if seed is None and (recording.conditions.decisions or recording.python_draws):
        recording = max([recording, *map(once, EXTREMES)], key=lambda r: len(r.calls))
    return recording


@dataclass(slots=True)
class _Recorder:
    setting: Setting
    backward: bool
    effects: bool
    alike: set[tuple[str, str]]
    model: nn.Module = field(init=False)
    real: bool = field(init=False)
    trace: Trace = field(init=False)
    first: Names = field(init=False, default_factory=Names)
    kinds: list[Kind] = field(init=False, default_factory=list)
    calls: list[RecordedCall] = field(init=False, default_factory=list)
    occurrences: dict[str, int] = field(init=False, default_factory=dict)
    stretches: list[Frame] = field(init=False, default_factory=list)
    bounds: list[int] = field(init=False, default_factory=list)
    roots: list[Tensor] = field(init=False, default_factory=list)
    ends: list[Tensor] = field(init=False, default_factory=list)
    sources: dict[int, Source] = field(init=False, default_factory=dict)
    given: list[list[Tensor]] = field(init=False, default_factory=list)
    hidden: list[frozenset[Source]] = field(init=False, default_factory=list)
    live: frozenset[Source] = field(init=False, default=frozenset())

    def record(self, loss: Callable[[nn.Module, Any], Any], batch: Any) -> Recording:
        tensors: dict[Tensor, str] = {}
        self.model, self.real = self.setting.model, self.setting.real

        def note(name: str, tensor: Tensor) -> Tensor:
            if isinstance(tensor, FakeTensor):
                tensors.setdefault(tensor, name)
            self.first.setdefault(id(tensor), name)
            return tensor

        map_tensors(self.model, note)
        if not any(isinstance(t, nn.Parameter) for t in tensors):
            raise ModelError(f"{type(self.model).__name__} has no parameters; there is nothing to train")
        mode = next(t for t in tensors if isinstance(t, FakeTensor)).fake_mode
        self.trace = Trace(mode, tensors, lambda number: derived(self.setting.seed, number), self.setting.forced)
        with ExitStack() as stack:
            stack.enter_context(quiet())
            stack.enter_context(restored(self.model))
            for name in self.setting.units:
                self._intercept(name, self.model.get_submodule(name))
            stack.enter_context(self.setting.entered(self.trace, self.first))
            inputs = self.setting.inputs(batch, self.trace)
            stack.enter_context(self.trace)
            stack.enter_context(saving(self.trace.saves))
            before = python_state()
            self._start_stretch()
            result = told("", loss, self.model, inputs)
            counted = self._finish(result)
            self.trace.frame = None
            drawn = has_drawn(before)
        return Recording(
            calls=tuple(self.calls),
            costs=tuple(kind.outcome.cost for kind in self.kinds),
            examples=tuple(Example(kind.unit, kind.spec, tuple(kind.arguments)) for kind in self.kinds),
            names=dict(self.trace.names),
            with_gradient=self.live,
            units=tuple(self.setting.units),
            alike=frozenset(self.alike),
            conditions=Conditions((), self.trace.decisions) if self.real else self.trace.known.conditions(),
            python_draws=drawn,
            counted=counted,
        )

    def _intercept(self, name: str, module: nn.Module) -> None:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            frame = self.trace.frame
            if frame is None or frame.unit or not frame.forward:
                return original(*args, **kwargs)
            check_enclosed(self.model)
            return self._call(name, module, original, args, kwargs)

        module.__dict__["forward"] = forward

    def _start_stretch(self) -> None:
        self.stretches.append(Frame("", len(self.calls), real=self.real))
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
            self.roots += [t for t in given if t.requires_grad]
            self.given.append(given)
            self.bounds.append(sequence_number())
            kind, (values, left), extra, reads = self._kind(number, unit, module, forward, leaves, spec)
            outcome = self.kinds[kind].outcome
            for position, tensor in enumerate(given):
                if position in outcome.used:
                    self.trace.check_unchanged(self.trace.ref(tensor), f"unit {unit!r} is given")
                    origin |= self.trace.origin(tensor)
            origin |= extra
            self.hidden.append(extra.sources)
            for position in outcome.changes:
                self.trace.changed[self.trace.ref(given[position]).storage] = number
            outputs, fresh = self._outputs(number, outcome, values)
            exchange(leaves, dict(zip(map(id, left), fresh[len(fresh) - len(left) :], strict=True)))
            own = self.first.names_in(module)
            self.calls.append(
                RecordedCall(
                    name=name,
                    unit=unit,
                    occurrence=occurrence,
                    tree=outcome.tree,
                    leaves=outcome.leaves,
                    sources=tuple(sorted(origin.sources)),
                    reads=tuple(dict.fromkeys([*own, *sorted(reads)])),
                    glue_reads=tuple(sorted(origin.reads)),
                    effects=outcome.effects,
                    kind=kind,
                    used=outcome.used,
                    python_draws=self.kinds[kind].python_draws,
                    looks=self.kinds[kind].looks,
                    arguments=tuple(self.trace.ref(t).storage for t in given),
                    argument_bytes=tuple(t.untyped_storage().nbytes() for t in given),
                    outputs=tuple(self.trace.ref(t).storage for t in fresh),
                )
            )
        self._start_stretch()
        return outputs

    def _kind(
        self, number: int, unit: str, module: nn.Module, forward: Callable[..., Any], leaves: list[Any], spec: TreeSpec
    ) -> tuple[int, tuple[Sequence[Tensor], Sequence[Tensor]], Origin, set[str]]:
        """The kind of a call, recorded now if no earlier one is like it; if it was run, real tensors it returned, and
        tensors it left in its arguments."""
        state = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
        numbered: list[int] = []
        for index, kind in enumerate(self.kinds):
            match kind.likeness(unit, module, state, leaves, spec):
                case Likeness.SAME if not self.real:
                    return index, ((), ()), NOWHERE, set()
                case Likeness.SAME_BUT_NUMBERED | Likeness.SAME:
                    if (kind.unit, unit) in self.alike and not self.real:
                        return index, ((), ()), NOWHERE, set()
                    numbered.append(index)
        for index in numbered if not self.real else ():
            if retraced(self.kinds[index].track, self._run(number, unit, module), forward, leaves, spec):
                self.alike.add((self.kinds[index].unit, unit))
                return index, ((), ()), NOWHERE, set()
        # Objects are kept as they are now: a unit may change what it is given (a cache).
        arguments = [form(leaf if numbered else snapshot(leaf)) for leaf in leaves]
        run, finish = self._alone(number, unit, module, forward, leaves, spec)
        frame = run.frame
        reads = frame.reads.difference(self.first.names_in(module))
        replayable = frame.real or not frame.looked
        replayable &= frame.extra is NOWHERE and not reads and not run.leaves_something
        for index in numbered:
            if replayable and self.kinds[index].track.like(run):
                self.alike.add((self.kinds[index].unit, unit))
                return index, (finish().values if self.real else (), ()), NOWHERE, set()
        outcome = finish()
        track, draws = Track(replace(outcome, values=(), left=()), tuple(run.given), run.own), run.python_draws
        forms, looked = forms_of(leaves), frame.looked
        self.kinds.append(Kind(unit, module, state, forms, arguments, spec, track, draws, looked, replayable))
        return len(self.kinds) - 1, (outcome.values, outcome.left), frame.extra, frame.reads

    def _alone(
        self, number: int, unit: str, module: nn.Module, forward: Callable[..., Any], leaves: list[Any], spec: TreeSpec
    ) -> tuple[Alone, Callable[[], Outcome]]:
        """Run a unit by itself, on real tensors if that is asked for or it cannot be on fake ones."""
        run, fakes, before = self._run(number, unit, module), FakeRunError(""), [snapshot(leaf) for leaf in leaves]
        if not self.real:
            try:
                with restored(module, only_if_it_raises=True):
                    return run, run.run(forward, leaves, spec)
            except FakeRunError as error:
                run, fakes = self._run(number, unit, module), error
                for leaf, copy in zip(leaves, before, strict=True):
                    revert(leaf, copy)
        try:
            outcome = run.run_for_real(forward, leaves, spec, self.setting.weights)
        except FakeRunError as error:
            raise (error if self.real else fakes) from (error if self.real else fakes).__cause__
        return run, lambda: outcome

    def _run(self, number: int, unit: str, module: nn.Module) -> Alone:
        frame, watches = Frame(unit, number), self.effects
        return Alone(self.trace, number, unit, module, self.model, self.first, self.backward, watches, frame)

    def _outputs(self, number: int, outcome: Outcome, values: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        """New tensors for the glue, in the form of a recorded call's outputs."""
        fresh: list[Tensor] = []
        filled: list[Any] = []
        for leaf in outcome.leaves:
            value = leaf
            if isinstance(leaf, TensorLeaf):
                value = values[len(fresh)].clone() if self.real else leaf.empty()
                if leaf.requires_grad:
                    end, value = enter(value, new=True)
                    self.ends.append(end)
                    self.sources[id(end)] = Source(number, len(fresh))
                self.trace.returned(value, Source(number, len(fresh)))
                fresh.append(value)
            filled.append(value)
        return unflatten(filled, outcome.tree), fresh

    def _finish(self, result: Any) -> bool:
        """Check the loss, run the backward of the glue, and close the recording with LOSS. Whether it is counted."""
        self.trace.frame = None
        parts = loss_parts(result)
        total = parts[0]
        if self.backward and not total.requires_grad:
            raise LossError("loss(model, batch) does not depend on any trainable parameter; return a loss that does")
        reach = [self.kinds[call.kind].outcome.reach for call in self.calls]
        self.live = with_gradient(total, self.sources, self.given, reach, self.hidden)
        backs = [Frame("", frame.call, forward=False, real=self.real) for frame in self.stretches]
        if self.backward:
            glue_reads = {name for o in map(self.trace.origin, [total, *self.roots]) for name in o.reads}
            held = self.first.tensors_in(self.model)
            weights = [t for t in held if t.requires_grad and self.first[id(t)] in glue_reads]
            roots = [total, *self.roots]
            gradients = [gradient_for(t) for t in roots]
            for gradient in gradients:
                self.trace.ref(gradient)  # seen before recording, so that it is not counted as made here
            self.trace.segments = (self.bounds, backs)
            with self.trace.recording(backs[-1]):
                told("", gradients_of, roots, [*self.ends, *weights], gradients)
            self.trace.segments = None
        origin = functools.reduce(Origin.__or__, map(self.trace.origin, parts))
        _, tree = flatten(None)
        track = Track(Outcome((), tree, Cost(), frozenset(), frozenset(), ()), (), ())
        self.kinds.append(Kind("", self.model, (), (), (), tree.spec, track, False, False, replayable=False))
        self.calls.append(loss_call(len(self.kinds) - 1, tree, sorted(origin.sources), sorted(origin.reads)))
        for i, (frame, back) in enumerate(zip(self.stretches, backs, strict=True)):
            saved = tuple(SavedStorage(storage, size) for storage, size in frame.saved.items())
            peak = max(frame.workspace(), back.workspace())
            self.calls[i] = replace(
                self.calls[i],
                rewritten=frozenset(n for n, s in enumerate(self.calls[i].outputs) if s in self.trace.rewritten),
                glue=Cost(tuple(frame.operations), tuple(back.operations), saved, peak),
                seen=tuple(sorted(frame.seen.sources)),
                seen_reads=tuple(sorted(frame.seen.reads)),
            )
        return isinstance(result, tuple) and len(result) == 2
