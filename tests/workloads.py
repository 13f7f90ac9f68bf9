"""Small workloads of several families, built where they run: in a worker or in the test itself."""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
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


class Pictures:
    """Random pictures and classes."""

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(samples, 3, 6, 6, generator=generator)
        self.y = torch.randint(4, (samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]


class Residual(nn.Module):
    """A convolution, normalised over the batch, with dropout."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.relu(self.norm(self.conv(x))))


def cnn(samples: int = 64, dropout: float = 0.0, batch_size: int = 8) -> weft.Workload:
    def model() -> nn.Module:
        blocks = [Residual(8, dropout) for _ in range(3)]
        enter = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=None)
        return nn.Sequential(*enter, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    return weft.Workload(
        model=model,
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        data=Pictures(samples),
        optimizer=adamw,
        batch_size=batch_size,
    )


class Norms(nn.Module):
    """Every kind of normalisation over the batch, some of them without parameters and so outside all units."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(12, 8, bias=False)
        self.plain = nn.BatchNorm1d(8, affine=False)
        self.middle = nn.Linear(8, 8, bias=False)
        self.untracked = nn.BatchNorm1d(8, track_running_stats=False)
        self.deep = nn.Sequential(nn.Conv3d(1, 2, 1, bias=False), nn.BatchNorm3d(2, momentum=None))
        self.synchronised = nn.SyncBatchNorm(8)
        self.frozen = nn.BatchNorm1d(8).eval()
        self.bare = nn.BatchNorm1d(8, affine=False, track_running_stats=False)
        self.leave = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.plain(self.enter(x)))
        x = torch.tanh(self.untracked(self.middle(x)))
        x = torch.tanh(x + self.deep(x.view(-1, 1, 2, 2, 2)).sum(1).flatten(1))
        return self.leave(self.bare(torch.tanh(self.frozen(self.synchronised(x)))).relu())


def norms(samples: int = 64) -> weft.Workload:
    return dataclasses.replace(mlp(samples=samples), model=Norms)


class Moving(nn.Module):
    """A unit with a moving average and a counter, both changed in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.register_buffer("mean", torch.zeros(12))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.linear(x))
        y = (x - self.mean) * (1 + self.mean)
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return y


class Averages(nn.Module):
    """Buffers that units change, and buffers that the code between them does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Moving() for _ in range(4))
        self.leave = nn.Linear(12, 1)
        self.register_buffer("scale", torch.ones(12))
        self.register_buffer("late", torch.ones(12))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = x / self.scale
        self.scale.mul_(0.9).add_(0.1 * x.detach().square().mean(0))
        x = y
        for block in self.blocks:
            x = block(x)
        y = self.leave(x / self.late)
        self.late = 0.9 * self.late + 0.1 * x.detach().square().mean(0)
        return y


def averages(samples: int = 64) -> weft.Workload:
    return dataclasses.replace(mlp(samples=samples), model=Averages, optimizer=adamw)


def grouped(build: Any = gpt2) -> weft.Workload:
    """Groups of parameters with settings of their own, one for every layer, some of them empty on some stages, and a
    schedule of rates with a function for every group."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        groups: dict[str, list[Any]] = {}
        for name, parameter in parameters.named():
            layer = next((part for part in name.split(".") if part.isdigit()), "rest")
            groups.setdefault(layer if parameter.dim() > 1 else "vectors", []).append(parameter)
        rates = {name: 1e-2 / (2 + i) for i, name in enumerate(groups)}
        return torch.optim.AdamW(
            [{"params": p, "lr": rates[n], "weight_decay": 0.1 * (n != "vectors")} for n, p in groups.items()]
        )

    def scheduler(optimizer: torch.optim.Optimizer) -> Any:
        groups = len(optimizer.param_groups)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda s, i=i: 1 / (1 + s + i) for i in range(groups)])

    return dataclasses.replace(build(), optimizer=optimizer, scheduler=scheduler)


def quietly(fn: Any, *args: Any) -> Any:
    """Call something that warns of what it does itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return fn(*args)


def lora_llama() -> weft.Workload:
    from peft import LoraConfig, get_peft_model

    base = llama()

    def model() -> nn.Module:
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        return quietly(get_peft_model, base.model(), config)

    return dataclasses.replace(
        base,
        model=model,
        optimizer=lambda p: torch.optim.AdamW([x for n, x in p.named() if "lora" in n], lr=1e-2, weight_decay=0.1),
    )


def lora_mlp() -> weft.Workload:
    from peft import LoraConfig, get_peft_model

    base = mlp()

    def model() -> nn.Module:
        # the first half has nothing to train
        config = LoraConfig(r=2, target_modules=["4", "6"], init_lora_weights=False)
        return quietly(get_peft_model, base.model(), config)

    return dataclasses.replace(
        base, model=model, optimizer=lambda p: torch.optim.AdamW([x for x in p if x.requires_grad], lr=1e-2)
    )


class PartlyUsed(nn.Module):
    """A block with a frozen vector, a layer that no forward uses, and an argument it does without."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.spare = nn.Linear(12, 12)
        self.shift = nn.Parameter(torch.randn(12), requires_grad=False)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return torch.tanh(self.linear(x) + self.shift)


class IdleTower(nn.Module):
    """A tower whose result every block is given and none uses."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.ModuleList(PartlyUsed() for _ in range(2))
        self.blocks = nn.ModuleList(PartlyUsed() for _ in range(3))
        self.head = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        other = x
        for block in self.idle:
            other = block(other)
        for block in self.blocks:
            x = block(x, other)
        return self.head(x)


def unused() -> weft.Workload:
    """Parameters that are frozen and parameters that get no gradient, which weight decay would move."""
    return dataclasses.replace(
        mlp(), model=IdleTower, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5), max_grad_norm=0.5
    )


class Tied(nn.Module):
    """A frozen table that the first and the last stage read, and a trained one that nobody gets a gradient for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 12, bias=False)
        self.embed.weight.requires_grad_(False)
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.leave = nn.Linear(12, 12, bias=False)
        self.leave.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = torch.tanh(block(x)) * self.scale.detach()
        return self.leave(x).sum(1, keepdim=True)


def tied_frozen() -> weft.Workload:
    return dataclasses.replace(unused(), model=Tied)


def perceptron(first: int, last: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(first, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, last))


def adversaries() -> weft.Workload:
    """A GAN's loss: two modules of a dictionary, one of them called twice, the dictionary itself never."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, _ = batch
        made = model["generator"](x[:, :4])
        real, fake = model["critic"](x), model["critic"](made)
        return F.softplus(-real).mean() + F.softplus(fake).mean() + (made - x).square().mean()

    return dataclasses.replace(
        mlp(),
        model=lambda: nn.ModuleDict({"generator": perceptron(4, 12), "critic": perceptron(12, 1)}),
        loss=loss,
        optimizer=adamw,
    )


class Towers(nn.Module):
    """Two towers that meet in the loss; the model's own forward is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = perceptron(6, 8), perceptron(6, 8)
        self.temperature = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.ones(8))


def towers() -> weft.Workload:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, _ = batch
        a, b = model.text(x[:, :6]) + model.shift, model.image(x[:, 6:])
        return (1 - F.cosine_similarity(a, b, dim=-1) * model.temperature).square().mean()

    return dataclasses.replace(mlp(), model=Towers, loss=loss, optimizer=adamw)


def twice() -> weft.Workload:
    """A loss that calls the whole model twice."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.mse_loss(model(x), y) + (model(x) - model(x + 0.1)).square().mean()

    return dataclasses.replace(mlp(), loss=loss, optimizer=adamw)


def noisy() -> weft.Workload:
    """A diffusion's loss: noise and times from torch, numpy and Python, and a block that draws for itself."""
    import random

    import numpy as np

    class Jitter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(x)) * (1 + random.random())

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, _ = batch
        times = torch.tensor([random.random() for _ in range(len(x))], dtype=x.dtype)[:, None]
        level = float(np.random.rand())
        noise = torch.randn_like(x)
        return (model(x * (1 - times) + level * noise * times) - noise).square().mean() + level

    return dataclasses.replace(
        mlp(), model=lambda: nn.Sequential(*(Jitter() for _ in range(4))), loss=loss, optimizer=adamw
    )


class Sentences:
    """Rows of tokens of different lengths, with their names."""

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.rows = [torch.randint(1, 64, (3 + (7 * i) % 9,), generator=generator) for i in range(samples)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        return self.rows[i], f"row {i}"


def pad(rows: list[tuple[Tensor, str]]) -> Any:
    """A batch in a dict-like object, as long as its longest row."""
    from collections import UserDict

    longest = max(len(row) for row, _ in rows)
    ids = torch.stack([F.pad(row, (0, longest - len(row))) for row, _ in rows])
    return UserDict({"input_ids": ids, "names": [name for _, name in rows], "more": (None, {"mask": ids > 0}), "n": 3})


def sentences() -> weft.Workload:
    """Every microbatch has another length, on every replica, and so has every step."""

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        ids, mask = batch["input_ids"], batch["more"][1]["mask"]
        assert len(batch["names"]) == len(ids)
        assert batch["n"] == 3
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        labels = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
        total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")
        return total, (labels != -100).sum()

    return dataclasses.replace(llama(), data=Sentences(40), collate=pad, loss=loss)


class Unlabelled(Tokens):
    """Rows of which the first of every eight alone has labels: some replicas have nothing to count."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        labels = self.rows[i].clone()
        labels[1 if i % 8 else 4 :] = -100
        return {"input_ids": self.rows[i], "labels": labels}


def unlabelled() -> weft.Workload:
    return dataclasses.replace(padded(), data=Unlabelled(64, 12, 64), shuffle=False)
