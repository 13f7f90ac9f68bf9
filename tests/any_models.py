"""Models that do what models do: drop layers, route by value, write in place, return objects of their own."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import workloads
from autograd_models import Latents, Reversible, Written
from layers import WIDTH, Layers, squares
from torch import Tensor, library, nn

import weft


class GlueDropout(Layers):
    """Dropout between units."""

    def middle(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.dropout(torch.tanh(layer(x)), 0.3)
        return x


class Remade(Layers):
    """The first forward puts a module in the place of another and draws numbers, before dropout does."""

    def __init__(self) -> None:
        super().__init__()
        self.act: nn.Module = nn.Identity()

    def middle(self, x: Tensor) -> Tensor:
        if isinstance(self.act, nn.Identity):
            nn.Linear(2, 2)  # its weights are drawn
            self.act = nn.Tanh()
        for layer in self.layers:
            x = x + F.dropout(self.act(layer(x)), 0.3)
        return x


class LayerDrop(Layers):
    """Layers left out at random, with dropout between those that stay."""

    def middle(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and torch.rand([]) < 0.4:
                continue
            x = x + F.dropout(torch.tanh(layer(x)), 0.3)
        return x


class CheckedLayerDrop(Layers):
    """Layers left out at random by code that looks at what layers give."""

    def middle(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and torch.rand([]) < 0.4:
                continue
            y = torch.tanh(layer(x))
            if not y.isfinite().all():
                raise ArithmeticError
            x = x + y
        return x


class PythonDrop(Layers):
    """The same, by Python's own random numbers, which a layer draws, too."""

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * random.uniform(0.5, 1.5)

    layer = staticmethod(lambda: PythonDrop.Layer(WIDTH, WIDTH))

    def middle(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if random.random() > 0.4:
                x = x + torch.tanh(layer(x))
        return x


class Experts(nn.Module):
    """Rows go to one of three experts, by value; one without rows is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows = (chosen == expert).nonzero().squeeze(1)
            out.index_add_(0, rows, self.experts[expert](x[rows]) * weights[rows, None])
        return out


class Routed(Layers):
    layer = Experts


class Looks(Layers):
    """Code between units looks at what units gave, and at a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bound", torch.full((), 0.75))

    def middle(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            y = torch.tanh(layer(x))
            scale = 1.0 if bool(y.isfinite().all()) else 0.0
            x = x + y * scale if x.mean().item() > -100 else y * i
        return x * float(self.bound)


class InPlace(Layers):
    """Writes in place to what units return and to what stages receive."""

    def middle(self, x: Tensor) -> Tensor:
        x *= 0.5
        for layer in self.layers:
            y = layer(x)
            y[:, :2].mul_(3)
            x = torch.relu_(y.add_(1)) + x
            x += 1
        return x


@dataclass
class State:
    """What a layer gives: an object PyTorch does not know."""

    hidden: Tensor
    notes: dict[str, Any]


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, *, state: State, nothing: None = None) -> tuple[State, None, str]:
        hidden = torch.tanh(self.linear(state.hidden)) + state.notes["first"]
        return State(hidden, {**state.notes, "count": state.notes["count"] + 1, "last": [hidden * 2]}), nothing, "text"


class Objects(Layers):
    """Units are called by keyword and return objects, None and text."""

    layer = Stateful

    def middle(self, x: Tensor) -> Tensor:
        state = State(x, {"first": x * 0.1, "count": 0})
        for layer in self.layers:
            state, nothing, text = layer(state=state, nothing=None)
            assert nothing is None
            assert text == "text"
        assert state.notes["count"] == 5
        return state.hidden + state.notes["last"][0]


class Table:
    """What layers share."""

    def __init__(self) -> None:
        self.entries: dict[str, Tensor] = {}


class Sharing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, table: Table) -> Tensor:
        y = torch.tanh(self.linear(x))
        if "first" in table.entries:
            y = y * table.entries["first"]
        table.entries.setdefault("first", y + 1)
        table.entries["last"] = y * 2
        return x + y


class Shares(Layers):
    """Layers leave tensors for each other in an object."""

    layer = Sharing

    def middle(self, x: Tensor) -> Tensor:
        table = Table()
        for layer in self.layers:
            x = layer(x, table)
        return x + table.entries["last"]


@library.custom_op("kernels::halve", mutates_args=())
def halve(x: Tensor) -> Tensor:
    """A kernel that has no version for fake tensors and reads memory itself."""
    return torch.from_numpy(x.detach().numpy() * 0.5)


halve.register_autograd(lambda ctx, gradient: gradient * 0.5)


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return halve(super().forward(x).contiguous())


class Kernels(Layers):
    """Units with a custom kernel."""

    layer = staticmethod(lambda: Halved(WIDTH, WIDTH))


class Direct(Layers):
    """Units are run by their forward, past their hooks."""

    def middle(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer.forward(x))
        return x


class Dead(Layers):
    """What some layers compute is given to others, which do not use it."""

    class Layer(nn.Linear):
        def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
            return torch.tanh(super().forward(x))

    layer = staticmethod(lambda: Dead.Layer(WIDTH, WIDTH))

    def middle(self, x: Tensor) -> Tensor:
        side = self.layers[1](self.layers[0](x))
        for layer in self.layers[2:]:
            x = layer(x, side)
        return x


class Towers(nn.Module):
    """Two towers with one encoder between them."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(12, WIDTH)
        self.right = nn.Linear(12, WIDTH)
        self.encoder = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def encode(self, x: Tensor) -> Tensor:
        for layer in self.encoder:
            x = torch.tanh(layer(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.encode(self.left(x)), self.encode(self.right(x.flip(1)))
        return (a * b).sum(1, keepdim=True)


class Repeated(nn.Module):
    """One block in a list of one, called again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.ModuleList([nn.Sequential(nn.Linear(12, 12), nn.Tanh())])
        self.leave = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = x + self.groups[0](x)
        return self.leave(x)


def adversarial(model: nn.Module, batch: Any) -> Tensor:
    """Two modules of a ModuleDict, neither of them the model."""
    x, y = batch
    noise = torch.randn_like(x)
    made = model["generator"](noise)
    wrong = model["critic"](made)
    right = model["critic"](x)
    return F.softplus(wrong).mean() + F.softplus(-right).mean() + F.mse_loss(made[:, :1], y)


def pair() -> nn.Module:
    def mlp(out: int) -> nn.Module:
        return nn.Sequential(nn.Linear(12, WIDTH), nn.Tanh(), nn.Linear(WIDTH, out))

    return nn.ModuleDict({"generator": mlp(12), "critic": mlp(1)})


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "glue dropout": (GlueDropout, squares),
    "layer drop": (LayerDrop, squares),
    "remade": (Remade, squares),
    "checked layer drop": (CheckedLayerDrop, squares),
    "python drop": (PythonDrop, squares),
    "routed": (Routed, squares),
    "looks": (Looks, squares),
    "in place": (InPlace, squares),
    "objects": (Objects, squares),
    "shares": (Shares, squares),
    "kernels": (Kernels, squares),
    "direct": (Direct, squares),
    "dead": (Dead, squares),
    "towers": (Towers, squares),
    "repeated": (Repeated, squares),
    "reversible": (Reversible, squares),
    "written": (Written, squares),
    "latents": (Latents, squares),
    "adversarial": (pair, adversarial),
}


def workload(name: str) -> weft.Workload:
    model, loss = MODELS[name]
    return weft.Workload(model=model, loss=loss, data=workloads.Points(64, 12), optimizer=workloads.adamw, batch_size=8)


class Text(nn.Module):
    """Tokens in rows of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(32, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x)
        for layer in self.layers:
            h = h + torch.tanh(layer(h)).mean(1, keepdim=True)
        return self.head(h)


class Rows:
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        row = torch.arange(6) * (i + 1) % 32
        return {"x": row, "y": row}


def lengths() -> weft.Workload:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())

    return weft.Workload(model=Text, loss=loss, data=Rows(), optimizer=workloads.adamw, batch_size=8)
