"""A byte-level GPT that learns the Python standard library's own source. Plain PyTorch, written for one device."""

import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

# B batch, T time, C channels, H heads, D channels of a head


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x_BTC: Tensor) -> Tensor:
        q_BHTD, k_BHTD, v_BHTD = (
            project(x_BTC).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
        return self.out(y_BHTD.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(hidden)
        self.attention = Attention(hidden, heads)
        self.norm_2 = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attention(self.norm_1(x_BTC))
        return x_BTC + self.mlp(self.norm_2(x_BTC))


class CodeLM(nn.Module):
    def __init__(self, layers: int, hidden: int, heads: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(256, hidden)
        self.position = nn.Embedding(context, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, 256, bias=False)

    def forward(self, bytes_BT: Tensor) -> Tensor:
        positions_T = torch.arange(bytes_BT.shape[1], device=bytes_BT.device)
        x_BTC = self.token(bytes_BT) + self.position(positions_T)
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.head(self.norm(x_BTC))


class StandardLibrary(Dataset):
    """Windows of ``context + 1`` bytes from the standard library's top-level modules, one after the other."""

    def __init__(self, context: int) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        self.text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)
        self.context = context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        window = self.text[i * self.context : (i + 1) * self.context + 1].long()
        return {"x": window[:-1], "y": window[1:]}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())


def predict(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """How likely every byte was [B, T], and which one was the likeliest."""
    logits_BTC = model(batch["x"])
    log_likelihood_BT = -F.cross_entropy(logits_BTC.flatten(0, 1), batch["y"].flatten(), reduction="none")
    return {"log_likelihood": log_likelihood_BT.view_as(batch["y"]), "guess": logits_BTC.argmax(-1).to(torch.uint8)}


def workload(
    layers: int = 8, hidden: int = 256, heads: int = 8, context: int = 128, batch_size: int = 32, lr: float = 1e-3
):
    import weft

    return weft.Workload(
        model=lambda: CodeLM(layers, hidden, heads, context),
        loss=loss,
        predict=predict,
        data=StandardLibrary(context),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr),
        batch_size=batch_size,
        max_grad_norm=1.0,
    )
