"""Border: tensors that cross from the glue into a unit's call and back.

On either side a tensor is new: a leaf of its own, so that each piece of the graph has a backward of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from weft.capture.blocks import same_value
from weft.capture.recording import TensorLeaf


class Enter(torch.autograd.Function):
    """A tensor of the same form in a storage of its own, and no leaf, so that in-place operations on it are allowed."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        return new if isinstance(tensor, FakeTensor) else new.copy_(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


@dataclass(frozen=True, slots=True)
class Again:
    """The tensor of an earlier argument."""

    place: int


def enter(tensor: Tensor, *, new: bool = False) -> tuple[Tensor, Tensor]:
    """A leaf that ends a piece of the graph, and the tensor to compute with. A ``new`` tensor becomes the leaf."""
    end = (tensor if new else tensor.detach()).requires_grad_()
    return end, Enter.apply(end)  # type: ignore[no-untyped-call] # untyped in torch


def entered(leaves: Sequence[Any]) -> tuple[list[Any], dict[int, Tensor]]:
    """Arguments to compute with, and by ``id`` of those that require a gradient the leaves that end the graph."""
    ends: dict[int, Tensor] = {}
    inside: dict[int, Tensor] = {}
    for leaf in leaves:
        if isinstance(leaf, Tensor) and id(leaf) not in inside:
            inside[id(leaf)] = leaf
            if leaf.requires_grad:
                ends[id(leaf)], inside[id(leaf)] = enter(leaf)
    return [inside[id(x)] if isinstance(x, Tensor) else x for x in leaves], ends


def gradients_of(
    roots: Sequence[Tensor], ends: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Run a piece's backward: gradients of the tensors it ends in, None for those nothing depends on."""
    if not ends:
        return ()
    return torch.autograd.grad(roots, ends, gradients, allow_unused=True)


def gradient_for(tensor: Tensor) -> Tensor:
    """A gradient that comes from elsewhere."""
    gradient = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return gradient if isinstance(tensor, FakeTensor) else gradient.zero_()


def form(leaf: Any) -> Any:
    """An argument as later ones are compared with it; the form of a tensor, anything else itself."""
    if isinstance(leaf, Tensor):
        return TensorLeaf(tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device.type, leaf.requires_grad)
    return leaf


def forms_of(leaves: Sequence[Any]) -> list[Any]:
    """The forms of arguments; of a tensor that is given again, where it was given first."""
    first: dict[int, int] = {}
    again = [isinstance(x, Tensor) and first.setdefault(id(x), i) != i for i, x in enumerate(leaves)]
    return [Again(first[id(x)]) if known else form(x) for x, known in zip(leaves, again, strict=True)]


def alike(recorded: Sequence[Any], leaves: Sequence[Any]) -> bool:
    """Whether arguments have the recorded forms."""
    return len(recorded) == len(leaves) and all(map(same_value, recorded, forms_of(leaves)))
