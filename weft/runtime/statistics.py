"""Statistics over the batch: a normalisation that takes them from the batch takes them from every replica's.

One device normalises over its batch in one piece. So the m-th microbatches of all replicas are normalised together:
each rank takes mean and squared deviations of its own rows, the ranks exchange them with the number of rows, and the
exact statistics of all rows come of it (Chan, Golub, LeVeque 1979)::

    n = sum n_i      mean = sum n_i mean_i / n      s = sum s_i + n_i (mean_i - mean)^2      var = s / n

In the backward the two sums over the rows that the gradient holds are summed over the replicas likewise. A stand-in
sample has no rows: it is normalised, and counts nowhere. Several microbatches are several pieces: their statistics are
their own, and the running ones are updated once for each.

Any call of ``F.batch_norm`` in training is met here, whichever module makes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

LOW = (torch.float16, torch.bfloat16)


class BatchStatistics(TorchFunctionMode):
    """While active, normalisations in training go over the rows of all ranks of a group.

    Args:
        group: the replicas of this stage; None where there is one.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.group = group
        self._counts = True

    @contextmanager
    def of(self, *, counts: bool) -> Iterator[None]:
        """Meet the normalisations of a microbatch inside the block; one that does not count is a stand-in."""
        self._counts = counts
        with self:
            yield

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Exchange normalisations in training."""
        kwargs = kwargs or {}
        if func is not F.batch_norm or not kwargs.get("training"):
            return func(*args, **kwargs)
        x = args[0]
        if isinstance(x, FakeTensor):  # it is another stage's: a shape is all that is asked for here
            return func(x, x.new_zeros(x.shape[1]), x.new_ones(x.shape[1]), **{**kwargs, "training": False})
        if self.group is None and self._counts:
            return func(*args, **kwargs)
        settings = {name: value for name, value in kwargs.items() if name != "training"}
        return normalise(*args, **settings, group=self.group, counts=self._counts)


@_disable_dynamo  # as torch.compiler.disable, but the compiler is imported when it is called, not when it is defined
def normalise(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    *,
    group: dist.ProcessGroup | None,
    counts: bool,
) -> Tensor:
    """``F.batch_norm`` in training over the rows of all ranks of a group.

    Args:
        x: [N, C, ...] or [N, C].
        running_mean, running_var, weight, bias, momentum, eps: as there.
        group: ranks to meet; None: this one alone.
        counts: whether the rows of ``x`` count.

    Raises:
        ValueError: there is one value per channel only, as there.
    """
    with torch.no_grad():
        mean, squares, rows = statistics(x.detach(), group, counts)
        if (not counts or x.numel() == x.shape[1]) and float(rows) == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        if running_mean is not None:
            running_mean.copy_(torch.lerp(running_mean, mean.to(running_mean.dtype), momentum))
        if running_var is not None:
            unbiased = squares / (rows - 1).clamp(min=1)
            running_var.copy_(torch.lerp(running_var, unbiased.to(running_var.dtype), momentum))
        scale = (squares / rows.clamp(min=1) + eps).rsqrt()
    out: Tensor = Normalisation.apply(x, weight, bias, mean, scale, rows, group, counts)  # type: ignore[no-untyped-call]  # torch's
    return out


def statistics(x: Tensor, group: dist.ProcessGroup | None, counts: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and summed squared deviations per channel, and the number of rows, over all ranks of a group."""
    if x.dtype in LOW:
        x = x.to(torch.float32)
    own = x.numel() // x.shape[1] if counts else 0
    if own:
        variance, mean = torch.var_mean(x, dim=rows_of(x), correction=0)
        mine = torch.cat([mean, variance * own, mean.new_full((1,), own)])
    else:
        mine = x.new_zeros(2 * x.shape[1] + 1)
    every = mine[None]
    if group is not None:
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group=group)
        every = torch.stack(parts)
    means, squares, rows = torch.split(every, [x.shape[1], x.shape[1], 1], dim=1)
    total = rows.sum()
    mean = (means * rows).sum(0) / total.clamp(min=1)
    return mean, (squares + rows * (means - mean).square()).sum(0), total


def rows_of(x: Tensor) -> list[int]:
    """Every dimension but the channels'."""
    return [d for d in range(x.dim()) if d != 1]


class Normalisation(torch.autograd.Function):
    """``(x - mean) * scale * weight + bias``, where mean and scale are those of the rows of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        rows: Tensor,
        group: dist.ProcessGroup | None,
        counts: bool,
    ) -> Tensor:
        """Normalise."""
        ctx.save_for_backward(x, weight, mean, scale, rows)
        ctx.group, ctx.counts = group, counts
        factor = scale if weight is None else scale * weight
        shift = -mean * factor if bias is None else bias - mean * factor
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        return torch.addcmul(shift.view(shape), x.to(mean.dtype), factor.view(shape)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the rows, the weight and the bias; the last two are this rank's share."""
        x, weight, mean, scale, rows = ctx.saved_tensors
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        g = gradient.to(mean.dtype)
        normal = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        sums = torch.stack([g.sum(rows_of(x)), (g * normal).sum(rows_of(x))])
        g_bias, g_weight = sums.unbind()
        g_x = None
        if ctx.needs_input_grad[0]:
            if ctx.group is not None:
                sums = sums.clone() if ctx.counts else torch.zeros_like(sums)
                dist.all_reduce(sums, group=ctx.group)
            if ctx.counts:
                of_mean, of_scale = (sums / rows).unbind()
                g = g - of_mean.view(shape) - normal * of_scale.view(shape)
            factor = scale if weight is None else scale * weight
            g_x = (g * factor.view(shape)).to(x.dtype)
        return (
            g_x,
            g_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            g_bias.to(gradient.dtype if weight is None else weight.dtype) if ctx.needs_input_grad[2] else None,
            *(None,) * 5,
        )
