"""Parts of published models: norms, rotary positions, attention, plain and expert MLPs.

Activations are batch first where attention is one kernel, and sequence first where it is not, as Megatron-LM has them,
so that no product needs a copy. Two simplifications that no cost depends on: the scale and mask of unfused attention,
which its softmax kernel applies on its way, are left out; and experts get equal numbers of tokens whatever the router
says, since shapes must not depend on values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from published_kernels import dropout, gate, rms_norm, rotate
from published_run import Latent, Shape
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """One kernel, or PyTorch's own composition of operators."""

    def __init__(self, size: int, fused: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., size) to the same."""
        return rms_norm(x, self.weight) if self.fused else F.rms_norm(x, self.weight.shape, self.weight, 1e-5)


def norm_of(shape: Shape, size: int | None = None) -> nn.Module:
    """The model's kind of norm, of the hidden size or another."""
    size = size or shape.hidden
    return nn.LayerNorm(size) if shape.norm == "layer" else RMSNorm(size, shape.fused)


Angles = tuple[Tensor, Tensor]
"""Cosines and sines of rotary positions, (tokens, 1, half a head) or (tokens, 1, 1, half a head): one table for all."""

THETA = 10_000.0
"""Base of rotary positions."""


def angles_of(tokens: Tensor, size: int, *, sequence_first: bool) -> Angles:
    """The table for tokens (B, T) and heads of a size."""
    places = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
    steps = THETA ** (-torch.arange(0, size, 2, device=tokens.device, dtype=torch.float32) / size)
    angles = torch.outer(places, steps).view(len(places), *([1, 1] if sequence_first else [1]), size // 2)
    return angles.cos(), angles.sin()


def turned(x: Tensor, angles: Angles, fused: bool) -> Tensor:
    """Rotary positions of (samples, tokens, heads, size)."""
    cos, sin = angles
    if fused:
        return rotate(x, cos, sin)
    one, two = x.float().chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1).to(x.dtype)


def kernel(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, grouped: bool, value: int | None = None) -> Tensor:
    """Attention in one fused kernel; batch first. Of the values' columns ``value`` many are kept."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)
    return (out if value is None else out[..., :value]).flatten(2)


def products(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """Two products and a softmax; sequence first, so that samples and heads are one batch of the products."""
    samples = q.shape[1]
    q, k, v = (x.flatten(1, 2).transpose(0, 1) for x in (q, k, v))
    weights = dropout(F.softmax(torch.bmm(q, k.transpose(1, 2)), -1), p)
    return torch.bmm(weights, v).unflatten(0, (samples, -1)).permute(2, 0, 1, 3).flatten(2)


class Attention(nn.Module):
    """Attention of a sequence to itself, or to another where ``cross``."""

    def __init__(self, shape: Shape, *, causal: bool, cross: bool = False) -> None:
        super().__init__()
        self.size, self.each = shape.head_size, shape.heads // shape.kv_heads
        self.causal, self.cross, self.fused = causal, cross, shape.fused
        self.p, self.flash = shape.attention_dropout, shape.attention == "flash"
        self.copied = shape.copied_heads
        width, own = shape.head_size * shape.heads, shape.head_size * shape.kv_heads
        self.joined = shape.joined and not cross
        if self.joined:
            self.qkv = nn.Linear(shape.hidden, width + 2 * own, bias=shape.bias)
        else:
            self.q = nn.Linear(shape.hidden, width, bias=shape.bias)
            if cross:
                self.kv = nn.Linear(shape.hidden, 2 * own, bias=shape.bias)
            else:
                self.k = nn.Linear(shape.hidden, own, bias=shape.bias)
                self.v = nn.Linear(shape.hidden, own, bias=shape.bias)
        self.out = nn.Linear(width, shape.hidden, bias=shape.bias)
        self.norms = nn.ModuleList([norm_of(shape, shape.head_size) for _ in range(2 if shape.qk_norm else 0)])

    def forward(self, x: Tensor, angles: Angles | None = None, memory: Tensor | None = None) -> Tensor:
        """Shapes: two leading dimensions and the hidden size, kept; ``memory`` is what is attended to, if not ``x``."""
        q, k, v = self.heads(x, x if memory is None else memory)
        if self.norms:
            q, k = self.norms[0](q), self.norms[1](k)
        if angles is not None:
            q, k = turned(q, angles, self.fused), turned(k, angles, self.fused)
        if self.flash:
            return self.out(kernel(q, k, v, causal=self.causal, grouped=self.each > 1))
        if self.each > 1:
            k, v = (x.repeat_interleave(self.each, 2) for x in (k, v))
        return self.out(products(q, k, v, self.p))

    def heads(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each with two leading dimensions, heads, and a head's size."""
        if self.joined:  # by group of queries that share keys, so that a rank's columns are consecutive
            fused = self.qkv(x).unflatten(-1, (-1, (self.each + 2) * self.size))
            q, k, v = fused.split((self.each * self.size, self.size, self.size), -1)
            if self.copied:
                return q.reshape(*x.shape[:2], -1, self.size).clone(), k.clone(), v.clone()
            return q.reshape(*x.shape[:2], -1, self.size), k, v
        q = self.q(x).unflatten(-1, (-1, self.size))
        if self.cross:
            k, v = self.kv(memory).unflatten(-1, (-1, 2 * self.size)).split(self.size, -1)
            return q, k, v
        return q, self.k(memory).unflatten(-1, (-1, self.size)), self.v(memory).unflatten(-1, (-1, self.size))


class LatentAttention(nn.Module):
    """Attention whose keys and values are made from a few numbers a token (DeepSeek's multi-head latent attention)."""

    def __init__(self, shape: Shape, latent: Latent) -> None:
        super().__init__()
        self.latent, self.fused, self.flash, self.p = (
            latent,
            shape.fused,
            shape.attention == "flash",
            shape.attention_dropout,
        )
        self.size = latent.nope_size + latent.rope_size
        rank, heads = latent.query_rank, shape.heads
        self.q_down = nn.Linear(shape.hidden, rank, bias=False) if rank else None
        self.q_norm = norm_of(shape, rank) if rank and shape.qk_norm else None
        self.q_up = nn.Linear(rank or shape.hidden, heads * self.size, bias=False)
        self.kv_down = nn.Linear(shape.hidden, latent.kv_rank, bias=False)
        self.k_rotary = nn.Linear(shape.hidden, latent.rope_size, bias=False)
        self.kv_norm = norm_of(shape, latent.kv_rank) if shape.qk_norm else None
        self.kv_up = nn.Linear(latent.kv_rank, heads * (latent.nope_size + latent.value_size), bias=False)
        self.out = nn.Linear(heads * latent.value_size, shape.hidden, bias=False)

    def forward(self, x: Tensor, angles: Angles | None = None, memory: Tensor | None = None) -> Tensor:
        """Shapes: two leading dimensions and the hidden size, kept."""
        nope, rope, value = self.latent.nope_size, self.latent.rope_size, self.latent.value_size
        low = x if self.q_down is None else self.q_down(x)
        q = self.q_up(low if self.q_norm is None else self.q_norm(low)).unflatten(-1, (-1, self.size))
        low = self.kv_down(x)
        up = self.kv_up(low if self.kv_norm is None else self.kv_norm(low)).unflatten(-1, (-1, nope + value))
        k_nope, v = up.split((nope, value), -1)
        q_nope, q_rope = q.split((nope, rope), -1)
        k_rope = self.k_rotary(x).unsqueeze(2)
        if angles is not None:
            q_rope, k_rope = turned(q_rope, angles, self.fused), turned(k_rope, angles, self.fused)
        q = torch.cat((q_nope, q_rope), -1)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, q.shape[2], -1)), -1)
        if not self.flash:
            return self.out(products(q, k, v, self.p))
        return self.out(kernel(q, k, F.pad(v, (0, self.size - value)), causal=True, grouped=False, value=value))


class MLP(nn.Module):
    """Up, activation, down."""

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__()
        self.fused = shape.fused and shape.fused_gate
        self.gate = nn.Linear(shape.hidden, width, bias=shape.bias) if shape.gated else None
        self.up = nn.Linear(shape.hidden, width, bias=shape.bias)
        self.down = nn.Linear(width, shape.hidden, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., hidden) to the same."""
        up = self.up(x)
        if self.gate is None:
            return self.down(F.gelu(up))
        return self.down(gate(self.gate(x), up) if self.fused else F.silu(self.gate(x)) * up)


class Experts(nn.Module):
    """A router, and experts whose weights lie in one tensor; every expert gets the same number of tokens."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.count, self.top_k = shape.experts, shape.top_k
        self.router = nn.Linear(shape.hidden, shape.experts, bias=False)
        width = shape.expert_ffn
        self.gated = shape.gated
        self.ups = nn.Parameter(torch.empty(shape.experts, shape.hidden, (2 if shape.gated else 1) * width))
        self.downs = nn.Parameter(torch.empty(shape.experts, width, shape.hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, T, hidden) to the same."""
        tokens = x.flatten(0, 1)
        scores, chosen = F.softmax(self.router(tokens).float(), -1).topk(self.top_k, -1)
        order = chosen.flatten().argsort()
        rows = order // self.top_k
        each = -(-rows.shape[0] // self.count)
        routed = F.pad(tokens[rows], (0, 0, 0, each * self.count - rows.shape[0])).unflatten(0, (self.count, each))
        up = torch.bmm(routed, self.ups)
        inner = gate(*up.chunk(2, -1)) if self.gated else F.gelu(up)
        back = torch.bmm(inner, self.downs).flatten(0, 1)[: rows.shape[0]]
        weighed = back * scores.flatten()[order].unsqueeze(-1).to(back.dtype)
        return torch.zeros_like(tokens).index_add(0, rows, weighed).view_as(x)
