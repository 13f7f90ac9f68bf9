"""Unused: arguments of a sharded unit that its results do not depend on have no gradient, as on one device.

fully_shard runs all arguments of a unit through one autograd function, which gives zeros back for those the backward
does not reach: what made them would go through its backward, and its parameters get gradients of zeros, on which weight
decay works. So the arguments are noted inside of that function, as they get gradients, and outside of it the others'
are taken away:

    caller ─► Outside ─► fully_shard's function ─► Inside ─► forward
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


class _Through(Function):
    @staticmethod
    def forward(ctx: Any, reached: set[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.reached = reached
        return tensors


class _Inside(_Through):
    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.reached.update(i for i, gradient in enumerate(gradients) if gradient is not None)
        return (None, *gradients)


class _Outside(_Through):
    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *(gradient if i in ctx.reached else None for i, gradient in enumerate(gradients)))


def leave_unused(module: FSDPModule) -> None:
    """Have arguments of a unit that fully_shard has wrapped get no gradient where they are not used."""
    reached: list[set[int]] = [set()]

    def outside(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reached[0] = set()
        return _through(_Outside, reached[0], args, kwargs)

    def inside(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _through(_Inside, reached[0], args, kwargs)

    assert isinstance(module, nn.Module)
    module.register_forward_pre_hook(outside, prepend=True, with_kwargs=True)
    module.register_forward_pre_hook(inside, with_kwargs=True)


def _through(function: type[_Through], reached: set[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of a call, those that need a gradient by way of a function."""
    leaves, spec = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not places or not torch.is_grad_enabled():
        return args, kwargs
    given = function.apply(reached, *(leaves[i] for i in places))  # type: ignore[no-untyped-call] # untyped in torch
    for place, tensor in zip(places, given, strict=True):
        leaves[place] = tensor
    return tree_unflatten(leaves, spec)
