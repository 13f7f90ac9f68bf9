"""A Keras model learns to read digits: on one device, and on four under a hybrid plan.

python examples/keras_mlp.py
"""

import os

os.environ["KERAS_BACKEND"] = "torch"  # before keras is imported

import keras
import torch
import torch.nn.functional as F
from digits import Digits
from torch import Tensor

import weft
from weft.adapters import adapt


def mlp(width: int) -> keras.Model:
    image = keras.Input((1, 8, 8))
    x = keras.layers.Flatten()(image)
    x = keras.layers.Dense(width, activation="relu")(x)
    for _ in range(3):
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.Dense(width, activation="relu")(y)
        x = keras.layers.Add()([x, y])
    return keras.Model(image, keras.layers.Dense(10)(x))


def loss(model: keras.Model, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["image"], training=True), batch["label"])


def workload(width: int = 128, batch_size: int = 64, lr: float = 1e-3) -> weft.Workload:
    return weft.Workload(
        model=lambda: mlp(width),
        loss=loss,
        data=Digits(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr),
        batch_size=batch_size,
    )


def train(degrees: dict[str, int], devices: int, epochs: int) -> tuple[float, dict[str, Tensor]]:
    """Run by every process of a job: the loss of the last step, and on rank 0 the trained weights."""
    work = workload()
    plan = weft.plan(work, weft.Cluster.local(devices=devices), **degrees)
    engine = weft.parallelize(work, plan)
    losses = [float(engine.step(batch)) for batch in engine.batches(epochs)]
    return losses[-1], engine.state_dict()


if __name__ == "__main__":
    test = Digits(test=True)
    model = adapt(mlp(width=128))  # its layers get the names that weft gives them
    print(f"{'plan':<24}{'last loss':>12}{'accuracy':>12}")
    for degrees, devices in (({}, 1), ({"pp": 2, "dp_shard": 2}, 4)):
        last_loss, weights = weft.launch(train, degrees, devices, 10, devices=devices)[0]
        model.load_state_dict(weights)
        with torch.no_grad():
            right = (model(test.images).argmax(1) == test.labels).float().mean()
        name = " ".join(f"{name}={degree}" for name, degree in degrees.items()) or "one device"
        print(f"{name:<24}{last_loss:>12.6f}{right:>12.2%}", flush=True)
