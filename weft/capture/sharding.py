"""States of divided values, and how they travel through an operation: what tensor parallelism's exactness rests on.

A value is *divided* on one dimension, which consists of stretches: every rank has an equal, contiguous share of each
(one stretch mostly; three where queries, keys and values are fused). Or it is *partial*: every rank has a summand of
it, as after a product over a divided dimension. rules.py says what an operation on shares gives: the same share of
its whole result, or nothing that is exact (RefusedError). Rules need no rank and no degree: the degree has to divide
every stretch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from weft.capture.frames import RawOp
from weft.capture.tape import Ref


class Divided(NamedTuple):
    """A value divided on dimension ``dim``, in stretches of these lengths; ``tags`` tell by which parameters."""

    dim: int
    stretches: tuple[int, ...]
    tags: frozenset[int] = frozenset()

    @property
    def place(self) -> tuple[int, tuple[int, ...]]:
        """Where, without by which."""
        return self.dim, self.stretches


class Partial(NamedTuple):
    """A value that is the sum of what the ranks have."""

    tags: frozenset[int] = frozenset()


State = Divided | Partial
States = Mapping[Ref, State]
OPAQUE = ()
"""Stretches of a result that is divided in a way nothing may build on (attention's softmax statistics)."""


class RefusedError(Exception):
    """An operation that is not exact on shares; the message says why, in a few words."""


class CutError(RefusedError):
    """An operation that cuts a divided dimension; it would be exact if the dimension consisted of stretches."""

    def __init__(self, message: str, ref: Ref, at: Sequence[int]) -> None:
        super().__init__(message)
        self.ref, self.at = ref, tuple(at)


class OnceError(RefusedError):
    """An operation that adds a whole value to summands; it would be exact if only one rank added it."""

    def __init__(self, message: str, ref: Ref) -> None:
        super().__init__(message)
        self.ref = ref


class WantedError(RefusedError):
    """An operation of divided values with a whole one; it would be exact if that were divided, too."""

    def __init__(self, message: str, ref: Ref, dim: int, stretches: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ref, self.dim, self.stretches = ref, dim, stretches


def tensors_of(value: Any) -> list[Ref]:
    """Refs in the arguments of an operation, in order."""
    if isinstance(value, Ref):
        return [value]
    if isinstance(value, dict):
        return [ref for x in value.values() for ref in tensors_of(x)]
    if isinstance(value, (list, tuple)):
        return [ref for x in value for ref in tensors_of(x)]
    return []


def tags_of(states: States) -> frozenset[int]:
    """Tags of all."""
    return frozenset[int]().union(*(s.tags for s in states.values()))


def only(op: RawOp, states: States) -> tuple[Ref, Divided]:
    """The divided argument of an operation that takes one tensor."""
    if len(states) != 1:
        raise RefusedError(f"{op.name} combines several divided values")
    ((ref, state),) = states.items()
    assert isinstance(state, Divided)
    return ref, state


def argument(op: RawOp, position: int, name: str, default: Any = None) -> Any:
    """An argument, however it was given."""
    return op.args[position] if len(op.args) > position else op.kwargs.get(name, default)


def reshaped(before: Sequence[int], state: Divided, after: Sequence[int]) -> Divided:
    """A reshape keeps the order of elements: stretches, counted in elements, stay as they are.

    In elements, the divided dimension is a row of stretches that repeats for every index before it; it is found again
    in a dimension of the new shape whose rows have the same stretches.

    Raises:
        RefusedError: in none.
    """
    row = [n * math.prod(before[state.dim + 1 :]) for n in state.stretches]
    total = math.prod(before)
    repeats = math.prod(before[: state.dim])
    found: list[Divided] = []
    for dim, size in enumerate(after):
        ahead, inner = math.prod(after[:dim]), math.prod(after[dim + 1 :])
        if size == 1 or not total:
            continue
        # ``ahead`` rows of size * inner elements each: so many rows of ours make one, or one of ours makes so many.
        if repeats % ahead == 0:
            new = row * (repeats // ahead)
        elif ahead % repeats == 0:
            new = _one_of(row, ahead // repeats)
        else:
            continue
        if new and sum(new) == size * inner and all(n % inner == 0 for n in new):
            found.append(Divided(dim, tuple(n // inner for n in new), state.tags))
    for state in found:
        if max(state.stretches) > 1:
            return state
    if found:
        return found[0]
    raise RefusedError(f"a reshape from {tuple(before)} to {tuple(after)} splits the divided dimension unevenly")


def _one_of(row: list[int], parts: int) -> list[int]:
    """The stretches of each of so many equal parts of a row; none if they differ."""
    length, rest = divmod(len(row), parts)
    if rest or any(row[i : i + length] != row[:length] for i in range(0, len(row), length)):
        return []
    return row[:length]


def between(op: RawOp, ref: Ref, state: Divided, start: int, end: int) -> tuple[int, ...]:
    """The stretches from ``start`` to ``end`` of a divided dimension.

    Raises:
        CutError: these are inside a stretch.
    """
    bounds = [0, *itertools.accumulate(state.stretches)]
    if start not in bounds or end not in bounds:
        cuts = [x for x in (start, end) if x not in bounds]
        raise CutError(f"{op.name} cuts the divided features: several projections are fused into one", ref, cuts)
    return state.stretches[bounds.index(start) : bounds.index(end)]
