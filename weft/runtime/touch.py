"""Touch: sharded parameters that a unit leaves aside in this step (experts no row goes to) get gradients of zeros.

Replicas reduce the gradients of a unit's parameters in one piece, so all must have the same ones, whichever rows each
of them saw. After the reduction, what is zero everywhere was left aside by all, and has no gradient: as on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.capture.trees import flatten, unflatten
from weft.runtime.dtensor import local
from weft.runtime.grid import Grid


class Touch(torch.autograd.Function):
    """Gives a tensor on; to parameters it gives gradients of zeros."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *parameters: Tensor) -> Tensor:
        """The tensor itself."""
        ctx.save_for_backward(*parameters)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """The tensor's gradient as it comes."""
        return (gradients[0], *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors))


def touch(output: Any, module: nn.Module) -> Any:
    """What a unit returns, made to depend on all its trainable parameters."""
    leaves, tree = flatten(output)
    parameters = [p for p in module.parameters() if p.requires_grad]
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaves[place] = Touch.apply(leaf, *parameters)  # type: ignore[no-untyped-call] # untyped in torch
            return unflatten(leaves, tree)
    return output


def forget_untouched(parameters: Sequence[nn.Parameter], grid: Grid) -> None:
    """Take the gradient away that is zero on every rank of a group of replicas; all of them call it."""
    if not parameters:
        return
    gradients = [p.grad for p in parameters]
    parts = [None if g is None else local(g) for g in gradients]
    flags = [bool(part is not None and part.any()) for part in parts]
    used = torch.tensor(flags, dtype=torch.int32, device=grid.device)
    for dimension in ("dp_replicate", "dp_shard"):
        if grid.degree(dimension) > 1:
            dist.all_reduce(used, op=dist.ReduceOp.MAX, group=grid.group(dimension))
    for parameter, flag in zip(parameters, used.tolist(), strict=True):
        if not flag:
            parameter.grad = None
