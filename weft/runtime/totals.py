"""Totals: what all ranks must agree on after the backwards: the global mean loss, the global gradient norm, tied
gradients.

The mean over the global batch is ``sum_m w_m loss_m`` with ``w_m`` the share of microbatch m's samples where the loss
is a mean, and ``sum_m sum_m / sum_m count_m`` where it is ``(sum, count)``. In the second case the gradients are
divided by the total count here, after they were reduced, since no rank knows it before.

The squared norm adds every element of the model's gradient once: a rank adds its own pieces, whole copies are added by
the first rank that holds one. Clipping is ``torch.nn.utils.clip_grad_norm_``'s: by ``max_norm / (norm + 1e-6)``, at
most 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from weft.runtime.grid import Grid
from weft.runtime.pipeline import Sums

DIVIDED = (Shard, _StridedShard)
"""Placements that give a rank a part; the second is fully_shard's over a dimension that tensor parallelism divides."""


@dataclass(frozen=True)
class Held:
    """A parameter this rank holds, whole or in part.

    Attributes:
        name: its first single-device name.
        parameter: the parameter or this rank's shard of it.
        groups: ranks that hold a copy whose gradient nothing else brings together: other stages' of tied weights, other
            replicas' of scalars that fully_shard does not take.
        first: whether this rank is the first of those that hold these elements.
    """

    name: str
    parameter: nn.Parameter
    groups: tuple[dist.ProcessGroup, ...]
    first: bool


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def holds_first(parameter: nn.Parameter, grid: Grid, *, first_stage: bool) -> bool:
    """Whether this rank is the first that holds these elements of a parameter."""
    divided = set()
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names or ()
        divided = {n for n, p in zip(names, parameter.placements, strict=True) if isinstance(p, DIVIDED)}
    copies = [d for d in ("dp_replicate", "dp_shard", "cp", "tp") if d not in divided]
    return first_stage and all(grid.index(d) == 0 for d in copies)


def align(held: list[Held]) -> None:
    """Give every divided gradient its parameter's placement; autograd leaves some as it made them (an embedding's)."""
    for entry in held:
        want, gradient = entry.parameter, entry.parameter.grad
        if isinstance(want, DTensor) and isinstance(gradient, DTensor) and gradient.placements != want.placements:
            want.grad = gradient.redistribute(placements=want.placements)


def sum_copies(held: list[Held]) -> None:
    """Sum the gradients of copies that nothing has brought together yet. One that no rank has stays None."""
    copied = [entry for entry in held if entry.groups and entry.parameter.requires_grad]
    for group in dict.fromkeys(group for entry in copied for group in entry.groups):
        entries = [entry for entry in copied if group in entry.groups]
        have = torch.tensor([float(e.parameter.grad is not None) for e in entries], device=entries[0].parameter.device)
        dist.all_reduce(have, group=group)
        for entry, number in zip(entries, have.tolist(), strict=True):
            if number:
                if entry.parameter.grad is None:
                    entry.parameter.grad = torch.zeros_like(entry.parameter)
                dist.all_reduce(local(entry.parameter.grad), group=group)


def agree(
    sums: Sums, held: list[Held], grid: Grid, *, adds_loss: bool, max_norm: float | None, want_norm: bool
) -> tuple[Tensor, Tensor | None]:
    """Make the gradients those of the global mean loss, clipped; one all-reduce over all ranks.

    Args:
        sums: of this rank's microbatches.
        held: this rank's trainable parameters.
        grid: the ranks.
        adds_loss: whether this rank's sums count (one rank per replica).
        max_norm: clip to this norm.
        want_norm: compute the norm even if nothing is clipped.

    Returns:
        The global mean loss and, if clipped or wanted, the gradient norm before clipping: float64 scalars.
    """
    gradients = [local(h.parameter.grad) for h in held if h.parameter.grad is not None]
    square = torch.zeros((), dtype=torch.float64, device=grid.device)
    normed = max_norm is not None or want_norm
    if normed:
        mine = [local(h.parameter.grad) for h in held if h.first and h.parameter.grad is not None]
        if mine:
            square = torch.stack([norm.double() for norm in torch._foreach_norm(mine)]).square().sum()
    nothing = torch.zeros_like(square)
    vector = torch.stack([sums.loss if adds_loss else nothing, sums.count if adds_loss else nothing, square])
    if grid.mesh.size() > 1:
        dist.all_reduce(vector)
    loss, count, square = vector.unbind()
    factor = None
    if sums.counted:
        factor = count.reciprocal()
        loss = loss * factor
    norm = None
    if normed:
        norm = square.sqrt() if factor is None else square.sqrt() * factor
        if max_norm is not None:
            clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            factor = clip if factor is None else factor * clip
    if factor is not None and gradients:
        for dtype in {g.dtype for g in gradients}:
            torch._foreach_mul_([g for g in gradients if g.dtype == dtype], factor.to(dtype))
    return loss, norm
