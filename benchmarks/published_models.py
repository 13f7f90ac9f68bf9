"""Models of published runs, written from a Shape as their frameworks compute them: plain modules and operators.

    decoder     embedding, [norm, attention, norm, MLP] x layers, norm, head         GPT and Llama
    bert        the same without a causal mask, a head of dense, GELU, norm and embedding, and one for the next sentence
    t5          two towers that share an embedding; the second also attends to the first

No block knows its number, so one is captured for all. Activations are batch first where attention is one kernel, and
sequence first where it is not, as Megatron-LM has them, so that no product needs a copy. Two simplifications that no
cost depends on: the scale and mask of unfused attention, which its softmax kernel applies on its way, are left out; and
experts get equal numbers of tokens whatever the router says, since shapes must not depend on values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from published_kernels import dropout, dropout_add, gate, rms_norm, rotate
from published_run import Run, Shape
from torch import Tensor, nn

import weft

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
"""Of weights and activations, by a run's dtype; bfloat16 for the others, fp8 too, whose products alone are in fp8."""

SEGMENTS = 2
"""BERT's token types."""


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
"""Cosines and sines of rotary positions, (tokens, 1, half a head): one table for all blocks."""


def turned(x: Tensor, angles: Angles, fused: bool) -> Tensor:
    """Rotary positions of (samples, tokens, heads, size)."""
    cos, sin = angles
    if fused:
        return rotate(x, cos, sin)
    one, two = x.float().chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1).to(x.dtype)


class Attention(nn.Module):
    """Attention of a sequence to itself, or to another where ``cross``."""

    def __init__(self, shape: Shape, *, causal: bool, cross: bool = False) -> None:
        super().__init__()
        self.size, self.each = shape.head_size, shape.heads // shape.kv_heads
        self.causal, self.cross, self.fused = causal, cross, shape.fused
        self.p, self.flash = shape.attention_dropout, shape.attention == "flash"
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
        mixed = self.kernel(q, k, v) if self.flash else self.products(q, k, v)
        return self.out(mixed)

    def heads(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each with two leading dimensions, heads, and a head's size."""
        if self.joined:  # by group of queries that share keys, so that a rank's columns are consecutive
            fused = self.qkv(x).unflatten(-1, (-1, (self.each + 2) * self.size))
            q, k, v = fused.split((self.each * self.size, self.size, self.size), -1)
            return q.reshape(*x.shape[:2], -1, self.size), k, v
        q = self.q(x).unflatten(-1, (-1, self.size))
        if self.cross:
            k, v = self.kv(memory).unflatten(-1, (-1, 2 * self.size)).split(self.size, -1)
            return q, k, v
        return q, self.k(memory).unflatten(-1, (-1, self.size)), self.v(memory).unflatten(-1, (-1, self.size))

    def kernel(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One fused kernel; batch first."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.each > 1)
        return out.transpose(1, 2).flatten(2)

    def products(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Two products and a softmax; sequence first, so that samples and heads are one batch of the products."""
        if self.each > 1:
            k, v = (x.repeat_interleave(self.each, 2) for x in (k, v))
        samples = q.shape[1]
        q, k, v = (x.flatten(1, 2).transpose(0, 1) for x in (q, k, v))
        weights = dropout(F.softmax(torch.bmm(q, k.transpose(1, 2)), -1), self.p)
        mixed = torch.bmm(weights, v).unflatten(0, (samples, -1))
        return mixed.permute(2, 0, 1, 3).flatten(2)


class MLP(nn.Module):
    """Up, activation, down."""

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__()
        self.fused = shape.fused
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
        self.gates = nn.Parameter(torch.empty(shape.experts, shape.hidden, width)) if shape.gated else None
        self.ups = nn.Parameter(torch.empty(shape.experts, shape.hidden, width))
        self.downs = nn.Parameter(torch.empty(shape.experts, width, shape.hidden))
        self.shared = MLP(shape, shape.shared_ffn) if shape.shared_ffn else None

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, T, hidden) to the same."""
        tokens = x.flatten(0, 1)
        scores, chosen = F.softmax(self.router(tokens).float(), -1).topk(self.top_k, -1)
        order = chosen.flatten().argsort()
        rows = order // self.top_k
        each = -(-rows.shape[0] // self.count)
        routed = F.pad(tokens[rows], (0, 0, 0, each * self.count - rows.shape[0])).unflatten(0, (self.count, each))
        up = torch.bmm(routed, self.ups)
        inner = F.gelu(up) if self.gates is None else gate(torch.bmm(routed, self.gates), up)
        back = torch.bmm(inner, self.downs).flatten(0, 1)[: rows.shape[0]]
        weighed = back * scores.flatten()[order].unsqueeze(-1).to(back.dtype)
        out = torch.zeros_like(tokens).index_add(0, rows, weighed).view_as(x)
        return out if self.shared is None else out + self.shared(x)


class Block(nn.Module):
    """Attention and MLP, each after a norm and added to what came in; between them attention to a memory if ``cross``."""

    def __init__(self, shape: Shape, *, causal: bool = True, cross: bool = False, dense: bool = True) -> None:
        super().__init__()
        self.p = shape.dropout
        self.norm1, self.attention = norm_of(shape), Attention(shape, causal=causal)
        self.norm_cross = norm_of(shape) if cross else None
        self.cross = Attention(shape, causal=False, cross=True) if cross else None
        self.norm2, self.mlp = norm_of(shape), MLP(shape, shape.ffn) if dense else Experts(shape)

    def forward(self, x: Tensor, angles: Angles | None = None, memory: Tensor | None = None) -> Tensor:
        """Shapes: two leading dimensions and the hidden size, kept."""
        x = dropout_add(self.attention(self.norm1(x), angles), x, self.p)
        if self.cross is not None and self.norm_cross is not None:
            x = dropout_add(self.cross(self.norm_cross(x), None, memory), x, self.p)
        return dropout_add(self.mlp(self.norm2(x)), x, self.p)


class Embedding(nn.Module):
    """Tokens, positions and segments, added up; sequence first where attention wants that."""

    def __init__(self, shape: Shape, segments: int = 0) -> None:
        super().__init__()
        self.p, self.sequence_first = shape.dropout, shape.attention == "unfused"
        self.tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.positions = nn.Embedding(shape.seq_len, shape.hidden) if shape.positions == "learned" else None
        self.segments = nn.Embedding(segments, shape.hidden) if segments else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Shapes: (B, T) to (B, T, hidden), or (T, B, hidden)."""
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        if self.segments is not None:
            x = x + self.segments(torch.zeros_like(tokens))
        x = x.transpose(0, 1).contiguous() if self.sequence_first else x
        return torch.native_dropout(x, self.p, True)[0] if self.p else x


class Head(nn.Module):
    """Logits; of the embedding's own weights where it is given."""

    def __init__(self, shape: Shape, tokens: nn.Embedding | None, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(shape.hidden, shape.vocab, bias=bias)
        if tokens is not None:
            self.linear.weight = tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., hidden) to (..., vocab)."""
        return self.linear(x)


class Decoder(nn.Module):
    """GPT or Llama."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = Embedding(shape)
        sparse = shape.experts > 0
        self.layers = nn.ModuleList(
            [Block(shape, dense=not sparse or i < shape.dense_layers) for i in range(shape.layers)]
        )
        self.norm = norm_of(shape)
        self.head = Head(shape, self.embedding.tokens if shape.tied else None)
        self.rotary = shape.positions == "rope"
        if self.rotary:
            for name in ("cos", "sin"):
                self.register_buffer(name, torch.ones(shape.seq_len, 1, shape.head_size // 2), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Shapes: (B, T) to logits, in the layout of the activations."""
        x = self.embedding(tokens)
        angles = (self.cos, self.sin) if self.rotary else None
        for layer in self.layers:
            x = layer(x, angles)
        return self.head(self.norm(x))


class Bert(nn.Module):
    """An encoder with heads for masked tokens and for the next sentence."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = Embedding(shape, SEGMENTS)
        self.layers = nn.ModuleList([Block(shape, causal=False) for _ in range(shape.layers)])
        self.norm = norm_of(shape)
        self.pooler, self.next = nn.Linear(shape.hidden, shape.hidden), nn.Linear(shape.hidden, 2)
        self.dense, self.norm_head = nn.Linear(shape.hidden, shape.hidden), norm_of(shape)
        self.head = Head(shape, self.embedding.tokens, bias=True)
        self.first = 0 if shape.attention == "unfused" else 1

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Shapes: (B, T) to logits of the tokens, in the layout of the activations, and (B, 2) of the next sentence."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        pooled = torch.tanh(self.pooler(x.select(self.first, 0)))
        return self.head(self.norm_head(F.gelu(self.dense(x)))), self.next(pooled)


class T5(nn.Module):
    """Encoder and decoder with one embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = Embedding(shape)
        self.encoder = nn.ModuleList([Block(shape, causal=False) for _ in range(shape.layers)])
        self.norm_memory = norm_of(shape)
        self.decoder = nn.ModuleList([Block(shape, cross=True) for _ in range(shape.layers)])
        self.norm = norm_of(shape)
        self.head = Head(shape, self.embedding.tokens, bias=True)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Shapes: (B, S) and (B, T) to logits of the T, in the layout of the activations."""
        memory = self.embedding(tokens)
        for layer in self.encoder:
            memory = layer(memory)
        memory, x = self.norm_memory(memory), self.embedding(targets)
        for layer in self.decoder:
            x = layer(x, None, memory)
        return self.head(self.norm(x))


FAMILIES: dict[str, Callable[[Shape], nn.Module]] = {"decoder": Decoder, "bert": Bert, "t5": T5}


class Zeros:
    """A data set of samples of zeros, of a number of tokens: nobody looks at the values."""

    def __init__(self, tokens: int, samples: int) -> None:
        self.tokens, self.samples = tokens, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        return torch.zeros(self.tokens, dtype=torch.long)


def loss_of(shape: Shape) -> Callable[[nn.Module, Tensor], Tensor]:
    """Cross-entropy in float32; the labels are the tokens, which costs what other labels would."""
    unfused = shape.attention == "unfused"

    def entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float().flatten(0, 1), (labels.t() if unfused else labels).flatten())

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if shape.family == "t5":
            tokens, targets = batch.split((shape.seq_len, shape.decoder_len), 1)
            return entropy(model(tokens, targets), targets)
        if shape.family == "bert":
            logits, following = model(batch)
            return entropy(logits, batch) + F.cross_entropy(following.float(), batch[:, 0])
        return entropy(model(batch), batch)

    return loss


def workload(run: Run) -> weft.Workload:
    """The run as weft would be given it: the model for one device, in the run's dtype, and AdamW.

    The global batch counts sequences.
    """
    shape = run.shape
    dtype = DTYPES.get(run.dtype, torch.bfloat16)
    return weft.Workload(
        model=lambda: FAMILIES[shape.family](shape).to(dtype),
        loss=loss_of(shape),
        data=Zeros(shape.seq_len + shape.decoder_len, run.global_batch),
        optimizer=lambda parameters: torch.optim.AdamW(parameters),
        batch_size=run.global_batch,
    )
