"""How a divided dimension travels through operations: the exact rules tensor parallelism rests on.

A value is divided on one dimension: ``outer`` repeats of a run of which each rank has an equal, contiguous share.
    Rules say
what an operation on the local shares gives: the same share of its whole result, or nothing that is exact (Refused).
    They
need no rank and no degree, only the sizes the degree has to divide, which they collect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from weft.capture.frames import RawOp
from weft.capture.tape import Ref


class Divided(NamedTuple):
    """A value divided on dimension ``dim``, in each of ``outer`` equal stretches of it; ``tags`` tell by which
    projections."""

    dim: int
    outer: int
    tags: frozenset[int]


class RefusedError(Exception):
    """An operation that is not exact on shares; the message says why, in a few words."""


OPAQUE = -1
"""``outer`` of a result that is divided in a way nothing may build on (attention's softmax statistics)."""

Rule = Callable[[RawOp, dict[Ref, Divided]], list[Divided | None]]


def apply(op: RawOp, divided: dict[Ref, Divided], biases: frozenset[Ref]) -> list[Divided | None]:
    """How the outputs of an operation are divided, given its divided arguments (at least one).

    Args:
        op: the operation; no projection.
        divided: its divided arguments.
        biases: whole arguments that may be divided along: biases of the projections the values come from.

    Raises:
        RefusedError: the result would not be exact.
    """
    if any(d.outer == OPAQUE for d in divided.values()):
        raise RefusedError(f"{op.name} reads a statistic of divided values")
    for ref in op.gradients:
        if ref not in divided and ref not in biases:
            raise RefusedError(f"{op.name} combines divided values with a whole one, whose gradient would be partial")
    name = op.name.removeprefix("aten.")
    if name in _RULES:
        return _RULES[name](op, divided)
    if torch.Tag.nondeterministic_seeded in op.func.tags:
        raise RefusedError(f"{op.name} draws random numbers, which would differ from one device's")
    if torch.Tag.pointwise in op.func.tags:
        return _pointwise(op, divided, biases)
    raise RefusedError(f"{op.name} is not known to be exact on divided values")


def tensors_of(value: Any) -> list[Ref]:
    """Refs in the arguments of an operation, in order."""
    if isinstance(value, Ref):
        return [value]
    if isinstance(value, dict):
        return [ref for x in value.values() for ref in tensors_of(x)]
    if isinstance(value, (list, tuple)):
        return [ref for x in value for ref in tensors_of(x)]
    return []


def _pointwise(op: RawOp, divided: dict[Ref, Divided], biases: frozenset[Ref]) -> list[Divided | None]:
    out = op.outputs[0]
    places = {(d.dim - len(ref.size), d.outer) for ref, d in divided.items()}
    if len(places) > 1:
        raise RefusedError(f"{op.name} combines values divided on different dimensions")
    ((place, outer),) = places
    for ref in tensors_of((op.args, op.kwargs)):
        size = ref.size[place] if len(ref.size) >= -place else 1
        if ref in divided and size != out.size[place]:
            raise RefusedError(f"{op.name} repeats a divided dimension")
        if ref not in divided and ref not in biases and size != 1:
            raise RefusedError(f"{op.name} combines divided values with a whole tensor")
    dim = len(out.size) + place
    return [Divided(dim, outer, _tags(divided)) if len(ref.size) == len(out.size) else None for ref in op.outputs]


def _same(op: RawOp, divided: dict[Ref, Divided]) -> list[Divided | None]:
    (d,) = divided.values()
    return [d for _ in op.outputs]


def _view(op: RawOp, divided: dict[Ref, Divided]) -> list[Divided | None]:
    ((ref, d),) = divided.items()
    return [_reshaped(ref.size, d, op.outputs[0].size)]


def _reshaped(before: Sequence[int], d: Divided, after: Sequence[int]) -> Divided:
    """Elements keep their order, so the divided run starts after the same number of repeats in both shapes."""
    start = math.prod(before[: d.dim]) * d.outer
    for dim, size in enumerate(after):
        ahead = math.prod(after[:dim])
        if ahead <= start < ahead * size and start % ahead == 0 and size % (start // ahead) == 0:
            return Divided(dim, start // ahead, d.tags)
    raise RefusedError(f"a reshape from {tuple(before)} to {tuple(after)} splits the divided dimension unevenly")


def _permute(op: RawOp, divided: dict[Ref, Divided]) -> list[Divided | None]:
    ((ref, d),) = divided.items()
    order = list(range(len(ref.size)))
    match op.name:
        case "aten.permute":
            order = [int(x) % len(order) for x in op.args[1]]
        case "aten.t":
            order.reverse()
        case _:
            a, b = int(op.args[1]) % len(order), int(op.args[2]) % len(order)
            order[a], order[b] = order[b], order[a]
    return [d._replace(dim=order.index(d.dim))]


def _expand(op: RawOp, divided: dict[Ref, Divided]) -> list[Divided | None]:
    ((ref, d),) = divided.items()
    out = op.outputs[0]
    dim = d.dim + len(out.size) - len(ref.size)
    if out.size[dim] != ref.size[d.dim]:
        raise RefusedError("expand repeats a divided dimension")
    return [d._replace(dim=dim)]


def _unsqueeze(op: RawOp, divided: dict[Ref, Divided]) -> list[Divided | None]:
    ((ref, d),) = divided.items()
    dim = int(op.args[1]) % (len(ref.size) + 1)
    return [d._replace(dim=d.dim + (dim <= d.dim))]


def _squeeze(op: RawOp, divided: dict[Ref, Divided]) -> list[Divided | None]:
    ((ref, d),) = divided.items()
    given = op.args[1] if len(op.args) > 1 else range(len(ref.size))
    dims = [given] if isinstance(given, int) else given
    gone = {int(x) % len(ref.size) for x in dims if ref.size[int(x)] == 1}
    return [d._replace(dim=d.dim - sum(x < d.dim for x in gone))]


def _along(op: RawOp, divided: dict[Ref, Divided]) -> list[Divided | None]:
    """Operations along another dimension, which keep their shape or cut that one: slice, split, softmax, cumsum."""
    ((ref, d),) = divided.items()
    position = {"split": 2, "split_with_sizes": 2, "chunk": 2}.get(op.name.removeprefix("aten."), 1)
    given = op.args[position] if len(op.args) > position else op.kwargs.get("dim", 0)
    if int(given) % len(ref.size) == d.dim and [out.size for out in op.outputs] != [ref.size]:
        raise RefusedError(f"{op.name} cuts the divided features: several projections are fused into one")
    if int(given) % len(ref.size) == d.dim and "slice" not in op.name:
        raise RefusedError(f"{op.name} runs along the divided dimension")
    return [d for _ in op.outputs]


def _without(op: RawOp, divided: dict[Ref, Divided]) -> list[Divided | None]:
    """Operations that take one dimension away: select, unbind."""
    ((ref, d),) = divided.items()
    given = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
    dim = int(given) % len(ref.size)
    if dim == d.dim:
        raise RefusedError(f"{op.name} takes the divided dimension apart")
    return [d._replace(dim=d.dim - (dim < d.dim)) for _ in op.outputs]


def _reduce(op: RawOp, divided: dict[Ref, Divided]) -> list[Divided | None]:
    ((ref, d),) = divided.items()
    given = op.args[1] if len(op.args) > 1 else None
    dims = [given] if isinstance(given, int) else given
    if not dims or d.dim in (gone := {int(x) % len(ref.size) for x in dims}):
        raise RefusedError(f"{op.name} runs over the divided dimension")
    kept = len(op.outputs[0].size) == len(ref.size)
    return [d if kept else d._replace(dim=d.dim - sum(x < d.dim for x in gone)) for _ in op.outputs]


def _layer_norm(op: RawOp, divided: dict[Ref, Divided]) -> list[Divided | None]:
    ((ref, d),) = divided.items()
    if d.dim >= len(ref.size) - len(op.args[1]):
        raise RefusedError(f"{op.name} runs over the divided dimension")
    return [d for _ in op.outputs]


def _cat(op: RawOp, divided: dict[Ref, Divided]) -> list[Divided | None]:
    places = {(d.dim, d.outer) for d in divided.values()}
    rank = len(op.outputs[0].size)
    dim = int(op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)) % rank
    joined = {ref for ref in tensors_of(op.args[0]) if math.prod(ref.size)}  # an empty cache is no tensor to join
    if len(places) > 1 or joined != set(divided):
        raise RefusedError(f"{op.name} joins divided and whole tensors")
    ((place, outer),) = places
    if op.name == "aten.stack":
        place += dim <= place
    elif place == dim:
        raise RefusedError(f"{op.name} joins tensors along the divided dimension")
    return [Divided(place, outer, _tags(divided))]


def _bmm(op: RawOp, divided: dict[Ref, Divided]) -> list[Divided | None]:
    a, b = tensors_of(op.args)[-2:]
    left, right = divided.get(a), divided.get(b)
    if left and right and left.dim == right.dim == 0 and left.outer == right.outer and len(a.size) == 3:
        return [Divided(0, left.outer, _tags(divided))]
    raise RefusedError(f"{op.name} multiplies divided values along the divided dimension")


def _attention(op: RawOp, divided: dict[Ref, Divided]) -> list[Divided | None]:
    query, key, value, *others = tensors_of((op.args, op.kwargs))
    states = {divided.get(ref) and (divided[ref].dim, divided[ref].outer) for ref in (query, key, value)}
    if states not in ({(1, 1)}, {(0, 1)}):
        raise RefusedError("attention needs its heads divided in queries, keys and values alike")
    ((dim, _),) = (s for s in states if s)
    if any(len(mask.size) == 4 and mask.size[dim] != 1 for mask in others):
        raise RefusedError("attention adds a bias of its own to every head, which is whole")
    rate = op.kwargs.get("dropout_p", next((x for x in op.args if isinstance(x, float)), 0.0))
    if rate:
        raise RefusedError("attention draws random numbers (dropout), which would differ from one device's")
    statistic = Divided(0, OPAQUE, _tags(divided))
    return [Divided(dim, 1, _tags(divided)), *(statistic for _ in op.outputs[1:])]


def _tags(divided: dict[Ref, Divided]) -> frozenset[int]:
    return frozenset[int]().union(*(d.tags for d in divided.values()))


def _named(rule: Rule, names: str) -> dict[str, Rule]:
    return {name: rule for name in names.split()}


_RULES: dict[str, Rule] = {
    **_named(_same, "clone _to_copy detach alias contiguous lift_fresh ones_like zeros_like empty_like full_like"),
    **_named(_view, "view _unsafe_view reshape"),
    **_named(_permute, "permute t transpose"),
    **_named(_expand, "expand"),
    **_named(_unsqueeze, "unsqueeze"),
    **_named(_squeeze, "squeeze"),
    **_named(_along, "slice split split_with_sizes chunk _softmax _safe_softmax _log_softmax cumsum"),
    **_named(_without, "select unbind"),
    **_named(_reduce, "sum mean amax amin prod var std argmax any all"),
    **_named(_layer_norm, "native_layer_norm"),
    **_named(_cat, "cat stack"),
    **_named(_bmm, "bmm"),
    **_named(
        _attention,
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention",
    ),
}
