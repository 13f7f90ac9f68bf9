"""Models of published runs, written from a Shape as their frameworks compute them: plain modules and operators.

    decoder     embedding, [norm, attention, norm, MLP or experts] x layers, norm, head            GPT, Llama, Mixtral
    bert        the same without a causal mask, a head of dense, GELU, norm and embedding, and one for the next sentence
    t5          two towers that share an embedding; the second also attends to the first

No block knows its number, so one is captured for all. The parts stand in published_parts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from published_kernels import dropout_add, fused_entropy
from published_kernels import entropy as entropy_in_place
from published_parts import MLP, Angles, Attention, Experts, LatentAttention, angles_of, norm_of
from published_run import Run, Shape
from torch import Tensor, nn

import weft

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
"""Of weights and activations, by a run's dtype; bfloat16 for the others, fp8 too, whose products alone are in fp8."""

SEGMENTS = 2
"""BERT's token types."""


class Block(nn.Module):
    """Attention and MLP, each after a norm and added to what came in; between them attention to a memory."""

    def __init__(self, shape: Shape, *, causal: bool = True, cross: bool = False, dense: bool = True) -> None:
        super().__init__()
        self.p = shape.dropout
        latent = shape.latent
        self.norm1 = norm_of(shape)
        self.attention = Attention(shape, causal=causal) if latent is None else LatentAttention(shape, latent)
        self.norm_cross = norm_of(shape) if cross else None
        self.cross = Attention(shape, causal=False, cross=True) if cross else None
        self.norm2, self.mlp = norm_of(shape), MLP(shape, shape.ffn) if dense else Experts(shape)
        self.shared = MLP(shape, shape.shared_ffn) if shape.shared_ffn and not dense else None

    def forward(self, x: Tensor, angles: Angles | None = None, memory: Tensor | None = None) -> Tensor:
        """Shapes: two leading dimensions and the hidden size, kept."""
        x = dropout_add(self.attention(self.norm1(x), angles), x, self.p)
        if self.cross is not None and self.norm_cross is not None:
            x = dropout_add(self.cross(self.norm_cross(x), None, memory), x, self.p)
        normed = self.norm2(x)
        if self.shared is not None:
            x = x + self.shared(normed)
        return dropout_add(self.mlp(normed), x, self.p)


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


class Further(nn.Module):
    """A prediction further ahead: a block on what came out and the next token's embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norms = nn.ModuleList([norm_of(shape), norm_of(shape)])
        self.join = nn.Linear(2 * shape.hidden, shape.hidden, bias=False)
        self.block, self.norm = Block(shape, dense=not shape.experts), norm_of(shape)

    def forward(self, x: Tensor, following: Tensor, angles: Angles | None) -> Tensor:
        """Shapes: kept."""
        joined = torch.cat((self.norms[0](following), self.norms[1](x)), -1)
        return self.norm(self.block(self.join(joined), angles))


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
        self.further = nn.ModuleList([Further(shape) for _ in range(shape.extra_heads)])
        self.rotary = (shape.latent.rope_size if shape.latent else shape.head_size) if shape.positions == "rope" else 0
        self.sequence_first = shape.attention == "unfused"

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Shapes: (B, T) to logits, in the layout of the activations, of the next token and of those further ahead."""
        x = self.embedding(tokens)
        angles = angles_of(tokens, self.rotary, sequence_first=self.sequence_first) if self.rotary else None
        for layer in self.layers:
            x = layer(x, angles)
        x = self.norm(x)
        logits = [self.head(x)]
        for further in self.further:
            x = further(x, self.embedding(tokens), angles)
            logits.append(self.head(x))
        return logits


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


ENTROPIES = {"in place": entropy_in_place, "fused": fused_entropy}
"""Kinds of losses, besides ``"plain"``: PyTorch's operators on a float32 copy of the logits."""


def loss_of(shape: Shape, kind: str = "plain") -> Callable[[nn.Module, Tensor], Tensor]:
    """Cross-entropy in float32; the labels are the tokens, which costs what other labels would."""
    unfused = shape.attention == "unfused"

    def entropy(logits: Tensor, labels: Tensor) -> Tensor:
        if kind in ENTROPIES:
            return ENTROPIES[kind](logits, labels.t() if unfused else labels)
        return F.cross_entropy(logits.float().flatten(0, 1), (labels.t() if unfused else labels).flatten())

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if shape.family == "t5":
            tokens, targets = batch.split((shape.seq_len, shape.decoder_len), 1)
            return entropy(model(tokens, targets), targets)
        if shape.family == "bert":
            logits, following = model(batch)
            return entropy(logits, batch) + F.cross_entropy(following.float(), batch[:, 0] % SEGMENTS)
        total = [entropy(logits, batch) for logits in model(batch)]
        return total[0] if len(total) == 1 else torch.stack(total).sum()

    return loss


def loss_kind(run: Run) -> str:
    """How the run's program computes its loss: Megatron-LM in place."""
    if "fused-entropy" in run.features:
        return "fused"
    return "plain" if run.framework in ("torchtitan", "nanotron", "nnscaler", "unknown") else "in place"


def workload(run: Run) -> weft.Workload:
    """The run as weft would be given it: the model for one device, in the run's dtype, and AdamW.

    The global batch counts sequences.
    """
    shape = run.shape
    dtype = DTYPES.get(run.dtype, torch.bfloat16)
    return weft.Workload(
        model=lambda: FAMILIES[shape.family](shape).to(dtype),
        loss=loss_of(shape, loss_kind(run)),
        data=Zeros(shape.seq_len + shape.decoder_len, run.global_batch),
        optimizer=lambda parameters: torch.optim.AdamW(parameters),
        batch_size=run.global_batch,
    )
