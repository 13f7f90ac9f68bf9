"""Retracing: a block is run along the operations of one like it, to see whether it does the same.

Nothing is recorded and hardly anything computed: as long as the block does the next recorded operation, with the same
tensors and numbers, the results have the recorded form and are made from that. This takes a fraction of a recording,
which counts where a hundred blocks know their own number. What goes another way is no proof of a difference, since not
everything can be followed: the block is then recorded, and the recordings are compared.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_unflatten

from weft.capture.alone import Alone, Outcome
from weft.capture.blocks import same_value
from weft.capture.border import entered, form
from weft.capture.draws import python_state, restore_python
from weft.capture.effects import Leavings
from weft.capture.frames import RawOp
from weft.capture.isolation import restored, revert, saving, snapshot
from weft.capture.operations import STAND_INS, flops_of
from weft.capture.sharding import tensors_of
from weft.capture.tape import Ref, flat_tensors
from weft.capture.trees import Tree, flatten

CPU = torch.device("cpu")


class AstrayError(Exception):
    """The block did not do what the recorded one did, or something that cannot be followed."""


class Place(NamedTuple):
    """One operation on the way.

    Attributes:
        op: as recorded.
        tensors: its arguments; ``gradients``: whether each requires a gradient.
        rest: how they are put together, and what is no tensor.
        known: whether its results are new tensors or views of their recorded form, and nothing else.
        several: whether it returns more than one.
    """

    op: RawOp
    tensors: tuple[Ref, ...]
    gradients: tuple[bool, ...]
    rest: list[Any]
    known: bool
    several: bool


@dataclass(frozen=True)
class Track:
    """What a recorded call did.

    Attributes:
        outcome: it.
        given, own: storages of its tensor arguments, and of the tensors its module holds.
    """

    outcome: Outcome
    given: Sequence[int]
    own: Sequence[int]

    @cached_property
    def places(self) -> list[Place]:
        """Its operations, as they are followed."""
        there = {*self.given, *self.own}
        places = []
        for op in self.outcome.cost.forward:
            tensors: list[Ref] = []
            rest: list[Any] = []
            _take_apart((op.args, op.kwargs), Ref, tensors, rest)
            returns = [str(r.type) for r in op.func._schema.returns]
            known = bool(tensors) and not op.func._schema.is_mutable and op.kwargs.get("device") is None
            known &= returns == ["Tensor"] * len(op.outputs) or returns == ["List[Tensor]"]
            known &= not any(ref.dtype.is_complex for ref in (*tensors, *op.outputs))  # may be marked as conjugated
            known &= not any(ref.offset for ref in op.outputs if ref.storage not in there)
            gradients = tuple(ref in op.gradients for ref in tensors)
            places.append(Place(op, tuple(tensors), gradients, rest, known, returns != ["Tensor"]))
            there.update(ref.storage for ref in op.outputs)
        return places

    def like(self, run: Alone) -> bool:
        """Whether another recorded forward does the same operations with the same tensors, and returns the same.
        Numbers may differ where they change no cost (a scale)."""
        there: dict[int, int] = {}
        here: dict[int, int] = {}

        def meet(a: Sequence[int], b: Sequence[int]) -> bool:
            pairs = zip(a, b, strict=False)
            return len(a) == len(b) and all(
                there.setdefault(x, y) == y and here.setdefault(y, x) == x for x, y in pairs
            )

        mine, other = self.outcome.cost.forward, run.frame.operations
        if len(mine) != len(other) or not meet(self.given, run.given) or not meet(self.own, run.own):
            return False
        for a, b in zip(mine, other, strict=True):
            x, y = ((*tensors_of((op.args, op.kwargs)), *op.outputs) for op in (a, b))
            if a.form != b.form or [(*r[1:], r in a.gradients) for r in x] != [(*r[1:], r in b.gradients) for r in y]:
                return False
            if not meet([ref.storage for ref in x], [ref.storage for ref in y]):
                return False
        x, y = self.outcome.cost.returned, run.returned
        if [r[1:] for r in x] != [r[1:] for r in y] or not meet([r.storage for r in x], [r.storage for r in y]):
            return False
        return _same_tree(self.outcome.tree, run.tree) and same_value(self.outcome.leaves, run.leaves)


def retraced(track: Track, run: Alone, forward: Callable[..., Any], leaves: Sequence[Any], spec: TreeSpec) -> bool:
    """Run a call of a block along the track of another. False if it did not do the same, or something that cannot be
    followed; then all is as it was.

    Args:
        track: the way.
        run: whose call.
        forward: what it calls, with ``leaves`` put together by ``spec``.
    """
    before, python = [snapshot(leaf) for leaf in leaves], python_state()
    arguments, _ = entered(leaves)
    args, kwargs = tree_unflatten(arguments, spec)
    watch = Leavings(arguments if run.watches else ())
    try:
        with restored(run.module, only_if_it_raises=True):
            held = Retrace(track, run, arguments).go(forward, args, kwargs, watch)
    except Exception:  # the user's code too: the recording will tell
        for leaf, copy in zip(leaves, before, strict=True):
            revert(leaf, copy)
        torch.clear_autocast_cache()  # what is cast in it would not be cast again
        return False
    finally:
        restore_python(python)
    run.trace.left_behind(held, run.number)
    return True


class Retrace(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's class has an untyped __init_subclass__
    """Runs a block along the track of another.

    Args:
        track: the way.
        run: whose call; ``arguments``: of it.

    Raises:
        AstrayError: it is given other tensors than the recorded one.
    """

    def __init__(self, track: Track, run: Alone, arguments: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # untyped in torch
        self.track, self.mode, self.at = track, run.trace.mode, 0
        # Held, so that no two have one address.
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.made: list[weakref.ref[Tensor]] = []
        given, own = [x for x in arguments if isinstance(x, Tensor)], run.names.tensors_in(run.module)
        if (len(track.given), len(track.own)) != (len(given), len(own)):
            raise AstrayError
        for storage, tensor in zip((*track.given, *track.own), (*given, *own), strict=True):
            here = tensor.untyped_storage()
            if self.storages.setdefault(storage, here)._cdata != here._cdata:
                raise AstrayError
        if len({storage._cdata for storage in self.storages.values()}) != len(self.storages):
            raise AstrayError

    def go(self, forward: Callable[..., Any], args: Any, kwargs: Any, watch: Leavings) -> list[Tensor]:
        """Run a forward; what it made and somebody still holds.

        Raises:
            AstrayError: it does not do what the recorded one did.
        """
        outcome = self.track.outcome
        with _disable_current_modes(), self, saving(lambda tensor: None):
            result = forward(*args, **kwargs)
        leaves, tree = flatten(result)
        if self.at != len(self.track.places) or watch.effects()[1]:
            raise AstrayError
        if not _same_tree(tree, outcome.tree) or not same_value(outcome.leaves, tuple(map(form, leaves))):
            raise AstrayError
        returned = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for number, ref in enumerate(outcome.cost.returned):
            self._check(returned[number], ref)
        del result, leaves, tree, returned
        return [tensor for tensor in (made() for made in self.made) if tensor is not None]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take the next step."""
        if func is torch.ops.prim.device.default and type(args[0]) is FakeTensor:
            return args[0].fake_device
        with torch._C.DisableTorchFunction():  # to look at tensors here is nothing the user's code does
            return self._step(func, args, kwargs or {})

    def _step(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.at == len(self.track.places):
            raise AstrayError
        place = self.track.places[self.at]
        self.at += 1
        tensors: list[Tensor] = []
        rest: list[Any] = []
        _take_apart((args, kwargs), Tensor, tensors, rest)
        if func is not place.op.func or len(tensors) != len(place.tensors):
            raise AstrayError
        if func is torch.ops.aten.lift_fresh.default and type(tensors[0]) is Tensor:  # a constant in the code
            self.storages.setdefault(place.tensors[0].storage, tensors[0].untyped_storage())
        for tensor, ref, needs in zip(tensors, place.tensors, place.gradients, strict=True):
            self._check(tensor, ref, fake=func is not torch.ops.aten.lift_fresh.default)
            if tensor.requires_grad is not needs:
                raise AstrayError
        if place.known and _same(rest, place.rest):
            made = [self._make(ref) for ref in place.op.outputs]
            return made if place.several else made[0]
        with self.mode:
            out = STAND_INS.get(func, func)(*args, **kwargs)
        results = list(flat_tensors(out))
        if len(results) != len(place.op.outputs) or flops_of(func, args, kwargs, out) != place.op.flops:
            raise AstrayError
        for tensor, ref in zip(results, place.op.outputs, strict=True):
            self._note(tensor, ref)
            self._check(tensor, ref)
        return out

    def _check(self, tensor: Tensor, ref: Ref, *, fake: bool = True) -> None:
        """That this is the tensor that was there."""
        storage = self.storages.get(ref.storage)
        if (
            storage is None
            or (fake and type(tensor) is not FakeTensor)
            or tensor.untyped_storage()._cdata != storage._cdata
            or (tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()) != ref[1:]
        ):
            raise AstrayError

    def _make(self, ref: Ref) -> Tensor:
        """A result of a recorded form."""
        form = torch.empty_strided(ref.size, ref.stride, dtype=ref.dtype, device="meta")
        if ref.storage in self.storages:
            form.set_(self.storages[ref.storage], ref.offset, ref.size, ref.stride)
        tensor = FakeTensor(self.mode, form, CPU)
        self._note(tensor, ref)
        return tensor

    def _note(self, tensor: Tensor, ref: Ref) -> None:
        self.storages.setdefault(ref.storage, tensor.untyped_storage())
        self.made.append(weakref.ref(tensor))


def _take_apart(value: Any, kind: type, tensors: list[Any], rest: list[Any]) -> None:
    """Put tensors, or Refs in their place, in one list, and everything else in another."""
    if isinstance(value, kind):
        tensors.append(value)
        rest.append(...)
    elif isinstance(value, (list, tuple)):
        rest.append(len(value))
        for x in value:
            _take_apart(x, kind, tensors, rest)
    elif isinstance(value, dict):
        rest.append(tuple(value))
        for x in value.values():
            _take_apart(x, kind, tensors, rest)
    else:
        rest.append(value)


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether values are equal, and of one type: 1.0 makes other tensors than 1."""
    return len(a) == len(b) and all(type(x) is type(y) and bool(x == y) for x, y in zip(a, b, strict=True))


def _same_tree(a: Tree, b: Tree) -> bool:
    """Whether results are put together alike."""

    def inside(x: tuple[Any, Tree] | None, y: tuple[Any, Tree] | None) -> bool:
        return x is y if x is None or y is None else type(x[0]) is type(y[0]) and _same_tree(x[1], y[1])

    return a.spec == b.spec and len(a.objects) == len(b.objects) and all(map(inside, a.objects, b.objects))
