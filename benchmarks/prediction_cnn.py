"""A residual network with BatchNorm for pictures of 32 by 32 pixels: a model whose work is convolutions, and whose
batch statistics are taken over all replicas."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import weft


class Block(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        stride = 1 if width == width_in else 2
        self.conv_1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm_1 = nn.BatchNorm2d(width)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_2 = nn.BatchNorm2d(width)
        self.skip = nn.Identity() if width == width_in else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm_1(self.conv_1(x)))
        return F.relu(self.skip(x) + self.norm_2(self.conv_2(y)))


class Network(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        widths = [width, *(width << stage for stage in range(3) for _ in range(depth))]
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


class Pictures(Dataset):
    """Noise with labels."""

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(samples, 3, 32, 32, generator=generator)
        self.labels = torch.randint(10, (samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"images": self.images[i], "labels": self.labels[i]}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["images"]), batch["labels"])


def workload(width: int = 32, depth: int = 2, batch_size: int = 32) -> weft.Workload:
    return weft.Workload(
        model=lambda: Network(width, depth),
        loss=loss,
        data=Pictures(256),
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9),
        batch_size=batch_size,
    )
