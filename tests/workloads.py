"""Small workloads of several families, built where they run: in a worker or in the test itself."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weft

EXAMPLES = Path(__file__).parent.parent / "examples"


class Tokens:
    """Rows of random tokens; the same on every process."""

    def __init__(self, samples: int, length: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.rows = torch.randint(vocabulary, (samples, length), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


class Points:
    """Random points and targets."""

    def __init__(self, samples: int, features: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(samples, features, generator=generator)
        self.y = torch.randn(samples, 1, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def causal_lm(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def code_lm(batch_size: int = 8) -> weft.Workload:
    spec = importlib.util.spec_from_file_location("code_lm", EXAMPLES / "code_lm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.workload(layers=4, hidden=32, heads=4, context=16, batch_size=batch_size)


def llama(batch_size: int = 8) -> weft.Workload:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
    )
    return weft.Workload(
        model=lambda: LlamaForCausalLM(config),
        loss=causal_lm,
        data=Tokens(64, 12, 64),
        optimizer=adamw,
        batch_size=batch_size,
        max_grad_norm=1.0,
    )


def llama_of(samples: int) -> weft.Workload:
    return dataclasses.replace(llama(), data=Tokens(samples, 12, 64))


def gpt2(batch_size: int = 8, dropout: float = 0.0) -> weft.Workload:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=64,
        n_positions=32,
        n_embd=32,
        n_layer=4,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=1,
    )
    return weft.Workload(
        model=lambda: GPT2LMHeadModel(config),
        loss=causal_lm,
        data=Tokens(64, 12, 64),
        optimizer=adamw,
        batch_size=batch_size,
    )


def mlp(batch_size: int = 8, samples: int = 64) -> weft.Workload:
    def model() -> nn.Module:
        return nn.Sequential(
            nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 1)
        )

    return weft.Workload(
        model=model,
        loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        data=Points(samples, 12),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        batch_size=batch_size,
    )


FAMILIES = {"code_lm": code_lm, "llama": llama, "gpt2": gpt2, "mlp": mlp}


class SkipNet(nn.Module):
    """Skip connections across stages, a block called twice, parameters that glue reads, and a gate it reads twice."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(12, 16)
        self.down = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.shared = nn.Linear(16, 16)
        self.up = nn.ModuleList(nn.Linear(32, 16) for _ in range(3))
        self.gate = nn.Parameter(torch.randn(16))
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("offset", torch.linspace(-1, 1, 16))
        self.leave = nn.Linear(16, 1)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x) + self.offset
        skips = []
        for down in self.down:
            x = torch.tanh(down(x))
            skips.append(x * self.gate)
        x = self.shared(x)
        for up in self.up:
            x = torch.relu(up(torch.cat([x, skips.pop()], dim=-1))) * self.scale
        x = self.shared(x) * self.gate
        return self.leave(x)


def skips(batch_size: int = 8) -> weft.Workload:
    return weft.Workload(
        model=SkipNet,
        loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        data=Points(64, 12),
        optimizer=adamw,
        batch_size=batch_size,
        max_grad_norm=0.5,
    )


class Padded(Tokens):
    """Rows whose labels are cut at different lengths, some of them at zero."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        labels = self.rows[i].clone()
        labels[1 + (5 * i) % len(labels) :] = -100
        return {"input_ids": self.rows[i], "labels": labels}


def counted_causal_lm(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")
    return total, (labels != -100).sum()


def padded(batch_size: int = 8) -> weft.Workload:
    return dataclasses.replace(llama(batch_size), data=Padded(64, 12, 64), loss=counted_causal_lm)
