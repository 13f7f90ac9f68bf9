"""A ResNet with BatchNorm learns to read digits: on one device, and on four under a hybrid plan.

In float64, so that the two trainings stay together: in float32 two that differ in one rounding are apart by a
thousandth after ten steps, whatever the plan.

python examples/digits_cnn.py
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from digits import Digits
from torch import Tensor, nn

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


class ResNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width, width, width, 2 * width, 2 * width, 4 * width, 4 * width]
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["image"].double()), batch["label"])


def workload(width: int = 16, batch_size: int = 64, lr: float = 0.02) -> weft.Workload:
    return weft.Workload(
        model=lambda: ResNet(width).double(),
        loss=loss,
        data=Digits(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=1e-4),
        batch_size=batch_size,
    )


def train(degrees: dict[str, int], devices: int, epochs: int) -> tuple[float, dict[str, Tensor]]:
    """Run by every process of a job: the mean loss of the last epoch, and on rank 0 the trained weights."""
    work = workload()
    # BatchNorm sees a microbatch of all replicas at a time, so both plans cut the batch in two
    plan = weft.plan(work, weft.Cluster.local(devices=devices), microbatches=2, **degrees)
    engine = weft.parallelize(work, plan)
    losses = [float(engine.step(batch)) for batch in engine.batches(epochs)]
    last = losses[-engine.steps_per_epoch :]
    return sum(last) / len(last), engine.state_dict()


if __name__ == "__main__":
    test = Digits(test=True)
    print(f"{'plan':<24}{'last loss':>12}{'accuracy':>12}")
    for degrees, devices in (({}, 1), ({"pp": 2, "dp_replicate": 2}, 4)):
        last_loss, weights = weft.launch(train, degrees, devices, 8, devices=devices)[0]
        model = ResNet(width=16).double().eval()
        model.load_state_dict(weights)
        with torch.no_grad():
            right = (model(test.images.double()).argmax(1) == test.labels).float().mean()
        name = " ".join(f"{name}={degree}" for name, degree in degrees.items()) or "one device"
        print(f"{name:<24}{last_loss:>12.6f}{right:>12.2%}", flush=True)
