"""Trace: what a model does on fake tensors, operation by operation, as a dispatch mode sees it.

Two things are followed at once:

- *cost*: each operation with its flops and bytes, live storages and what autograd saves, written to the current Frame;
- *origin*: from which outputs of earlier calls, and through which parameters, every tensor of the glue derives.
  Origins are kept by storage, so that they follow views, in-place writes and ``out=``, and are cut where a call
  returns: its outputs derive from the call alone.

Values are not known on fake tensors, except for those that ``known`` computes alongside. A unit that cannot do without
is run on real tensors (``alone``), and so is the whole model if the glue cannot: the trace is the same, and then notes
what the glue looked at.
"""

from __future__ import annotations

import bisect
import functools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from weft.capture.blame import FakeRunError, LeftBehindError, where
from weft.capture.draws import SeedOf, is_draw
from weft.capture.frames import NOWHERE, Frame, Origin, RawOp
from weft.capture.known import Known, KnownOp, answer_of
from weft.capture.operations import STAND_INS, bytes_of, flops_of, kind_of
from weft.capture.profile import Source
from weft.capture.tape import Ref, flat_tensors, written_arguments
from weft.errors import ModelError

__all__ = ["RawOp", "Trace", "sequence_number"]

aten = torch.ops.aten
LOOKS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
"""Tags of operators that show values to Python, if only as a shape."""


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's class has an untyped __init_subclass__
    """Records what runs while it is active, above a FakeTensorMode. ``frame`` None records nothing."""

    def __init__(
        self, mode: FakeTensorMode, names: dict[Tensor, str], seed_of: SeedOf, forced: float | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # untyped in torch
        self.mode = mode
        self.known = Known(self.ref, seed_of, forced)
        self.frame: Frame | None = None
        self.origins: dict[int, Origin] = {}
        self.call_names: list[str] = []
        # Backward of the glue: sequence number of the first autograd node of each stretch, and the stretches' frames.
        self.segments: tuple[list[int], list[Frame]] | None = None
        self._serials: dict[int, tuple[int, Any]] = {}
        self._count = 0
        self.changed: dict[int, int] = {}
        self.rewritten: set[int] = set()  # by glue
        self.drawn: dict[int, frozenset[int]] = {}  # draws of the glue that lead to a storage, on real tensors
        self.decisions: frozenset[int] = frozenset()  # draws that lead to what Python saw there
        self._inner: dict[int, int] = {}
        self.names = {self.ref(tensor).storage: name for tensor, name in names.items()}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run on fake tensors and record."""
        with torch._C.DisableTorchFunction():  # to look at tensors here is nothing the user's code does
            frame = self._frame()
            return func(*args, **(kwargs or {})) if frame is None else self._note(frame, func, args, kwargs or {})

    def _note(self, frame: Frame, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.prim.device.default and not frame.real:  # asked for at every turn
            if frame.forward:
                self._read(frame, [self.ref(args[0])], func)
            return func(*args)
        before, node = self._count, _node(frame)
        inputs = list(flat_tensors((args, kwargs)))
        refs = [self.ref(t) for t in inputs]
        if frame.forward:
            self._read(frame, refs, func)
        encoded = self._encode(args), {name: self._encode(value) for name, value in kwargs.items()}
        written = list(flat_tensors(written_arguments(func, args, kwargs)))
        values = None
        if frame.real:
            out = self._really(frame, func, args, kwargs, refs)
        else:
            if frame.forward:
                values = self.known.compute(func, args, kwargs, encoded, glue=not frame.unit)
            if values is None:
                for tensor in written:
                    self.known.forget(self.ref(tensor).storage)
            try:
                out = STAND_INS.get(func, func)(*args, **kwargs)
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                out = self._look(frame, func, args, values, refs, error)
        outputs = list(flat_tensors(out))
        made = tuple(self.ref(t) for t in outputs)
        if frame.forward:
            frame.changed.update(ref.storage for ref in map(self.ref, written) if ref.storage in frame.arguments)
            self._pass_on(frame, refs, made, [self.ref(t) for t in written])
            if values is not None:
                self.known.learn(values, made)
        new = [t for t, ref in zip(outputs, made, strict=True) if ref.storage >= before]
        if outputs or written:
            moves = bool(new or written)
            frame.operations.append(
                RawOp(
                    func,
                    func._schema.name.replace("::", "."),
                    kind_of(func) if moves else "view",
                    flops_of(func, args, kwargs, out) if moves else 0,
                    bytes_of(func, inputs, (*new, *written)) if moves else 0,
                    *encoded,
                    made,
                    frozenset(ref for t, ref in zip(inputs, refs, strict=True) if t.requires_grad),
                    node,
                )
            )
        return out

    def ref(self, tensor: Tensor) -> Ref:
        """The tensor's storage, by a number that is never used again, and its geometry."""
        storage = tensor.untyped_storage()
        known = self._serials.get(storage._cdata)
        if known is None:
            serial, frame, nbytes = self._count, self.frame, storage.nbytes()
            self._count += 1
            freed = functools.partial(self._freed, storage._cdata, serial, frame, nbytes)
            known = self._serials[storage._cdata] = (serial, weakref.ref(storage, freed))
            if frame is not None:
                frame.events.append((serial, nbytes))
        offset = int(tensor.storage_offset())
        return Ref(known[0], tensor.dtype, tuple(tensor.shape), tensor.stride(), offset)

    def origin(self, tensor: Tensor) -> Origin:
        """Where a tensor of the glue comes from; a parameter or buffer is a read of itself."""
        return self._origin(self.ref(tensor))

    def returned(self, tensor: Tensor, source: Source) -> None:
        """Note that a tensor is an output of a call."""
        self.origins[self.ref(tensor).storage] = Origin(frozenset({source}))

    def check_unchanged(self, ref: Ref, who: str) -> None:
        """A unit's writes to its arguments happen only where the unit runs, so nobody else may count on them."""
        if ref.storage in self.changed:
            raise ModelError(
                f"{who} a tensor that the call {self.call_names[self.changed[ref.storage]]!r} changed in place "
                f"({where()}); let the unit work on a copy, or return the changed tensor and use that"
            )

    def left_behind(self, tensors: Sequence[Tensor], call: int) -> None:
        """Note tensors that were made in a call and are not among its outputs."""
        self._inner.update((self.ref(tensor).storage, call) for tensor in tensors)

    def saves(self, tensor: Tensor) -> None:
        """Note what autograd saves."""
        frame = self.frame
        if frame is not None and frame.forward and (frame.real or isinstance(tensor, FakeTensor)):
            serial = self.ref(tensor).storage
            if serial not in self.names:
                frame.saved[serial] = tensor.untyped_storage().nbytes()

    @contextmanager
    def recording(self, frame: Frame | None) -> Iterator[None]:
        """Record into another frame, or (None) not at all."""
        previous, self.frame = self.frame, frame
        try:
            yield
        finally:
            self.frame = previous

    def _frame(self) -> Frame | None:
        if self.frame is None or self.segments is None:
            return self.frame
        node = torch._C._current_autograd_node()
        if node is not None:
            bounds, frames = self.segments
            self.frame = frames[min(bisect.bisect_right(bounds, node._sequence_nr()), len(frames) - 1)]
        return self.frame

    def _freed(self, key: int, serial: int, frame: Frame | None, nbytes: int, _: Any) -> None:
        if self._serials.get(key, (None,))[0] == serial:
            del self._serials[key]
        self.known.forget(serial)
        if frame is not None:
            frame.events.append((serial, -nbytes))

    def _origin(self, ref: Ref) -> Origin:
        name = self.names.get(ref.storage)
        origin = self.origins.get(ref.storage, NOWHERE)
        return origin if name is None else origin | Origin(reads=frozenset({name}))

    def _read(self, frame: Frame, refs: Sequence[Ref], func: Any) -> None:
        frame.touched.update(ref.storage for ref in refs)
        for ref in refs:
            maker = self._inner.get(ref.storage)
            if maker is not None and (not frame.unit or maker != frame.call):
                reader = f"unit {frame.unit!r}" if frame.unit else "code between units"
                raise LeftBehindError(
                    f"{reader} reads a tensor that the call {self.call_names[maker]!r} made but did not return "
                    f"({where()}); return it from the unit, or name a module around both in Workload(units=[...])"
                )
            if not frame.unit:
                self.check_unchanged(ref, "code between units reads")
            if frame.unit:
                if ref.storage in self.names:
                    frame.reads.add(self.names[ref.storage])
                elif ref.storage not in frame.arguments:
                    frame.extra |= self.origins.get(ref.storage, NOWHERE)

    def _pass_on(self, frame: Frame, refs: Sequence[Ref], made: Sequence[Ref], written: Sequence[Ref]) -> None:
        if frame.unit:
            known = {ref.storage for ref in refs}
            self._inner.update((ref.storage, frame.call) for ref in made if ref.storage not in known)
            return
        self.rewritten.update(ref.storage for ref in written)
        origin = functools.reduce(Origin.__or__, map(self._origin, refs), NOWHERE)
        if origin is not NOWHERE:
            for ref in (*made, *written):
                if ref.storage not in self.names:
                    self.origins[ref.storage] = self.origins.get(ref.storage, NOWHERE) | origin

    def _encode(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.ref(value)
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._encode, value))
        return value

    def _really(self, frame: Frame, func: Any, args: Any, kwargs: Any, refs: list[Ref]) -> Any:
        """Run on real tensors; note what is looked at, and which draws lead to it."""
        if frame.forward and any(tag in func.tags for tag in LOOKS):
            frame.looked = True
            frame.seen = functools.reduce(Origin.__or__, map(self._origin, refs), frame.seen)
        drawn = frozenset[int]().union(*(self.drawn.get(ref.storage, ()) for ref in refs))
        if any(tag in func.tags for tag in LOOKS):
            self.decisions |= drawn
        if not frame.unit and is_draw(func, args, kwargs):
            drawn |= {self.known.draws}
            out = self.known.drawn(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        if drawn:
            changed = (*flat_tensors(out), *flat_tensors(written_arguments(func, args, kwargs)))
            self.drawn.update((self.ref(tensor).storage, drawn) for tensor in changed)
        return out

    def _look(
        self, frame: Frame, func: Any, args: Any, values: KnownOp | None, refs: list[Ref], error: Exception
    ) -> Any:
        """Answer Python code that looks at a value, or an operator whose result's shape depends on one."""
        frame.looked = True
        if values is not None:
            result = self.known.result
            if not frame.unit:
                values.answer = answer_of(result)
            return tree_map_only(Tensor, self.mode.from_tensor, result)
        if func is aten.index.Tensor:
            indices = self._mask_indices(args[1], glue=not frame.unit)
            if indices is not None:
                return func(args[0], indices)
        self._refuse(frame, func, refs, error)

    def _mask_indices(self, indices: Sequence[Tensor | None], *, glue: bool) -> list[Tensor | None] | None:
        """Indices with every mask in them turned into row numbers; None if a mask's value is not known."""
        result: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                result.append(index)
                continue
            op = self.known.compute(aten.nonzero.default, (index,), {}, ((self.ref(index),), {}), glue=glue)
            if op is None:
                return None
            if glue:
                op.answer = answer_of(self.known.result)
            with _disable_current_modes():
                rows = self.known.result.unbind(1)
            self.known.learn(op, ())
            result.extend(self.mode.from_tensor(r) for r in rows)
        return result

    def _refuse(self, frame: Frame, func: Any, refs: Sequence[Ref], error: Exception) -> NoReturn:
        name = func._schema.name.removeprefix("aten::")
        looks = name in ("_local_scalar_dense", "equal")
        what = "looks at a value" if looks else f"computes a shape from values ({name})"
        if frame.unit:
            raise FakeRunError(
                f"unit {frame.unit!r} {what} that depends on its inputs or weights ({where()}), "
                "which is not known before the model runs; compute it without reading values"
            ) from error
        sources = sorted({self.call_names[s.call] for ref in refs for s in self._origin(ref).sources})
        of = f" of {', '.join(map(repr, sources))}" if sources else ""
        raise FakeRunError(
            f"code between units {what}{of} ({where()}), which is not known before the model runs; "
            "compute it inside a unit without reading values"
        ) from error


def sequence_number() -> int:
    """Number of the next autograd node this thread makes."""
    return torch._C._autograd._get_sequence_nr()


def _node(frame: Frame) -> int:
    """Number of the autograd node just made for the operation (forward), or running it (backward)."""
    if frame.forward:
        return sequence_number() - 1
    node = torch._C._current_autograd_node()
    return node._sequence_nr() if node is not None else -1
