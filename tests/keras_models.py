"""Keras models for the tests, one per way of writing them."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "torch"  # before keras is imported

import keras
import torch
import torch.nn.functional as F
from keras import layers
from torch import Tensor

from weft.workload import Workload


class Samples:
    """Thirty-two samples: vectors, or words of differing length, filled up with zeros."""

    def __init__(self, words: bool) -> None:
        self.words = words

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(i)
        x = torch.randn(16, generator=source)
        if self.words:
            x = torch.randint(1, 20, (6,), generator=source)
            x[3 + i % 4 :] = 0
        return {"x": x, "y": torch.randint(10, (), generator=source)}


def functional() -> keras.Model:
    """Skips, and a layer that is called twice."""
    x = keras.Input((16,))
    y = layers.Dense(32, activation="relu")(x)
    shared = layers.Dense(32, activation="tanh", name="shared")
    y = layers.Add()([y, shared(layers.LayerNormalization()(shared(y)))])
    return keras.Model(x, layers.Dense(10)(y + layers.Dense(32)(y)))


class Block(layers.Layer):
    """Draws random numbers inside a unit, with and without a seed of its own."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.norm = layers.LayerNormalization()
        self.up = layers.Dense(4 * width, activation="gelu")
        self.drops = [layers.Dropout(rate), layers.Dropout(rate, seed=3), layers.GaussianNoise(rate)]
        self.down = layers.Dense(width)

    def call(self, x: Tensor, training: bool | None = None) -> Tensor:
        y = self.up(self.norm(x))
        for drop in self.drops:
            y = drop(y, training=training)
        return x + self.down(y)


class Blocks(keras.Model):
    """Layers in a list, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [Block(16, 0.1) for _ in range(4)]
        self.head = layers.Dense(10)

    def call(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def subclassed() -> keras.Model:
    model = Blocks()
    model(torch.zeros(2, 16))
    model.blocks[1].up.trainable = False
    return model


class Reader(keras.Model):
    """Masks travel on the tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.words = layers.Embedding(20, 16, mask_zero=True)
        self.attention = layers.MultiHeadAttention(2, 8)
        self.dense = layers.Dense(16)
        self.memory = layers.LSTM(16)
        self.head = layers.Dense(10)

    def call(self, x: Tensor) -> Tensor:
        y = self.words(x)
        return self.head(self.memory(self.dense(self.attention(y, y))))


def masked() -> keras.Model:
    model = Reader()
    model(torch.ones(2, 6, dtype=torch.int32))
    return model


def sequential() -> keras.Model:
    return keras.Sequential(
        [keras.Input((16,)), *(layers.Dense(32, activation="relu") for _ in range(3)), layers.Dense(10)]
    )


FAMILIES = {"functional": functional, "subclassed": subclassed, "masked": masked, "sequential": sequential}


def workload(family: str) -> Workload:
    return Workload(
        model=FAMILIES[family],
        loss=lambda model, batch: F.cross_entropy(model(batch["x"], training=True), batch["y"]),
        data=Samples(words=family == "masked"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=8,
    )
