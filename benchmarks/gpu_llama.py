"""Llamas in plain PyTorch, from a thousandth to 8 billion parameters, as a user would write them for one device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import weft

# B batch, T time, C channels, H heads, G heads of keys and values, D channels of a head

SIZES = {  # layers, hidden, inner, heads, heads of keys and values, vocabulary
    "tiny": (2, 128, 352, 4, 2, 512),
    "0.3b": (20, 1024, 2816, 16, 8, 32000),
    "1b": (16, 2048, 8192, 32, 8, 32000),
    "3b": (28, 3072, 8192, 24, 8, 32000),
    "8b": (32, 4096, 14336, 32, 8, 128256),
}


def fill(weight: nn.Parameter, scale: float) -> None:
    """One short list of random numbers again and again: drawing billions takes minutes, and no cost depends on them."""
    drawn, count = torch.randn(2**16) * scale, weight.numel()
    with torch.no_grad():
        weight.copy_(drawn.repeat(-(-count // len(drawn)))[:count].view_as(weight))


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        fill(self.weight, self.in_features**-0.5)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        fill(self.weight, 1.0)


def turn(x_BTHD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021), the halves of a head's channels being the pairs."""
    one, two = x_BTHD.chunk(2, dim=-1)
    cos_T1D, sin_T1D = cos_TD[:, None], sin_TD[:, None]
    return torch.cat([one * cos_T1D - two * sin_T1D, two * cos_T1D + one * sin_T1D], dim=-1)


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, groups: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.query = Linear(hidden, hidden, bias=False)
        self.key = Linear(hidden, groups * self.head_dim, bias=False)
        self.value = Linear(hidden, groups * self.head_dim, bias=False)
        self.out = Linear(hidden, hidden, bias=False)

    def forward(self, x_BTC: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        q_BTHD, k_BTGD, v_BTGD = (
            project(x_BTC).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value)
        )
        q_BTHD, k_BTGD = turn(q_BTHD, cos_TD, sin_TD), turn(k_BTGD, cos_TD, sin_TD)
        shared = q_BTHD.shape[2] // k_BTGD.shape[2]
        k_BTHD, v_BTHD = k_BTGD.repeat_interleave(shared, dim=2), v_BTGD.repeat_interleave(shared, dim=2)
        q_BHTD, k_BHTD, v_BHTD = (x.transpose(1, 2).to(v_BTHD.dtype) for x in (q_BTHD, k_BTHD, v_BTHD))
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
        return self.out(y_BHTD.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, hidden: int, inner: int, heads: int, groups: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
        self.attention = Attention(hidden, heads, groups)
        self.gate = Linear(hidden, inner, bias=False)
        self.up = Linear(hidden, inner, bias=False)
        self.down = Linear(inner, hidden, bias=False)

    def forward(self, x_BTC: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), cos_TD, sin_TD)
        y_BTC = self.mlp_norm(x_BTC)
        return x_BTC + self.down(F.silu(self.gate(y_BTC)) * self.up(y_BTC))


class Llama(nn.Module):
    cosines: Tensor
    sines: Tensor

    def __init__(
        self, layers: int, hidden: int, inner: int, heads: int, groups: int, vocabulary: int, length: int
    ) -> None:
        super().__init__()
        self.token = Embedding(vocabulary, hidden)
        self.blocks = nn.ModuleList(Block(hidden, inner, heads, groups) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.head = Linear(hidden, vocabulary, bias=False)
        half = hidden // heads // 2
        angles_TD = torch.arange(length)[:, None] * 500_000.0 ** -(torch.arange(half) / half)
        self.register_buffer("cosines", angles_TD.cos(), persistent=False)
        self.register_buffer("sines", angles_TD.sin(), persistent=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTC = self.token(tokens_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC, self.cosines, self.sines)
        return self.head(self.norm(x_BTC))


class Tokens(Dataset):
    """Random tokens, and the ones that follow them."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.length = vocabulary, length

    def __len__(self) -> int:
        return 2**16

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        drawn = torch.randint(self.vocabulary, (self.length + 1,), generator=torch.Generator().manual_seed(i))
        return {"x": drawn[:-1], "y": drawn[1:]}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]).flatten(0, 1).float(), batch["y"].flatten())


def workload(size: str = "tiny", dtype: str = "float32", length: int = 64, batch_size: int = 4) -> weft.Workload:
    """Training of one size; ``dtype`` is of the parameters, their gradients and the optimizer's state."""
    return weft.Workload(
        model=lambda: Llama(*SIZES[size], length).to(getattr(torch, dtype)),
        loss=loss,
        data=Tokens(SIZES[size][-1], length),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        batch_size=batch_size,
        max_grad_norm=1.0,
    )
