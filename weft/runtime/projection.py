"""Projection: the forwards of modules that tensor parallelism divides, on this rank's share of their weights.

A module that is nothing but a product (``nn.Linear``, and what does the same under another name) is computed from its
weights, since its own code may hold whole sizes. Of any other module the own forward runs. A row projection adds its
bias after the sum over the ranks, once, so its product is made without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from weft.errors import PlanError
from weft.plan import TensorStyle
from weft.runtime.crossing import Crossing
from weft.runtime.division import Division

Forward = Callable[..., Any]

TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED_CONVOLUTIONS)


class Weights(NamedTuple):
    """What a projection multiplies by and adds.

    Attributes:
        weight, bias: names of its parameters; ``bias`` is "" where it has none.
        product: whether the module computes ``x @ weight + bias`` and nothing else.
        transposed: whether a product's weight is [in, out].
        channels: the dimension of its outputs that the weight makes.
    """

    weight: str
    bias: str
    product: bool
    transposed: bool
    channels: int


def weights_of(module: nn.Module, name: str, style: TensorStyle) -> Weights:
    """The weight and bias of a projection, and what it does with them.

    Raises:
        PlanError: it is no projection.
    """
    parameters = {key: p for key, p in module.named_parameters(recurse=False, remove_duplicate=False)}
    matrices = [key for key, p in parameters.items() if p.dim() > 1]
    others = [key for key, p in parameters.items() if p.dim() <= 1]
    convolution = isinstance(module, CONVOLUTIONS)
    if len(matrices) != 1 or len(others) > 1 or (parameters[matrices[0]].dim() != 2 and not convolution):
        raise PlanError(
            f"the plan divides {name} as {style.name}, but {type(module).__name__} is no projection of one weight; "
            "make the plan again"
        )
    weight, bias = matrices[0], others[0] if others else ""
    transposed = style.name.endswith("_transposed")
    if convolution:
        assert isinstance(module, CONVOLUTIONS)
        if transposed and not isinstance(module, TRANSPOSED_CONVOLUTIONS):
            raise PlanError(f"the plan divides {name} as {style.name}, but its weight is [out, in]; plan again")
        return Weights(weight, bias, False, transposed, -1 - len(module.kernel_size))
    linear = type(module).forward is nn.Linear.forward and "forward" not in vars(module) and weight == "weight"
    plain = linear or _is_product(module, weight, bias, transposed)
    return Weights(weight, bias, plain, transposed, -1)


def column(module: nn.Module, weights: Weights, gathered: Division | None, crossing: Crossing) -> Forward:
    """The forward of a module divided over its outputs, which are gathered or stay this rank's share."""
    own = _product(module, weights) if weights.product else module.forward
    if isinstance(module, CONVOLUTIONS) and gathered and not gathered.length():
        own = _no_channels(module, weights, gathered)
    output = gathered.along(weights.channels) if gathered else None

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _entered(crossing, args, kwargs)
        result = own(*args, **kwargs)
        return result if output is None else crossing.gather(result, output)

    return forward


def row(module: nn.Module, weights: Weights, gathered: Division | None, crossing: Crossing) -> Forward:
    """The forward of a module divided over its inputs: this rank's share comes in, the sum goes out."""
    assert gathered is None
    own, key, slots = module.forward, weights.bias, module._parameters
    product = _product(module, weights._replace(bias="")) if weights.product else None
    shape = [-1, *[1] * (-1 - weights.channels)]

    def forward(*args: Any, **kwargs: Any) -> Any:
        bias = slots[key] if key else None
        if product is not None:
            partial = product(*args, **kwargs)
        elif bias is None:
            partial = own(*args, **kwargs)
        else:  # convolutions take None for a bias; other code is given zeros
            nothing = None if isinstance(module, CONVOLUTIONS) else torch.zeros_like(bias)
            with _instead(module, {key: nothing}):
                partial = own(*args, **kwargs)
        result = crossing.leave(partial)
        return result if bias is None else result + bias.to(result.dtype).view(shape)

    return forward


def embedding(module: nn.Embedding, division: Division, crossing: Crossing) -> Forward:
    """The forward of an embedding divided over its rows: others' rows are zero, then all are summed."""
    ((start, end),) = division.stretches()

    def look_up(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
        if start == end:  # more ranks than rows: part of the sum all the same, with a gradient
            return crossing.leave(weight.new_zeros(*ids.shape, weight.shape[1]) + weight.sum())
        elsewhere = (ids < start) | (ids >= end)
        local = (ids - start).masked_fill(elsewhere, 0)
        padding = padding_idx - start if padding_idx is not None and start <= padding_idx < end else None
        rows = F.embedding(local, weight, padding).masked_fill(elsewhere.unsqueeze(-1), 0)
        return crossing.leave(rows)

    if type(module).forward is nn.Embedding.forward:

        def forward(input: Tensor) -> Tensor:
            return look_up(input, module.weight, module.padding_idx)

        return forward
    own = module.forward

    class LookUp(TorchFunctionMode):
        """The module's own code runs, but for the look-up in its table."""

        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func is F.embedding and args[1] is module.weight:
                return look_up(args[0], args[1], args[2] if len(args) > 2 else (kwargs or {}).get("padding_idx"))
            return func(*args, **(kwargs or {}))

    def forward_of_its_own(*args: Any, **kwargs: Any) -> Any:
        with LookUp():
            return own(*args, **kwargs)

    return forward_of_its_own


def reduced(own: Forward, crossing: Crossing) -> Forward:
    """A forward whose floating-point results are partial: they are summed."""

    def leave(value: Any) -> Any:
        return crossing.leave(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _entered(crossing, args, kwargs)
        return tree_map(leave, own(*args, **kwargs))

    return forward


def without(module: nn.Module, key: str) -> Forward:
    """A forward in which a parameter is zero, and has a gradient of zero: another rank counts it."""
    own: Forward = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _instead(module, {key: getattr(module, key) * 0}):
            return own(*args, **kwargs)

    return forward


@contextmanager
def _instead(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> Iterator[None]:
    """Other tensors in the place of a module's parameters, for a moment."""
    slots: dict[str, Any] = module._parameters
    before = {key: slots[key] for key in tensors}
    slots.update(tensors)
    try:
        yield
    finally:
        slots.update(before)


def _no_channels(module: nn.Module, weights: Weights, division: Division) -> Forward:
    """A convolution where there are more ranks than outputs: none have fallen to this rank, and kernels refuse that."""
    own, slots = module.forward, module._parameters

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        mine = {key: p for key in (weights.weight, weights.bias) if key and (p := slots[key]) is not None}
        shapes = {key: list(p.shape) for key, p in mine.items()}
        shapes[weights.weight][division.dim] = 1
        if weights.bias:
            shapes[weights.bias][0] = 1
        with _instead(module, {key: p.new_zeros(shapes[key]) for key, p in mine.items()}):
            result: Tensor = own(*args, **kwargs).narrow(weights.channels, 0, 0)
        for p in mine.values():  # every rank has the gradients, if only of nothing
            result = result + p.sum()
        return result

    return forward


def _entered(crossing: Crossing, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    def enter(value: Any) -> Any:
        return crossing.enter(value) if isinstance(value, Tensor) else value

    return tree_map(enter, (args, kwargs))  # type: ignore[no-any-return]  # of the same structure


def _product(module: nn.Module, weights: Weights) -> Forward:
    slots, transposed = module._parameters, weights.transposed

    def product(x: Tensor) -> Tensor:
        weight = slots[weights.weight]
        assert weight is not None
        return F.linear(x, weight.t() if transposed else weight, slots[weights.bias] if weights.bias else None)

    return product


VIEWS = frozenset({"t", "view", "_unsafe_view", "reshape", "transpose", "permute", "alias", "detach", "expand"})


def _is_product(module: nn.Module, weight: str, bias: str, transposed: bool) -> bool:
    """Whether a forward is one multiplication by the weight and one addition of the bias, seen on ``meta`` tensors."""
    matrix = module._parameters[weight]
    assert matrix is not None
    given = torch.empty(2, matrix.shape[0 if transposed else 1], dtype=matrix.dtype, device=matrix.device)
    seen: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            seen.append((func.overloadpacket.__name__, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    try:
        with torch.no_grad(), Watch():  # type: ignore[no-untyped-call]  # torch's
            result = module.forward(given)
    except Exception:  # whatever the user's code raises: it is no plain product then
        return False
    if not isinstance(result, Tensor):
        return False
    if not any(arg is matrix for _, args, _ in seen for arg in args):
        return False  # it multiplies by something made of its weight
    work = [(name, args, kwargs) for name, args, kwargs in seen if name not in VIEWS]
    addend = module._parameters[bias] if bias else None
    match [name for name, _, _ in work]:
        case ["mm"]:
            return addend is None
        case ["addmm"]:
            return addend is not None and work[0][1][0] is addend and not work[0][2]
        case ["mm", "add"]:
            return addend is not None and any(arg is addend for arg in work[1][1]) and not work[1][2]
    return False
