"""Models with autograd functions, views and in-place writes of their own."""

from __future__ import annotations

from typing import Any

import torch
from layers import WIDTH, Layers
from torch import Tensor, nn


class _Reversed(torch.autograd.Function):
    """Runs layers without keeping anything but the last result; every layer's inverse gives its input back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: nn.ModuleList) -> Tensor:
        ctx.layers = layers
        for layer in layers:
            x = layer(x)
        ctx.save_for_backward(x.detach())
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        for layer in reversed(ctx.layers):
            with torch.no_grad():
                x = layer.inverse(y)
            x.requires_grad = True
            with torch.enable_grad():
                torch.autograd.backward(layer.added(x), gradient)
            y, gradient = x.detach(), gradient + x.grad
        return gradient, None


class Coupling(nn.Module):
    """Adds to one half what it makes of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH // 2, WIDTH // 2)

    def added(self, x: Tensor) -> Tensor:
        half = torch.tanh(self.linear(x[..., : WIDTH // 2]))
        return torch.cat([torch.zeros_like(half), half], -1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.added(x)

    def inverse(self, y: Tensor) -> Tensor:
        return y - self.added(y)


class Reversible(Layers):
    """Layers inside an autograd function, which runs their parts again in its backward."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Coupling() for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            return _Reversed.apply(x, self.layers)

    def __init__(self) -> None:
        super().__init__()
        self.layers = self.Stack()

    def middle(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Written(Layers):
    """Code between layers looks at what it wrote a constant into."""

    def middle(self, x: Tensor) -> Tensor:
        flags = torch.ones(len(x))
        flags[flags == 2] = 0.0
        for layer in self.layers:
            if (flags > 0).any():
                x = x + torch.tanh(layer(x))
        return x


class Latents(nn.Module):
    """A unit that returns a view of its parameter, and one that reads another's."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.randn(3, WIDTH))

        def forward(self, count: int) -> Tensor:
            return self.rows.expand(count, -1, -1)

    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, WIDTH)

        def forward(self, x: Tensor, latents: Tensor, table: nn.Module) -> Tensor:
            weights = (self.linear(x)[:, None] * latents).sum(-1).softmax(-1)
            return weights @ table.rows

    def __init__(self) -> None:
        super().__init__()
        self.table, self.read = self.Table(), self.Read()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.leave = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(x, self.table(len(x)), self.table)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.leave(x)
