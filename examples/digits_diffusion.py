"""A small U-Net learns to draw digits by flow matching: on one device, and on four under a hybrid plan.

    python examples/digits_diffusion.py        # writes digits.png

A picture x becomes noise e along the straight line (1 - t) x + t e. The network learns the line's direction, e - x,
from the point on it, the time t and the label; to draw, one starts in noise and walks the line back.
"""

import sys

import torch
import torch.nn.functional as F
from digits import Digits
from PIL import Image
from torch import Tensor, nn

import weft
from weft.jobs.reference import SingleDevice

# B batch, C channels, H W pixels, D features of time and label


class Block(nn.Module):
    def __init__(self, width_in: int, width: int, features: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width_in)
        self.conv_1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.when = nn.Linear(features, width)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width, 1)

    def forward(self, x_BCHW: Tensor, when_BD: Tensor) -> Tensor:
        y_BCHW = self.conv_1(F.silu(self.norm(x_BCHW))) + self.when(when_BD)[:, :, None, None]
        return self.skip(x_BCHW) + self.conv_2(F.silu(y_BCHW))


class UNet(nn.Module):
    def __init__(self, width: int, features: int = 64) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, features), nn.SiLU(), nn.Linear(features, features))
        self.label = nn.Embedding(10, features)
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.ModuleList([Block(width, width, features), Block(width, 2 * width, features)])
        self.middle = Block(2 * width, 2 * width, features)
        self.up = nn.ModuleList([Block(4 * width, width, features), Block(2 * width, width, features)])
        self.head = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, label_B: Tensor) -> Tensor:
        when_BD = F.silu(self.time(t_B[:, None]) + self.label(label_B))
        x = self.stem(x_BCHW)
        skips = []
        for block in self.down:
            x = block(x, when_BD)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x, when_BD)
        for block in self.up:
            x = F.interpolate(x, scale_factor=2)
            x = block(torch.cat([x, skips.pop()], dim=1), when_BD)
        return self.head(x)


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    image = batch["image"]
    noise, t_B = torch.randn_like(image), torch.rand(len(image), dtype=image.dtype, device=image.device)
    t = t_B[:, None, None, None]
    return F.mse_loss(model((1 - t) * image + t * noise, t_B, batch["label"]), noise - image)


def workload(width: int = 32, batch_size: int = 64, lr: float = 2e-3) -> weft.Workload:
    return weft.Workload(
        model=lambda: UNet(width),
        loss=loss,
        data=Digits(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr),
        batch_size=batch_size,
        max_grad_norm=1.0,
    )


@torch.no_grad()
def draw(model: nn.Module, label_B: Tensor, steps: int = 50) -> Tensor:
    """Pictures of these labels, from noise."""
    x = torch.randn(len(label_B), 1, 8, 8)
    for i in range(steps, 0, -1):
        x -= model(x, torch.full((len(x),), i / steps), label_B) / steps
    return x


def picture(images: Tensor, columns: int, path: str) -> None:
    """Write pictures in [-1, 1] as one, in rows, each pixel four wide and a black pixel around each picture."""
    framed = F.pad(images.clamp(-1, 1), (1, 1, 1, 1), value=-1)
    rows = (127.5 * (framed + 1)).byte().view(-1, columns, 10, 10).transpose(1, 2)
    whole = rows.reshape(-1, columns * 10).numpy()
    Image.fromarray(whole).resize((4 * whole.shape[1], 4 * whole.shape[0]), Image.Resampling.NEAREST).save(path)


def train(plan: weft.Plan, epochs: int) -> tuple[list[float], dict[str, Tensor]]:
    """Run by every process of a job: the loss of every step, and on rank 0 the trained weights."""
    engine = weft.parallelize(workload(), plan)
    return [float(engine.step(batch)) for batch in engine.batches(epochs)], engine.state_dict()


def train_alone(plan: weft.Plan, epochs: int) -> tuple[list[float], dict[str, Tensor]]:
    """The same in plain PyTorch on one device, which draws the noise and times that the plan's devices draw."""
    alone = SingleDevice(workload(), torch.device("cpu"), plan=plan)
    steps = alone.steps(epochs * alone.sampler.steps_per_epoch)
    return [step.loss for step in steps], alone.model.state_dict()


def main(epochs: int = 24, file: str = "digits.png") -> None:
    plan = weft.plan(workload(), weft.Cluster.local(devices=4), pp=2, dp_replicate=2)
    labels = torch.arange(10).repeat(4)
    print(f"{'plan':<24}{'last loss':>12}{'loss on test pictures':>24}")
    images = []
    for name in ("one device", "pp=2 dp_replicate=2"):
        alone = name == "one device"
        losses, weights = train_alone(plan, epochs) if alone else weft.launch(train, plan, epochs, devices=4)[0]
        model = UNet(width=32)
        model.load_state_dict(weights)
        torch.manual_seed(0)
        test = Digits(test=True)
        with torch.no_grad():
            tested = loss(model, {"image": test.images, "label": test.labels})
        images.append(draw(model, labels))
        print(f"{name:<24}{losses[-1]:>12.6f}{tested:>24.6f}", flush=True)
    picture(torch.cat(images), 10, file)
    print(f"{file}: the first four rows drawn by the first model, the others by the second, from the same noise")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
