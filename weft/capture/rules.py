"""Rules: what an operation on local shares gives, operator by operator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection

import torch

from weft.capture.frames import RawOp
from weft.capture.products import attention, convolution, embedding, product
from weft.capture.sharding import (
    OPAQUE,
    CutError,
    Divided,
    OnceError,
    Partial,
    RefusedError,
    State,
    States,
    WantedError,
    argument,
    between,
    only,
    reshaped,
    tags_of,
    tensors_of,
)
from weft.capture.tape import Ref

Rule = Callable[[RawOp, States], list[State | None]]


def apply(op: RawOp, states: States, zeros: Collection[Ref] = ()) -> list[State | None]:
    """How the outputs of an operation are divided, given how its arguments are (at least one).

    Args:
        op: the operation.
        states: of its arguments; others are whole.
        zeros: whole arguments that are zero, to which partial values may be added.

    Raises:
        RefusedError: the result would not be exact.
    """
    if any(isinstance(s, Divided) and s.stretches == OPAQUE for s in states.values()):
        raise RefusedError(f"{op.name} reads a statistic of divided values")
    name = op.name.removeprefix("aten.")
    base = name if name in _RULES else name.removesuffix("_")
    if base in _PRODUCTS:
        return _PRODUCTS[base](op, states)
    if any(isinstance(s, Partial) for s in states.values()):
        return _partial(op, base, states, zeros)
    if base in _RULES:
        return _RULES[base](op, states)
    if torch.Tag.nondeterministic_seeded in op.func.tags:
        raise RefusedError(f"{op.name} draws random numbers, which would differ from one device's")
    if torch.Tag.pointwise in op.func.tags or base == "copy":
        return _pointwise(op, states)
    raise RefusedError(f"{op.name} is not known to be exact on divided values")


def _pointwise(op: RawOp, states: States) -> list[State | None]:
    out = op.outputs[0]
    places = {(d.dim - len(ref.size), d.stretches) for ref, d in states.items() if isinstance(d, Divided)}
    if len(places) > 1:
        raise RefusedError(f"{op.name} combines values divided on different dimensions")
    ((place, stretches),) = places
    for ref in tensors_of((op.args, op.kwargs)):
        size = ref.size[place] if len(ref.size) >= -place else 1
        if ref in states and size != out.size[place]:
            raise RefusedError(f"{op.name} repeats a divided dimension")
        if ref not in states and size != 1:
            message = f"{op.name} combines divided values with a whole tensor"
            raise WantedError(message, ref, len(ref.size) + place, stretches)
    state = Divided(len(out.size) + place, stretches, tags_of(states))
    return [state if len(ref.size) == len(out.size) else None for ref in op.outputs]


def _partial(op: RawOp, name: str, states: States, zeros: Collection[Ref]) -> list[State | None]:
    """What is linear may be done before the sum."""
    if not all(isinstance(s, Partial) for s in states.values()):
        raise RefusedError(f"{op.name} combines divided values with one whose sum is not made yet")
    first = next(iter(tensors_of(op.args)), None)
    result: list[State | None] = [Partial(tags_of(states)) for _ in op.outputs]
    if not all(ref.dtype.is_floating_point or ref.dtype.is_complex for ref in op.outputs):
        raise RefusedError(f"{op.name} rounds a value whose sum is not made yet")
    padded = name == "constant_pad_nd" and argument(op, 2, "value", 0)
    if name in _LINEAR and set(states) == {first} and not padded:
        return result
    if name == "div" and set(states) == {first} and not op.kwargs.get("rounding_mode"):
        return result
    if name == "mul" and len(states) == 1 and len([r for r in tensors_of(op.args) if r in states]) == 1:
        return result
    addends = {"add": 2, "sub": 2, "cat": None, "stack": None, "index_add": None, "copy": 2, "masked_fill": 1}
    if name in addends:
        summed = tensors_of(op.args[: addends[name]])
        if name in ("add", "sub") and len(summed) != 2:  # a number is as whole as a tensor
            summed = []
        if name == "index_add":
            summed = [summed[0], summed[-1]]
        if name == "copy":
            summed = summed[1:]
        if name == "masked_fill" and (argument(op, 2, "value") or first not in states):
            raise RefusedError(f"{op.name} writes into a value whose sum is not made yet")
        whole = [ref for ref in summed if ref not in states and ref not in zeros]
        if summed and not whole:
            return result
        if len(whole) == 1:
            raise OnceError(f"{op.name} adds a whole value to one whose sum is not made yet", whole[0])
    raise RefusedError(f"{op.name} works on a value whose sum is not made yet")


def _same(op: RawOp, states: States) -> list[State | None]:
    _, d = only(op, states)
    return [d for _ in op.outputs]


def _view(op: RawOp, states: States) -> list[State | None]:
    ref, d = only(op, states)
    return [reshaped(ref.size, d, op.outputs[0].size)]


def _permute(op: RawOp, states: States) -> list[State | None]:
    ref, d = only(op, states)
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


def _expand(op: RawOp, states: States) -> list[State | None]:
    ref, d = only(op, states)
    out = op.outputs[0]
    dim = d.dim + len(out.size) - len(ref.size)
    if out.size[dim] != ref.size[d.dim]:
        raise RefusedError(f"{op.name} repeats a divided dimension")
    return [d._replace(dim=dim)]


def _unsqueeze(op: RawOp, states: States) -> list[State | None]:
    ref, d = only(op, states)
    dim = int(op.args[1]) % (len(ref.size) + 1)
    return [d._replace(dim=d.dim + (dim <= d.dim))]


def _squeeze(op: RawOp, states: States) -> list[State | None]:
    ref, d = only(op, states)
    given = op.args[1] if len(op.args) > 1 else range(len(ref.size))
    dims = [given] if isinstance(given, int) else given
    gone = {int(x) % len(ref.size) for x in dims if ref.size[int(x)] == 1}
    return [d._replace(dim=d.dim - sum(x < d.dim for x in gone))]


def _along(op: RawOp, states: States) -> list[State | None]:
    """Operations along another dimension that keep its size or change it."""
    ref, d = only(op, states)
    position = {"constant_pad_nd": -1, "topk": 2, "index_select": 1}.get(op.name.removeprefix("aten."), 1)
    given = argument(op, position, "dim", -1 if "topk" in op.name or "sort" in op.name else 0)
    if position == -1:  # pads come in pairs, the last dimension's first
        pads = argument(op, 1, "pad")
        dims = [len(ref.size) - 1 - i // 2 for i, n in enumerate(pads) if n]
    else:
        dims = [int(x) % len(ref.size) for x in (given if isinstance(given, (list, tuple)) else [given])]
    if d.dim in dims:
        raise RefusedError(f"{op.name} runs along the divided dimension")
    return [d for _ in op.outputs]


def _split(op: RawOp, states: States) -> list[State | None]:
    ref, d = only(op, states)
    if int(argument(op, 2, "dim", 0)) % len(ref.size) != d.dim:
        return [d for _ in op.outputs]
    results: list[State | None] = []
    ends = [0]
    for out in op.outputs:
        ends.append(ends[-1] + out.size[d.dim])
    bounds = {0, *itertools.accumulate(d.stretches)}
    if cuts := [x for x in ends if x not in bounds]:
        raise CutError(f"{op.name} cuts the divided features: several projections are fused into one", ref, cuts)
    for start, end in itertools.pairwise(ends):
        results.append(d._replace(stretches=between(op, ref, d, start, end)))
    return results


def _slice(op: RawOp, states: States) -> list[State | None]:
    ref, d = only(op, states)
    if int(argument(op, 1, "dim", 0)) % len(ref.size) != d.dim:
        return [d for _ in op.outputs]
    size = ref.size[d.dim]
    start, end, step = argument(op, 2, "start"), argument(op, 3, "end"), int(argument(op, 4, "step", 1))
    first, last, _ = slice(start, end).indices(size)
    if step == 1:
        return [d._replace(stretches=between(op, ref, d, first, max(first, last)))]
    if first >= step or last != size or any(n % step for n in d.stretches):
        raise RefusedError(f"{op.name} skips unevenly through the divided dimension")
    return [d._replace(stretches=tuple(n // step for n in d.stretches))]


def _without(op: RawOp, states: States) -> list[State | None]:
    """Operations that take one dimension away: select, unbind."""
    ref, d = only(op, states)
    dim = int(argument(op, 1, "dim", 0)) % len(ref.size)
    if dim == d.dim:
        raise CutError(f"{op.name} takes the divided dimension apart", ref, range(1, ref.size[dim]))
    return [d._replace(dim=d.dim - (dim < d.dim)) for _ in op.outputs]


def _reduce(op: RawOp, states: States) -> list[State | None]:
    ref, d = only(op, states)
    name = op.name.removeprefix("aten.")
    given = argument(op, 2 if name == "linalg_vector_norm" or (name == "norm") else 1, "dim")
    dims = [given] if isinstance(given, int) else given
    if not dims or d.dim in (gone := {int(x) % len(ref.size) for x in dims}):
        raise RefusedError(f"{op.name} runs over the divided dimension")
    kept = len(op.outputs[0].size) == len(ref.size)
    return [d if kept else d._replace(dim=d.dim - sum(x < d.dim for x in gone)) for _ in op.outputs]


def _layer_norm(op: RawOp, states: States) -> list[State | None]:
    ref, d = only(op, states)
    if d.dim >= len(ref.size) - len(op.args[1]):
        raise RefusedError(f"{op.name} runs over the divided dimension")
    return [d if len(out.size) == len(ref.size) else Divided(0, OPAQUE, d.tags) for out in op.outputs]


def _batch_norm(op: RawOp, states: States) -> list[State | None]:
    """Every channel by itself; without scales and running statistics, as weights are standardized."""
    ref, d = only(op, states)
    if d.dim != 1 or len(tensors_of((op.args, op.kwargs))) > 1:
        raise RefusedError(f"{op.name} of divided channels has whole scales or statistics")
    return [d if out.size == ref.size else Divided(0, OPAQUE, d.tags) for out in op.outputs]


def _cat(op: RawOp, states: States) -> list[State | None]:
    rank = len(op.outputs[0].size)
    dim = int(argument(op, 1, "dim", 0)) % rank
    # An empty cache is no tensor to join.
    joined = [ref for ref in tensors_of(op.args[0]) if math.prod(ref.size)]
    given = [d for ref in joined if isinstance(d := states.get(ref), Divided)]
    if len(given) != len(joined) or len({d.dim for d in given}) > 1:
        raise RefusedError(f"{op.name} joins divided and whole tensors")
    place = given[0].dim
    if op.name == "aten.cat" and place == dim:
        return [Divided(dim, tuple(n for d in given for n in d.stretches), tags_of(states))]
    if len({d.stretches for d in given}) > 1:
        raise RefusedError(f"{op.name} joins tensors that are divided differently")
    return [Divided(place + (op.name == "aten.stack" and dim <= place), given[0].stretches, tags_of(states))]


def _repeat(op: RawOp, states: States) -> list[State | None]:
    ref, d = only(op, states)
    times = [int(x) for x in argument(op, 1, "repeats")]
    dim = d.dim + len(times) - len(ref.size)
    return [d._replace(dim=dim, stretches=d.stretches * times[dim])]


def _index(op: RawOp, states: States) -> list[State | None]:
    ref, d = only(op, states)
    if ref != tensors_of(op.args)[0]:
        raise RefusedError(f"{op.name} is given divided positions")
    indices = list(op.args[1])
    taken = [i for i, x in enumerate(indices) if x is not None]
    if d.dim in taken:
        raise RefusedError(f"{op.name} picks from the divided dimension")
    added = len(op.outputs[0].size) - len(ref.size) + len(taken)
    together = taken == list(range(taken[0], taken[-1] + 1))
    before = sum(x < d.dim for x in taken)
    ahead = added if not together or taken[0] < d.dim else 0
    return [d._replace(dim=d.dim - before + ahead)]


def _named(rule: Rule, names: str) -> dict[str, Rule]:
    return {name: rule for name in names.split()}


_PRODUCTS: dict[str, Rule] = _named(product, "mm addmm bmm baddbmm mv _grouped_mm")
_LINEAR = frozenset(
    (  # noqa: SIM905 # a table
        "clone _to_copy detach alias contiguous lift_fresh view _unsafe_view reshape permute t transpose expand "
        "unsqueeze squeeze slice split split_with_sizes chunk select unbind sum mean index index_select neg "
        "constant_pad_nd flip roll repeat"
    ).split()
)
_RULES: dict[str, Rule] = {
    **_named(
        _same,
        "clone _to_copy detach alias contiguous lift_fresh ones_like zeros_like empty_like full_like zero fill",
    ),
    **_named(_view, "view _unsafe_view reshape"),
    **_named(_permute, "permute t transpose"),
    **_named(_expand, "expand"),
    **_named(_unsqueeze, "unsqueeze"),
    **_named(_squeeze, "squeeze"),
    **_named(_slice, "slice"),
    **_named(_split, "split split_with_sizes chunk"),
    **_named(_along, "_softmax _safe_softmax _log_softmax cumsum constant_pad_nd flip sort topk logcumsumexp cumprod"),
    **_named(_without, "select unbind"),
    **_named(_reduce, "sum mean amax amin prod var var_mean std argmax any all logsumexp linalg_vector_norm norm max"),
    **_named(_layer_norm, "native_layer_norm _fused_rms_norm"),
    **_named(_batch_norm, "native_batch_norm"),
    **_named(_cat, "cat stack"),
    **_named(_repeat, "repeat"),
    **_named(_index, "index"),
    **_named(convolution, "convolution"),
    **_named(embedding, "embedding"),
    **_named(
        attention,
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention",
    ),
}
