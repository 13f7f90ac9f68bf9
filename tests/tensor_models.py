"""Small models whose shares are hard to take: fused weights, counts in numbers, convolutions, experts, odd sizes."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
import torch.nn.functional as F
import workloads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import weft
from weft.plan import TensorStyle

Styles = dict[str, TensorStyle]


class Attention(nn.Module):
    """Queries, keys and values in one matrix, grouped key/value heads, a norm over each head's features."""

    def __init__(self, width: int = 32, heads: int = 8, groups: int = 4) -> None:
        super().__init__()
        self.heads, self.groups, self.head = heads, groups, width // heads
        self.fused = nn.Linear(width, width + 2 * groups * self.head)
        self.norm = nn.Parameter(torch.rand(self.head))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        sizes = [self.heads * self.head, self.groups * self.head, self.groups * self.head]
        q, k, v = self.fused(x).split(sizes, -1)
        q, k, v = (t.unflatten(-1, (-1, self.head)).transpose(1, 2) for t in (q, k, v))
        q, k = F.layer_norm(q, (self.head,)) * self.norm, F.layer_norm(k, (self.head,)) * self.norm
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(-2))


def attention_styles(name: str) -> Styles:
    return {
        f"{name}.fused": TensorStyle("colwise", parts=(32, 16, 16)),
        f"{name}.heads": TensorStyle("share"),
        f"{name}.groups": TensorStyle("share"),
        f"{name}.norm": TensorStyle("sum_gradient"),
        f"{name}.out": TensorStyle("rowwise"),
    }


class Experts(nn.Module):
    """Weights of all experts in one tensor; gate and up projections fused; a bias after the sum over features."""

    def __init__(self, width: int = 32, inner: int = 8, experts: int = 3) -> None:
        super().__init__()
        self.enter = nn.Parameter(torch.randn(experts, width, 2 * inner) / 6)
        self.leave = nn.Parameter(torch.randn(experts, inner, width) / 3)
        self.offset = nn.Parameter(torch.randn(experts, width) / 3)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        gate, up = torch.einsum("btd,edf->betf", x, self.enter).chunk(2, -1)
        y = torch.einsum("betf,efd->betd", F.silu(gate) * up, self.leave) + self.offset[:, None]
        return (y * weights.transpose(1, 2).unsqueeze(-1)).sum(1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.experts, self.router = Attention(), Experts(), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.experts(x, weights=self.router(x).softmax(-1))


def block_styles(name: str) -> Styles:
    return {
        **attention_styles(f"{name}.attention"),
        f"{name}.experts": TensorStyle("reduce"),
        f"{name}.experts.enter": TensorStyle("shard", parts=(8, 8), dim=2),
        f"{name}.experts.leave": TensorStyle("shard", dim=1),
        f"{name}.experts.offset": TensorStyle("first_rank"),
    }


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3.0


class Language(nn.Module):
    """An odd vocabulary, a padding token, and an output layer tied to the embedding."""

    def __init__(self, *, vocabulary: int = 37, scaled: bool = True, recompute: bool = False) -> None:
        super().__init__()
        kind = ScaledEmbedding if scaled else nn.Embedding
        self.embed = kind(vocabulary, 32, padding_idx=vocabulary - 1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.unused = nn.Embedding(vocabulary, 32)
        self.head = nn.Linear(32, vocabulary, bias=False)
        self.unused.weight = self.embed.weight
        self.head.weight = self.embed.weight
        self.recompute = recompute

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


LANGUAGE = {
    "embed": TensorStyle("embedding_rowwise"),
    "unused.weight": TensorStyle("shard", dim=0),
    **block_styles("blocks.0"),
    **block_styles("blocks.1"),
    "head": TensorStyle("colwise_gather"),
}


def language(vocabulary: int = 37, **choices: Any) -> weft.Workload:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["input_ids"])[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    return weft.Workload(
        model=lambda: Language(vocabulary=vocabulary, **choices),
        loss=loss,
        data=workloads.Tokens(64, 12, vocabulary),
        optimizer=workloads.adamw,
        batch_size=8,
        max_grad_norm=1.0,
    )


class Fused(nn.Module):
    """As transformers' Conv1D: a weight stored [in, out], and the output's width kept as a number."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 4)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], self.outputs)


class Scaled(nn.Linear):
    """A projection that does more than multiply."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.tanh(), self.weight) + self.bias


class Pair(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


class Picture(nn.Module):
    """Convolutions with gathers (one of an odd size) and a pair without, a pair called twice, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 5, 3, padding=1)
        self.inner = Pair(nn.Conv2d(5, 8, 3), nn.Conv2d(8, 4, 1))
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.mix = Pair(Fused(6, 16), Scaled(16, 6))
        self.all = Fused(6, 7)
        self.frozen = nn.Linear(7, 4).requires_grad_(False)
        self.end = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.view(-1, 1, 4, 3))
        x = self.inner(x)
        x = self.up(x).flatten(2).transpose(1, 2).contiguous()
        for _ in range(2):
            x = x + self.mix(x)
        return self.end(self.frozen(self.all(x)).tanh().mean(1))


PICTURE = {
    "first": TensorStyle("colwise_gather"),
    "inner.first": TensorStyle("colwise"),
    "inner.second": TensorStyle("rowwise"),
    "up": TensorStyle("colwise_gather"),
    "mix.first": TensorStyle("colwise_transposed"),
    "mix.second": TensorStyle("rowwise"),
    "all": TensorStyle("colwise_gather_transposed"),
    "frozen": TensorStyle("colwise_gather"),
}


def picture() -> weft.Workload:
    return weft.Workload(
        model=Picture,
        loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        data=workloads.Points(64, 12),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        batch_size=8,
    )


def gpt2_styles(layers: int = 4) -> Styles:
    styles = {"transformer.wte": TensorStyle("embedding_rowwise"), "lm_head": TensorStyle("colwise_gather")}
    for i in range(layers):
        block = f"transformer.h.{i}"
        styles |= {
            f"{block}.attn.c_attn": TensorStyle("colwise_transposed", parts=(32, 32, 32)),
            f"{block}.attn.split_size": TensorStyle("share"),
            f"{block}.attn.c_proj": TensorStyle("rowwise_transposed"),
            f"{block}.mlp.c_fc": TensorStyle("colwise_transposed"),
            f"{block}.mlp.c_proj": TensorStyle("rowwise_transposed"),
        }
    return styles


def lora() -> weft.Workload:
    from peft import LoraConfig, get_peft_model

    whole = workloads.llama()

    def model() -> nn.Module:
        config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], lora_dropout=0.0, init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
            return get_peft_model(whole.model(), config)

    return dataclasses.replace(whole, model=model)


def lora_styles(layers: int = 4) -> Styles:
    styles = {}
    for i in range(layers):
        attention, mlp = (f"base_model.model.model.layers.{i}.{part}" for part in ("self_attn", "mlp"))
        styles |= {
            f"{attention}.q_proj.base_layer": TensorStyle("colwise"),
            f"{attention}.q_proj.lora_B.default": TensorStyle("colwise"),
            f"{attention}.k_proj": TensorStyle("colwise"),
            f"{attention}.v_proj": TensorStyle("colwise"),
            f"{attention}.o_proj.base_layer": TensorStyle("rowwise"),
            f"{attention}.o_proj.lora_A.default": TensorStyle("rowwise"),
            f"{mlp}.gate_proj": TensorStyle("colwise"),
            f"{mlp}.up_proj": TensorStyle("colwise"),
            f"{mlp}.down_proj": TensorStyle("rowwise"),
        }
    return styles
