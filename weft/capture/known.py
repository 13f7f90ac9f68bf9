"""Known values: what follows from the batch, from constants and from the glue's numbered draws, without going through a
parameter or a unit, is computed beside the fake tensors, for Python code that looks at it (``mask.all()``,
``torch.rand([]) < p``).

What such code saw decided the way the forward took. The operations that lead to it are kept as ``Conditions``: before a
recording is used for another microbatch they are computed again, and it is used if all answers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from weft.capture.draws import SeedOf, is_draw
from weft.capture.tape import Ref, flat_tensors

aten = torch.ops.aten
LARGEST_KNOWN = 1 << 24
"""Values of tensors with more elements than this are not followed."""


@dataclass(slots=True, eq=False)
class KnownOp:
    """One operation on known values: with a Ref for every tensor that earlier ones made.

    Attributes:
        leaf: the number of the batch's leaf this is, instead of an operation.
        draw: its number among the glue's random operations.
        answer: what Python saw of its result.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: tuple[Ref, ...] = ()
    leaf: int | None = None
    draw: int | None = None
    answer: Any = None

    def storages(self) -> set[int]:
        """Storages it reads or writes."""
        return {ref.storage for ref in self.made} | set(_storages((self.args, self.kwargs)))


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a recording depends on besides shapes: looks at values, and the operations that lead to them.

    Attributes:
        ops: in order.
        decisions: numbers of the glue's random operations among them. These draw alike on all replicas, so that all
            take the same way.
    """

    ops: tuple[KnownOp, ...] = ()
    decisions: frozenset[int] = frozenset()

    def hold(self, batch: Any, seed_of: SeedOf) -> bool:
        """Whether another batch of the same form, with other draws, gives the same answers."""
        leaves = tree_leaves(batch)
        values: dict[Ref, Tensor] = {}
        with torch.random.fork_rng(devices=[], enabled=bool(self.decisions)), torch.no_grad():
            for op in self.ops:
                if op.leaf is not None:
                    values[op.made[0]] = leaves[op.leaf].detach().cpu().clone()
                    continue
                if op.draw is not None:
                    torch.manual_seed(seed_of(op.draw))
                out = op.func(*decode(op.args, values), **decode(op.kwargs, values))
                if op.answer is not None and answer_of(out) != op.answer:
                    return False
                values.update(zip(op.made, flat_tensors(out), strict=False))
        return True


@dataclass(slots=True)
class Known:
    """Values known so far.

    Attributes:
        ref: numbers a tensor.
        seed_of: of the glue's random operations.
        forced: instead of drawing, let single uniform numbers be this.
        values: by storage and geometry.
        ops: the operations that made them.
        draws: random operations of the glue so far.
    """

    ref: Callable[[Tensor], Ref]
    seed_of: SeedOf
    forced: float | None = None
    values: dict[int, dict[Ref, Tensor]] = field(default_factory=dict)
    ops: list[KnownOp] = field(default_factory=list)
    draws: int = 0

    def leaf(self, tensor: Tensor, value: Tensor, number: int) -> None:
        """Note the value of a tensor of the batch."""
        ref = self.ref(tensor)
        with _disable_current_modes():
            self.values.setdefault(ref.storage, {})[ref] = value.detach().cpu().clone()
        self.ops.append(KnownOp(None, (), {}, (ref,), leaf=number))

    def of(self, tensor: Tensor) -> Tensor | None:
        """The value of a fake tensor, if it is known."""
        ref = self.ref(tensor)
        return self.values.get(ref.storage, {}).get(ref)

    def forget(self, storage: int) -> None:
        """The storage is gone, or was written without its values being known."""
        self.values.pop(storage, None)

    def compute(self, func: Any, args: Any, kwargs: Any, encoded: tuple[Any, Any], *, glue: bool) -> KnownOp | None:
        """Run an operation on known values; None if one is not known. ``results`` of the last one stand in ``last``."""
        draw = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            if not (glue and is_draw(func, args, kwargs)):
                return None
            draw = self.draws
        try:
            real_args, real_kwargs = self._decode(args), {k: self._decode(v) for k, v in kwargs.items()}
        except KeyError:
            self.draws += draw is not None
            return None
        with _disable_current_modes(), torch.no_grad():
            out = func(*real_args, **real_kwargs) if draw is None else self.drawn(func, real_args, real_kwargs)
            constants = [t for t in flat_tensors((args, kwargs)) if not isinstance(t, FakeTensor)]
            held = {self.ref(t): t.detach().clone() for t in constants}
            if func is aten.lift_fresh.default:
                func, out = aten.clone.default, out.clone()  # a later write must not reach the constant
        op = KnownOp(func, decode(encoded[0], held), decode(encoded[1], held), draw=draw)
        self._last = out
        return op

    _last: Any = None

    @property
    def result(self) -> Any:
        """What the last operation computed gave."""
        return self._last

    def learn(self, op: KnownOp, made: Sequence[Ref]) -> None:
        """Note the results of the last operation computed."""
        op.made = tuple(made)
        self.ops.append(op)
        for ref, value in zip(made, flat_tensors(self._last), strict=False):
            if value.numel() <= LARGEST_KNOWN:
                self.values.setdefault(ref.storage, {})[ref] = value

    def conditions(self) -> Conditions:
        """What led to what Python saw."""
        needed: set[int] = set()
        kept: list[KnownOp] = []
        for op in reversed(self.ops):
            made = {ref.storage for ref in op.made}
            changed = op.storages() if op.func is not None and op.func._schema.is_mutable else set()
            if op.answer is not None or not needed.isdisjoint(made | changed):
                needed |= op.storages()
                kept.append(op)
        return Conditions(tuple(reversed(kept)), frozenset(op.draw for op in kept if op.draw is not None))

    def drawn(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the next random operation of the glue on real tensors."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed_of(self.draws))
            out = func(*args, **kwargs)
        self.draws += 1
        if self.forced is not None and isinstance(out, Tensor) and out.numel() == 1 and out.is_floating_point():
            out.fill_(self.forced)
        return out

    def _decode(self, value: Any) -> Any:
        if isinstance(value, FakeTensor):
            ref = self.ref(value)
            return self.values[ref.storage][ref]
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._decode, value))
        return value


def answer_of(out: Any) -> Any:
    """What Python can see of a result: a number, or the shapes of tensors."""
    return tuple(tuple(t.shape) for t in flat_tensors(out)) or out


def decode(value: Any, values: dict[Ref, Tensor]) -> Any:
    """Arguments with the tensors that Refs stand for, as far as there are any."""
    if isinstance(value, Ref):
        return values.get(value, value)
    if isinstance(value, (list, tuple)):
        return type(value)(decode(x, values) for x in value)
    if isinstance(value, dict):
        return {k: decode(x, values) for k, x in value.items()}
    return value


def _storages(value: Any) -> Sequence[int]:
    if isinstance(value, Ref):
        return (value.storage,)
    if isinstance(value, (list, tuple)):
        return [s for x in value for s in _storages(x)]
    if isinstance(value, dict):
        return [s for x in value.values() for s in _storages(x)]
    return ()
