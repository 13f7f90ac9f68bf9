"""Rules for products of divided values: matrix products, attention, convolutions, embeddings."""

from __future__ import annotations

from weft.capture.frames import RawOp
from weft.capture.sharding import (
    OPAQUE,
    Divided,
    Partial,
    RefusedError,
    State,
    States,
    WantedError,
    tags_of,
    tensors_of,
)
from weft.capture.tape import Ref


def product(op: RawOp, states: States) -> list[State | None]:
    """mm, bmm, addmm, baddbmm, mv, _grouped_mm: by which of the operands' dimensions is divided."""
    refs = tensors_of(op.args)
    grouped = "grouped_mm" in op.name
    (a, b), bias = (refs[:2], None) if grouped else (refs[-2:], refs[0] if len(refs) == 3 else None)
    left, right = states.get(a), states.get(b)
    out = op.outputs[0]
    if any(ref in states for ref in refs[2:] if grouped):
        raise RefusedError(f"{op.name} is given divided positions")
    if isinstance(left, Partial) or isinstance(right, Partial):
        if bias is not None or (left is not None and right is not None):
            raise RefusedError(f"{op.name} multiplies or adds to a value whose sum is not made yet")
        return [Partial(tags_of(states))]
    state = _matrices(op, a, b, left, right)
    if bias is None:
        return [state]
    if isinstance(state, Partial):
        raise RefusedError(f"{op.name} adds a whole bias to a value whose sum is not made yet")
    at = state.dim - len(out.size)
    size = bias.size[at] if len(bias.size) >= -at else 1
    given = states.get(bias)
    if size != 1 and (not isinstance(given, Divided) or given.stretches != state.stretches):
        raise WantedError(f"{op.name} adds a whole bias", bias, len(bias.size) + at, state.stretches)
    return [state]


def _matrices(op: RawOp, a: Ref, b: Ref, left: State | None, right: State | None) -> Divided | Partial:
    """(.., M, K) x (.., K, N); b may be a vector (K)."""
    assert not isinstance(left, Partial)
    assert not isinstance(right, Partial)
    rank = len(op.outputs[0].size)
    inner_a = len(a.size) - 1
    inner_b = max(len(b.size) - 2, 0)
    tags = (left.tags if left else frozenset()) | (right.tags if right else frozenset())
    over_a = left is not None and left.dim == inner_a
    over_b = right is not None and right.dim == inner_b
    if over_a and over_b:
        assert left is not None
        assert right is not None
        if left.stretches == right.stretches:
            return Partial(tags)
        raise RefusedError(f"{op.name} multiplies values that are divided differently")
    if over_a:
        assert left is not None
        raise WantedError(f"{op.name} runs over divided features with a whole matrix", b, inner_b, left.stretches)
    if over_b:
        assert right is not None
        raise WantedError(f"{op.name} runs over divided features of one factor", a, inner_a, right.stretches)
    batched = len(a.size) == len(b.size) == rank == 3
    if left is not None and right is not None:
        if batched and left.dim == right.dim == 0 and left.stretches == right.stretches:
            return Divided(0, left.stretches, tags)
        raise RefusedError(f"{op.name} multiplies values divided on different dimensions")
    if left is not None and left.dim == inner_a - 1:
        return Divided(rank - 2 if len(b.size) > 1 else rank - 1, left.stretches, tags)
    if right is not None and len(b.size) > 1 and right.dim == inner_b + 1:
        return Divided(rank - 1, right.stretches, tags)
    state, other = (left, b) if left is not None else (right, a)
    if batched and state is not None:
        raise WantedError(f"{op.name} multiplies divided values with whole ones", other, 0, state.stretches)
    raise RefusedError(f"{op.name} multiplies divided values along the divided dimension")


def attention(op: RawOp, states: States) -> list[State | None]:
    """Heads are divided alike in queries, keys and values; fewer heads of keys serve equal runs of queries."""
    query, key, value, *others = tensors_of((op.args, op.kwargs))
    given = [states.get(ref) for ref in (query, key, value)]
    heads = [d for d in given if isinstance(d, Divided) and d.dim == len(query.size) - 3]
    single = all(len(d.stretches) == 1 for d in heads) and len({d.stretches for d in heads[1:]}) == 1
    alike = len({d.stretches for d in heads}) == 1
    if len(heads) != 3:
        raise RefusedError("attention needs its heads divided in queries, keys and values alike")
    if not alike and not (single and heads[0].stretches[0] % heads[1].stretches[0] == 0):
        raise RefusedError("attention needs its heads divided in queries, keys and values alike")
    dim = heads[0].dim
    for mask in others:
        if len(mask.size) == 4 and mask.size[dim] != 1:
            given_mask = states.get(mask)
            if not isinstance(given_mask, Divided) or given_mask.place != heads[0].place:
                message = "attention adds a bias of its own to every head, which is whole"
                raise WantedError(message, mask, dim, heads[0].stretches)
    rate = op.kwargs.get("dropout_p", next((x for x in op.args if isinstance(x, float)), 0.0))
    if rate:
        raise RefusedError("attention draws random numbers (dropout), which would differ from one device's")
    tags = tags_of(states)
    return [Divided(dim, heads[0].stretches, tags), *(Divided(0, OPAQUE, tags) for _ in op.outputs[1:])]


def convolution(op: RawOp, states: States) -> list[State | None]:
    """Divided over output channels: weight and bias are, what enters is whole."""
    x, weight, *bias = tensors_of(op.args)[:3]
    transposed, groups = bool(op.args[6]), int(op.args[8])
    given = states.get(weight)
    if x in states or not isinstance(given, Divided) or groups != 1:
        raise RefusedError(f"{op.name} of divided channels is not known to be exact")
    if given.dim != int(transposed):
        raise RefusedError(f"{op.name} sums over divided channels")
    for ref in bias:
        if not isinstance(states.get(ref), Divided):
            raise WantedError(f"{op.name} adds a whole bias", ref, 0, given.stretches)
    return [Divided(len(op.outputs[0].size) - len(weight.size) + 1, given.stretches, tags_of(states))]


def embedding(op: RawOp, states: States) -> list[State | None]:
    """A table divided over its columns."""
    table = tensors_of(op.args)[0]
    given = states.get(table)
    if set(states) != {table} or not isinstance(given, Divided) or given.dim != 1:
        raise RefusedError(f"{op.name} looks up rows of a divided table")
    return [Divided(len(op.outputs[0].size) - 1, given.stretches, given.tags)]
