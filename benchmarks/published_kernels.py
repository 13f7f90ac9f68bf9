"""Kernels that training frameworks fuse, each as one operator, so that what ran as one pass is counted as one.

Megatron-LM, Transformer Engine, Triton and torch.compile run a norm, a gate, a rotation, or dropout with the addition
that follows, as a kernel that reads its arguments once and writes its results. Spelled out in PyTorch's operators they
would be up to ten passes. The operators here compute the same, on any device and without being fast: they are there to
be recorded on fake tensors, and run for real only in tests.

Operators that work element by element are tagged so, which lets tensor parallelism divide what goes through them. That
holds for dropout of attention's weights as well: frameworks draw it from a generator of each rank's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPSILON = 1e-5
_LIBRARY = torch.library.Library("published", "DEF")


def _operator(schema: str, compute: Callable[..., Any], *, pointwise: bool = True) -> Any:
    """Registers an operator that ``compute`` computes, on fake tensors too."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pointwise,) if pointwise else ())
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"published::{name}", compute)
    return getattr(torch.ops.published, name).default


def _keep(x: Tensor, p: float) -> Tensor:
    return torch.rand_like(x, dtype=torch.float32) >= p


def _drop(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    mask = _keep(x, p)
    return x * mask / (1 - p), mask


def _drop_add(x: Tensor, residual: Tensor, p: float) -> tuple[Tensor, Tensor]:
    mask = _keep(x, p)
    return residual + x * mask / (1 - p), mask


def _normed(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPSILON)
    return (x * scale).to(x.dtype) * weight, scale


def _normed_back(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    unit, g = x.float() * scale, grad.float() * weight.float()
    back = scale * (g - unit * (g * unit).mean(-1, keepdim=True))
    return back.to(x.dtype), (grad.float() * unit).flatten(0, -2).sum(0).to(weight.dtype)


def _surprised(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().logsumexp(-1)
    return scale - x.gather(-1, labels.unsqueeze(-1)).squeeze(-1).float(), scale


def _surprised_back(grad: Tensor, x: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    share = (x.float() - scale.unsqueeze(-1)).exp()
    one = torch.full_like(labels, -1, dtype=share.dtype).unsqueeze(-1)
    return (share.scatter_add(-1, labels.unsqueeze(-1), one) * grad.unsqueeze(-1)).to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    one, two = x.float().chunk(2, -1)
    sin = sign * sin
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1).to(x.dtype)


def _gated_back(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(gate.float())
    back = grad.float() * up.float() * s * (1 + gate.float() * (1 - s))
    return back.to(gate.dtype), (grad.float() * gate.float() * s).to(up.dtype)


_dropout = _operator("dropout(Tensor x, float p) -> (Tensor, Tensor)", _drop)
_dropout_add = _operator("dropout_add(Tensor x, Tensor residual, float p) -> (Tensor, Tensor)", _drop_add)
_dropout_back = _operator(
    "dropout_backward(Tensor grad, Tensor mask, float p) -> Tensor", lambda grad, mask, p: grad * mask / (1 - p)
)
_norm = _operator("rms_norm(Tensor x, Tensor weight) -> (Tensor, Tensor)", _normed, pointwise=False)
_norm_back = _operator(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> (Tensor, Tensor)",
    _normed_back,
    pointwise=False,
)
_rotate = _operator("rotate(Tensor x, Tensor cos, Tensor sin, float sign) -> Tensor", _rotated)
_surprise = _operator("entropy(Tensor x, Tensor labels) -> (Tensor, Tensor)", _surprised, pointwise=False)
_surprise_back = _operator(
    "entropy_backward(Tensor grad, Tensor x, Tensor labels, Tensor scale) -> Tensor", _surprised_back, pointwise=False
)
_gate = _operator("gate(Tensor gate, Tensor up) -> Tensor", lambda gate, up: torch.nn.functional.silu(gate) * up)
_gate_back = _operator("gate_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)", _gated_back)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        out, mask = _dropout(x, p)
        ctx.save_for_backward(mask)
        ctx.p = p
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _dropout_back(grad, *ctx.saved_tensors, ctx.p), None


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, p: float) -> Tensor:
        out, mask = _dropout_add(x, residual, p)
        ctx.save_for_backward(mask)
        ctx.p = p
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return _dropout_back(grad, *ctx.saved_tensors, ctx.p), grad, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        out, scale = _norm(x, weight)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _norm_back(grad, *ctx.saved_tensors)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rotate(grad, *ctx.saved_tensors, -1.0), None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gate(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _gate_back(grad, *ctx.saved_tensors)


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        x = logits.to(torch.float32, copy=True)
        x.sub_(x.amax(-1, keepdim=True))
        picked = x.gather(-1, labels.unsqueeze(-1))
        x.exp_()
        total = x.sum(-1, keepdim=True)
        x.div_(total)
        ctx.save_for_backward(x, labels)
        ctx.dtype = logits.dtype
        return (total.log() - picked).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, labels = ctx.saved_tensors
        one = torch.full_like(labels, -1, dtype=x.dtype).unsqueeze(-1)
        x.scatter_add_(-1, labels.unsqueeze(-1), one)
        x.mul_(grad / labels.numel())
        return x.to(ctx.dtype), None


class _FusedEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        losses, scale = _surprise(logits, labels)
        ctx.save_for_backward(logits, labels, scale)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _surprise_back(grad, *ctx.saved_tensors), None


def fused_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in one pass forward and one backward, which keep no copy of the logits.

    Shapes: logits [..., V], labels [...].
    """
    return cast(Tensor, _FusedEntropy.apply(logits, labels)).mean()  # type: ignore[no-untyped-call]  # torch's


def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in float32 that works in place, as Megatron-LM's does: one float32 copy of the logits in all.

    Shapes: logits [..., V], labels [...].
    """
    return cast(Tensor, _Entropy.apply(logits, labels))  # type: ignore[no-untyped-call]  # torch's


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout that keeps a mask of a byte per element; ``x`` itself for ``p`` = 0."""
    return _Dropout.apply(x, p) if p else x


def dropout_add(x: Tensor, residual: Tensor, p: float) -> Tensor:
    """``residual + dropout(x)`` in one pass; a plain addition for ``p`` = 0."""
    return _DropoutAdd.apply(x, residual, p) if p else residual + x


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` over its root mean square along the last dimension, times ``weight``."""
    return _RMSNorm.apply(x, weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: the two halves of the last dimension of ``x`` turned by the angles of the tables, which
    broadcast against a half."""
    return _Rotate.apply(x, cos, sin)


def gate(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    return _Gate.apply(gate, up)
