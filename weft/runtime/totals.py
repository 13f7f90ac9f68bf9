"""Totals: what all ranks must agree on after the backwards: the global mean loss, the global gradient norm, tied
gradients.

The mean over the global batch is ``sum_m w_m loss_m`` with ``w_m`` the share of microbatch m's samples where the loss
is a mean, and ``sum_m sum_m / sum_m count_m`` where it is ``(sum, count)``. In the second case the gradients are
divided by the total count here, after they were reduced, since no rank knows it before.

The squared norm adds every element of the model's gradient once: a rank adds its own pieces, whole copies are added by
the first rank that holds one. Clipping is ``torch.nn.utils.clip_grad_norm_``'s: by ``max_norm / (norm + 1e-6)``, at
most 1. A NaN or an infinity anywhere makes the norm one, so that this one pass and this one all-reduce also tell every
rank whether the step's numbers are finite (gradients so large that their square is none count as infinite).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.runtime.division import Division
from weft.runtime.dtensor import cuts, is_dtensor, local
from weft.runtime.grid import Grid
from weft.runtime.pipeline import Sums
from weft.runtime.scaling import LossScale
from weft.runtime.stopwatch import Stopwatch


@dataclass(frozen=True)
class Held:
    """A parameter this rank holds, whole or in part.

    Attributes:
        name: its first single-device name.
        parameter: the parameter or this rank's shard of it.
        groups: ranks whose gradients of it nothing else adds up: other stages' of tied weights, other replicas' of
            scalars that fully_shard does not take, the tensor-parallel group's of a whole parameter that works on
            divided values.
        first: whether this rank is the first of those that hold these elements.
    """

    name: str
    parameter: nn.Parameter
    groups: tuple[dist.ProcessGroup, ...]
    first: bool


class Agreed(NamedTuple):
    """What all ranks know of a step.

    Attributes:
        loss: the global mean, a float64 scalar.
        norm: of the gradients before clipping, a float64 scalar; None where nothing asked for it.
        finite: whether loss and, where there is one, norm are finite: a boolean scalar on the device.
    """

    loss: Tensor
    norm: Tensor | None
    finite: Tensor


def holds_first(parameter: nn.Parameter, division: Division | None, grid: Grid, *, first_stage: bool) -> bool:
    """Whether this rank is the first that holds these elements of a parameter."""
    divided = {"tp"} if division else set()
    if is_dtensor(parameter):
        names = parameter.device_mesh.mesh_dim_names or ()
        divided |= {names[dimension] for dimension in cuts(parameter)}
    copies = [d for d in ("dp_replicate", "dp_shard", "cp", "tp") if d not in divided]
    return first_stage and all(grid.index(d) == 0 for d in copies)


def sum_copies(held: list[Held]) -> None:
    """Sum the gradients of copies that nothing has brought together yet; one that no copy has stays None.

    Those of one group travel together, with a count for each of the copies that have a gradient. Groups are met in the
    order of the model's parameters, which is the same everywhere.
    """
    for depth in range(max((len(entry.groups) for entry in held), default=0)):
        together: dict[tuple[dist.ProcessGroup, torch.dtype], list[Held]] = {}
        for entry in held:
            if depth < len(entry.groups) and entry.parameter.requires_grad:
                together.setdefault((entry.groups[depth], entry.parameter.dtype), []).append(entry)
        for (group, _), entries in together.items():
            sum_together(entries, group)


def sum_together(entries: list[Held], group: dist.ProcessGroup) -> None:
    """Sum the gradients of some parameters over a group, in one all-reduce."""
    gradients = [entry.parameter.grad for entry in entries]
    pieces = [
        local(entry.parameter).detach() if g is None else local(g) for entry, g in zip(entries, gradients, strict=True)
    ]
    counts = torch.tensor([float(g is not None) for g in gradients], dtype=pieces[0].dtype, device=pieces[0].device)
    flat = torch.cat([*(piece.flatten() for piece in pieces), counts])
    start = 0
    for gradient, piece in zip(gradients, pieces, strict=True):
        if gradient is None:
            flat[start : start + piece.numel()].zero_()
        start += piece.numel()
    dist.all_reduce(flat, group=group)
    made = [1.0] * len(pieces) if all(g is not None for g in gradients) else flat[-len(pieces) :].tolist()
    start = 0
    for entry, gradient, piece, there in zip(entries, gradients, pieces, made, strict=True):
        total = flat[start : start + piece.numel()].view(piece.shape)
        start += piece.numel()
        if gradient is not None:
            local(gradient).copy_(total)
        elif there:
            entry.parameter.grad = torch.zeros_like(entry.parameter)
            local(entry.parameter.grad).copy_(total)


def agree(
    sums: Sums,
    held: list[Held],
    grid: Grid,
    *,
    adds_loss: bool,
    max_norm: float | None,
    want_norm: bool,
    scale: LossScale | None = None,
    stopwatch: Stopwatch,
) -> Agreed:
    """Make the gradients those of the global mean loss, clipped; one all-reduce over all ranks.

    Args:
        sums: of this rank's microbatches.
        held: this rank's trainable parameters.
        grid: the ranks.
        adds_loss: whether this rank's sums count (one rank per replica).
        max_norm: clip to this norm.
        want_norm: compute the norm even if nothing is clipped; without one, only the loss is looked at.
        scale: the losses were multiplied by it; it is told whether the gradients are finite everywhere.
        stopwatch: told of waiting for the other ranks.
    """
    gradients = [local(h.parameter.grad) for h in held if h.parameter.grad is not None]
    normed = max_norm is not None or want_norm or scale is not None
    mine = [local(h.parameter.grad) for h in held if normed and h.first and h.parameter.grad is not None]
    square = squared_norm(mine, grid.device)
    nothing = torch.zeros_like(square)
    vector = torch.stack([sums.loss if adds_loss else nothing, sums.count if adds_loss else nothing, square])
    if grid.mesh.size() > 1:
        with stopwatch.time("waiting"):
            dist.all_reduce(vector)
    loss, count, square = vector.unbind()
    factor = None
    if sums.counted:
        factor = count.reciprocal()
        loss = loss * factor
    if scale is not None:
        factor = (torch.ones_like(loss) if factor is None else factor) / scale.value
        scale.settle(bool(square.isfinite()))
    norm = None
    if normed:
        norm = square.sqrt() if factor is None else square.sqrt() * factor
        if max_norm is not None:
            clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            factor = clip if factor is None else factor * clip
    if factor is not None and gradients:
        for dtype in {g.dtype for g in gradients}:
            torch._foreach_mul_([g for g in gradients if g.dtype == dtype], factor.to(dtype))
    return Agreed(loss, norm, loss.isfinite() & square.isfinite())


def squared_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of the squares of some gradients, in one pass over each: a float64 scalar."""
    norms: list[Tensor] = []
    for dtype in dict.fromkeys(g.dtype for g in gradients):
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
        norms += torch._foreach_norm([g for g in gradients if g.dtype == dtype], 2, wide)
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([norm.double() for norm in norms]).square().sum()
