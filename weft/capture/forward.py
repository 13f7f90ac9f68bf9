"""Forwards alone: what inference computes, recorded and profiled in the way of a loss.

A model that is not trained is in evaluation mode and none of its parameters asks for a gradient, so nothing is kept for
a backward. The recorder wants a loss: ``as_loss`` gives it one that depends on all that a function returns and costs
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from weft.containers import opened
from weft.errors import ModelError
from weft.workload import Loss

Function = Callable[[nn.Module, Any], Any]


def as_loss(function: Function) -> Callable[[nn.Module, Any], Loss]:
    """A loss that depends on every tensor that a function of a model and a batch returns.

    Raises:
        ModelError: when it is called: the function returned no tensor.
    """

    def loss(model: nn.Module, batch: Any) -> Loss:
        tensors = [leaf for leaf in tree_leaves(opened(function(model, batch))) if isinstance(leaf, Tensor)]
        if not tensors:
            raise ModelError("predict(model, batch) returned no tensor; return one, or a tuple or dict of them")
        first = [tensor.flatten()[:1].to(torch.float32).sum() for tensor in tensors]
        return torch.stack(first).sum()

    return loss


def evaluated(model: nn.Module) -> nn.Module:
    """The model as inference has it, changed in place: in evaluation mode, no parameter asking for a gradient."""
    return model.eval().requires_grad_(False)
