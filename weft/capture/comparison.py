"""Comparison: whether a unit that runs on shares does what the whole unit does, operation by operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weft.capture.frames import RawOp
from weft.capture.rehearsal import Run, Step
from weft.capture.sharding import OPAQUE, Divided, State, argument
from weft.capture.tape import Ref


def differs(
    whole: Sequence[Step],
    shares: Run,
    ops: Sequence[RawOp],
    states: Mapping[Ref, State],
    styled: frozenset[str],
    degree: int,
) -> tuple[int, str]:
    """How many operations a run on shares does as the whole unit would, and why the next one does not ("": all do).

    Args:
        whole: steps of the whole unit, one for each of ``ops``.
        shares: the run on shares.
        ops: the unit's operations, as recorded.
        states: of values that are divided or partial; others are whole.
        styled: modules whose inside is not compared.
        degree: the shares are of so many.
    """
    expected = [(step, op) for step, op in zip(whole, ops, strict=True) if _told(step, styled)]
    seen = [step for step in shares.steps if _told(step, styled)]
    for count, ((step, op), mine) in enumerate(zip(expected, seen, strict=False)):
        if mine.name != step.name or mine.inside != step.inside:
            return count, f"the unit's code does something else on 1/{degree} of the features ({mine.name})"
        sizes = tuple(_local(ref, states.get(ref), degree) for ref in op.outputs)
        if any(size is not None and size != had for size, had in zip(sizes, mine.sizes, strict=True)):
            return count, f"the unit's code does not run on 1/{degree} of the features: {mine.name} gives {mine.sizes}"
        if not _alike(step, mine, op, states, degree):
            return count, f"the unit's code computes other numbers on 1/{degree} of the features ({mine.name})"
    count = min(len(expected), len(seen))
    if shares.error:
        return count, f"the unit's code does not run on 1/{degree} of the features: {shares.error}"
    if len(expected) != len(seen):
        return count, f"the unit's code does something else on 1/{degree} of the features"
    return count, ""


LAYOUT = frozenset({"aten.view", "aten._unsafe_view", "aten.reshape", "aten.clone", "aten.alias", "aten.detach"})
"""Operators that a reshape turns into, depending on strides: what follows tells the sizes."""


def _told(step: Step, styled: frozenset[str]) -> bool:
    return step.name not in LAYOUT and styled.isdisjoint(step.inside)


def _local(ref: Ref, state: State | None, degree: int) -> tuple[int, ...] | None:
    if not isinstance(state, Divided):
        return ref.size
    if state.stretches == OPAQUE:
        return None
    size = list(ref.size)
    size[state.dim] //= degree
    return tuple(size)


SIZED = frozenset(
    f"aten.{name}"
    for name in (  # noqa: SIM905 # a table
        "view _unsafe_view reshape expand split split_with_sizes chunk slice new_zeros new_ones new_empty empty zeros "
        "ones narrow"
    ).split()
)
"""Operators whose numbers are sizes and bounds, which the sizes of their results tell."""


def _alike(whole: Step, mine: Step, op: RawOp, states: Mapping[Ref, State], degree: int) -> bool:
    """Whether the numbers are the same, or bounds within a divided dimension are a share's."""
    if whole.name not in SIZED:
        return whole.numbers == mine.numbers
    if whole.name != "aten.slice":
        return True
    given = op.args[0]
    state = states.get(given)
    dim = int(argument(op, 1, "dim", 0)) % len(given.size)
    scale = degree if isinstance(state, Divided) and state.dim == dim else 1
    size = given.size[dim]

    def bounds(step: Step, length: int) -> tuple[int, int, int]:
        start, end, by = (*step.numbers[1:], *(None,) * 3)[:3]
        return slice(start, end, by).indices(length)

    first, last, by = bounds(whole, size)
    a, b, c = bounds(mine, size // scale)
    return (a * scale, b * scale, c) == (first, last, by) or (by > 1 and a == first and by == c)
