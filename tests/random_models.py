"""Random small models and plans, each a function of one number.

Models vary in depth, skips, shared blocks, tied weights, branches that merge, modules called twice, parameters the glue
reads, frozen and unused ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workloads import Points

import weft
from weft.capture import capture
from weft.cluster import Cluster
from weft.errors import PlanError
from weft.plan import Plan
from weft.planner import make_plan

WIDTH = 8


class Residual(nn.Module):
    """x + down(act(up(norm(x))))."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    """Heads over two halves of the features as a sequence of two, from one fused projection."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(WIDTH // 2, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        sequence = x.unflatten(-1, (2, WIDTH // 2))
        q, k, v = self.qkv(sequence).split(WIDTH, dim=-1)
        q, k, v = (t.view(len(x), 2, self.heads, WIDTH // self.heads).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), 2, WIDTH)
        return x + self.out(mixed).flatten(1)


class Split(nn.Module):
    """Two results, one of them optional, in a dict."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.both = both
        self.left = nn.Linear(WIDTH, WIDTH)
        self.right = nn.Linear(WIDTH, WIDTH)

    def forward(self, *, x: Tensor) -> dict[str, Tensor | int | None]:
        return {"left": torch.tanh(self.left(x)), "right": self.right(x) if self.both else None, "width": WIDTH}


class RandomModel(nn.Module):
    """A program over numbered values; every line applies a module or merges two values."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList()
        self.merges = nn.ModuleList()
        self.gates = nn.ParameterList()
        self.program: list[tuple[Any, ...]] = []
        values = 1
        for _ in range(draw.randint(3, 9)):
            near = values - 1 if draw.random() < 0.7 else draw.randrange(values)
            other = draw.randrange(values)
            match draw.choice(["block", "block", "block", "again", "cat", "add", "gate", "split"]):
                case "again" if len(self.blocks):
                    self.program.append(("block", draw.randrange(len(self.blocks)), near))
                case "cat":
                    self.merges.append(nn.Linear(2 * WIDTH, WIDTH))
                    self.program.append(("cat", len(self.merges) - 1, near, other))
                case "add":
                    self.program.append(("add", near, other))
                case "gate":
                    self.gates.append(nn.Parameter(torch.rand(WIDTH)))
                    self.program.append(("gate", len(self.gates) - 1, near))
                case _:
                    self.blocks.append(self._block(draw))
                    self.program.append(("block", len(self.blocks) - 1, near))
            values += 1
        self.leave = nn.Linear(WIDTH, 1)
        self.unused = nn.Linear(2, 2) if draw.random() < 0.2 else None
        self._tie(draw)

    def _block(self, draw: random.Random) -> nn.Module:
        match draw.choice(["residual", "residual", "linear", "attention", "split"]):
            case "residual":
                return Residual(draw.choice([12, 16]))
            case "linear":
                return nn.Linear(WIDTH, WIDTH, bias=draw.random() < 0.5)
            case "attention":
                return Attention(draw.choice([2, 4]))
            case _:
                return Split(draw.random() < 0.5)

    def _tie(self, draw: random.Random) -> None:
        linears = [m for m in self.blocks if isinstance(m, nn.Linear)]
        if len(linears) > 1 and draw.random() < 0.5:
            linears[-1].weight = linears[0].weight
        if draw.random() < 0.2:
            self.enter.requires_grad_(False)
        if len(self.blocks) > 2 and draw.random() < 0.2:
            draw.choice(list(self.blocks)[:-1]).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        values = [torch.tanh(self.enter(x))]
        for line in self.program:
            match line:
                case ("block", i, a):
                    block = self.blocks[i]
                    if isinstance(block, Split):
                        result = block(x=values[a])
                        y = result["left"] + (0 if result["right"] is None else result["right"].relu())
                    else:
                        y = block(values[a])
                case ("cat", i, a, b):
                    y = self.merges[i](torch.cat([values[a], values[b]], dim=-1))
                case ("add", a, b):
                    y = (values[a] + values[b]) * 0.5
                case ("gate", i, a):
                    y = values[a] * self.gates[i]
            values.append(y)
        return self.leave(values[-1])


def workload_of(seed: int) -> weft.Workload:
    """The workload of a seed: losses are means or sums with counts, batches are sometimes not divisible."""
    draw = random.Random(seed * 7919 + 1)
    counted, clipped = draw.random() < 0.5, draw.random() < 0.5

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
        x, y = batch
        if not counted:
            return F.mse_loss(model(x), y)
        wanted = (y > -0.5).to(x.dtype)
        return ((model(x) - y).square() * wanted).sum(), wanted.sum()

    return weft.Workload(
        model=lambda: RandomModel(seed),
        loss=loss,
        data=Points(26, WIDTH),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        batch_size=draw.choice([8, 8, 10, 13]),
        max_grad_norm=0.5 if clipped else None,
        seed=seed,
    )


DEGREES = ("pp", "dp_replicate", "dp_shard", "tp")


def plan_of(seed: int, workload: weft.Workload) -> Plan:
    """A random plan for the workload of a seed, of at most four devices; degrees the model does not take are drawn
    again."""
    draw = random.Random(seed * 104729 + 2)
    profile = capture(workload)
    while True:
        degrees = dict.fromkeys(DEGREES, 1)
        for _ in range(draw.choice([1, 2, 2])):
            degrees[draw.choice(DEGREES)] *= 2
        if draw.random() < 0.15:
            degrees = {**dict.fromkeys(DEGREES, 1), "pp": 3}
        microbatches = draw.choice([1, 2, 3])
        devices = degrees["pp"] * degrees["dp_replicate"] * degrees["dp_shard"] * degrees["tp"]
        try:
            plan = make_plan(profile, Cluster.local(devices=devices), microbatches=microbatches, **degrees)
        except PlanError:
            continue
        calls = [call for stage in plan.stages for call in stage]
        cuts = sorted(draw.sample(range(1, len(calls)), plan.pp - 1))
        ends = [0, *cuts, len(calls)]
        stages = tuple(tuple(calls[a:b]) for a, b in itertools.pairwise(ends))
        schedule = draw.choice(["gpipe", "1f1b"])
        return dataclasses.replace(plan, stages=stages, schedule=schedule)
