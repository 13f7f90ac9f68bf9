"""What the odd models of the tests have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 8


class Layers(nn.Module):
    """An entrance, five layers, an exit; subclasses say what happens in between."""

    layer: Callable[[], nn.Module] = staticmethod(lambda: nn.Linear(WIDTH, WIDTH))

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(12, WIDTH)
        self.layers = nn.ModuleList(self.layer() for _ in range(5))
        self.leave = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.middle(self.enter(x)))

    def middle(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def squares(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])
