"""A tiny model in float64 whose processes can be told to die: FAULT is ``where:step:rank:how``, for a job's first
attempt, or with FAULT_ALWAYS for each; several with commas between are for one attempt after the other. ``how`` is a
signal, ``busy`` (compute for a while) or ``idle`` (do nothing any more); steps are those that the process has done."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import weft
from weft.jobs.reference import in_dtype

FAULT = "FAULT"
STEPS = [0]
"""Steps that the optimizer of this process has begun."""


BUSY_S = 6.0
"""Longer than the timeout of those who ask for it."""


def trip(where: str) -> None:
    """Die here, if this is where and when."""
    faults = os.environ.get(FAULT, "").split(",")
    attempt = 0 if "FAULT_ALWAYS" in os.environ else int(os.environ.get("TORCHELASTIC_RESTART_COUNT", len(faults)))
    if FAULT not in os.environ or attempt >= len(faults):
        return
    place, step, rank, how = faults[attempt].split(":")
    if (place, int(step), rank) == (where, STEPS[0], os.environ.get("RANK")):
        match how:
            case "busy":
                del os.environ[FAULT]  # once is enough
                end = time.monotonic() + BUSY_S
                while time.monotonic() < end:
                    pass
            case "idle":
                time.sleep(600)
            case _:
                os.kill(os.getpid(), getattr(signal, how))


class Trap(torch.autograd.Function):
    """Passes values on; dies on the way there or back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if not isinstance(x, FakeTensor):
            trip("forward")
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if not isinstance(gradient, FakeTensor):
            trip("backward")
        return gradient


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(Trap.apply(self.norm(x)))))


class Model(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        trip("model")
        self.embed = nn.Embedding(32, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class AdamW(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        trip("optimizer")
        STEPS[0] += 1
        return super().step(closure)


class Rows:
    def __init__(self) -> None:
        self.rows = torch.randint(32, (96, 8), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"ids": self.rows[index]}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["ids"])[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten())


def workload(layers: int = 4, width: int = 32) -> weft.Workload:
    plain = weft.Workload(
        model=lambda: Model(layers, width),
        loss=loss,
        data=Rows(),
        optimizer=lambda parameters: AdamW(parameters, lr=3e-3),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9),
        batch_size=12,
        max_grad_norm=1.0,
    )
    return in_dtype(plain, torch.float64)


trip("import")
