"""Workloads beside transformers' language models and image classifiers: the ways other models are written."""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")  # Keras reads it when it is first imported

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weft

BATCH, SAMPLES, VOCABULARY, WIDTH, LENGTH = 8, 16, 128, 64, 16


class Rows:
    """A map-style data set of tensors with the samples in dimension 0."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: column[i] for name, column in self.columns.items()}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Plain, so that a parameter changes by its gradient."""
    return torch.optim.SGD(parameters, lr=0.1)


def workload(model: Callable[[], nn.Module], loss: Callable[..., Any], data: Rows) -> weft.Workload:
    """What all workloads of the zoo have in common."""
    return weft.Workload(model=model, loss=loss, data=data, optimizer=sgd, batch_size=BATCH, shuffle=False)


def noise(*shape: int, seed: int = 7) -> Tensor:
    """Normal noise."""
    return torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(seed))


def whole(most: int, *shape: int, seed: int = 7) -> Tensor:
    """Whole numbers below ``most``."""
    return torch.randint(most, (SAMPLES, *shape), generator=torch.Generator().manual_seed(seed))


def unet() -> weft.Workload:
    """A U-Net with cross attention that predicts noise drawn in the loss."""
    from diffusers import UNet2DConditionModel

    def model() -> nn.Module:
        return UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
        )

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        drawn = torch.randn_like(batch["image"])
        noisy = batch["image"] + drawn
        return F.mse_loss(model(noisy, batch["time"], batch["text"]).sample, drawn)

    return workload(model, loss, Rows(image=noise(4, 16, 16), time=whole(1000), text=noise(6, 32, seed=8)))


def dit() -> weft.Workload:
    """A diffusion transformer."""
    from diffusers import DiTTransformer2DModel

    def model() -> nn.Module:
        return DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            sample_size=16,
            patch_size=4,
            norm_num_groups=8,
        )

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        out = model(batch["image"], timestep=batch["time"], class_labels=batch["label"]).sample
        return F.mse_loss(out, batch["noise"])

    data = Rows(image=noise(4, 16, 16), noise=noise(4, 16, 16, seed=8), time=whole(1000), label=whole(10))
    return workload(model, loss, data)


def autoencoder() -> weft.Workload:
    """A variational autoencoder with its draw in the loss."""
    from diffusers import AutoencoderKL

    def model() -> nn.Module:
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=32,
        )

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        posterior = model.encode(batch["image"]).latent_dist
        restored = model.decode(posterior.sample()).sample
        return F.mse_loss(restored, batch["image"]) + 1e-3 * posterior.kl().mean()

    return workload(model, loss, Rows(image=noise(3, 32, 32)))


class Residual(nn.Module):
    """Two convolutions with batch normalisation beside a shortcut."""

    def __init__(self, enters: int, leaves: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(enters, leaves, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(leaves)
        self.second = nn.Conv2d(leaves, leaves, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(leaves)
        same = stride == 1 and enters == leaves
        self.shortcut = nn.Identity() if same else nn.Conv2d(enters, leaves, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [samples, channels, height, width]."""
        y = F.relu(self.norm1(self.first(x)))
        return F.relu(self.norm2(self.second(y)) + self.shortcut(x))


def resnet() -> weft.Workload:
    """A ResNet with batch normalisation, in plain PyTorch."""

    def model() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            Residual(32, 32, 1),
            Residual(32, 32, 1),
            Residual(32, 64, 2),
            Residual(64, 64, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["image"]), batch["label"])

    return workload(model, loss, Rows(image=noise(3, 16, 16), label=whole(10)))


class RecurrentLM(nn.Module):
    """Embedding, LSTM layers, output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(nn.LSTM(WIDTH, WIDTH, batch_first=True) for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [samples, length]; logits: [samples, length, VOCABULARY]."""
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)[0]
        return self.head(x)


def lstm() -> weft.Workload:
    """A recurrent language model."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["ids"])
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten())

    return workload(RecurrentLM, loss, Rows(ids=whole(VOCABULARY, LENGTH)))


class TwoTower(nn.Module):
    """One encoder runs on both inputs; each has a projection of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True) for _ in range(4)
        )
        self.query, self.document = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def encode(self, ids: Tensor) -> Tensor:
        """ids: [samples, length]; one vector per sample."""
        x = self.embed(ids)
        for layer in self.encoder:
            x = layer(x)
        return x.mean(1)

    def forward(self, query: Tensor, document: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of both towers."""
        return self.query(self.encode(query)), self.document(self.encode(document))


def two_tower() -> weft.Workload:
    """Two towers with a shared encoder, trained on pairs that match or do not."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        query, document = model(batch["query"], batch["document"])
        return F.binary_cross_entropy_with_logits((query * document).mean(-1), batch["match"].float())

    data = Rows(
        query=whole(VOCABULARY, LENGTH), document=whole(VOCABULARY, LENGTH // 2, seed=8), match=whole(2, seed=9)
    )
    return workload(TwoTower, loss, data)


def _tower(*widths: int) -> nn.Sequential:
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*(layer for pair in pairs for layer in (nn.Linear(*pair), nn.LeakyReLU(0.2))))


def gan() -> weft.Workload:
    """A generator and a discriminator in one loss: the discriminator runs three times, once on a detached input."""

    def model() -> nn.Module:
        return nn.ModuleDict({"generator": _tower(16, 64, 64, 32), "discriminator": _tower(32, 64, 64, 1)})

    def loss(model: nn.ModuleDict, batch: dict[str, Tensor]) -> Tensor:
        made = model["generator"](batch["noise"])
        real, fake = model["discriminator"](batch["real"]), model["discriminator"](made.detach())
        return (F.softplus(-real) + F.softplus(fake) + 0.1 * F.softplus(-model["discriminator"](made))).mean()

    return workload(model, loss, Rows(noise=noise(16), real=noise(32, seed=8)))


def keras_functional() -> weft.Workload:
    """A Keras functional model on the torch backend, with a branch and a merge."""
    import keras

    def model() -> nn.Module:
        image = keras.Input((16, 16, 3))
        x = keras.layers.Conv2D(16, 3, padding="same", activation="relu")(image)
        x = keras.layers.BatchNormalization()(x)
        y = keras.layers.Conv2D(16, 3, padding="same", activation="relu")(x)
        x = keras.layers.Add()([x, y])
        x = keras.layers.GlobalAveragePooling2D()(x)
        for _ in range(4):
            y = keras.layers.Dense(64, activation="gelu")(x)
            x = keras.layers.Add()([x, keras.layers.Dense(16)(y)])
            x = keras.layers.LayerNormalization()(x)
        return keras.Model(image, keras.layers.Dense(10)(x))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["image"], training=True), batch["label"])

    return workload(model, loss, Rows(image=noise(16, 16, 3), label=whole(10)))


def lora() -> weft.Workload:
    """A Llama whose weights are frozen beside low-rank adapters."""
    peft, transformers = importlib.import_module("peft"), importlib.import_module("transformers")

    def model() -> nn.Module:
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        adapters = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(transformers.LlamaForCausalLM(config), adapters)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["ids"], use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten())

    return workload(model, loss, Rows(ids=whole(VOCABULARY, LENGTH)))


OTHERS: dict[str, Callable[[], weft.Workload]] = {
    "diffusers/unet2d_condition": unet,
    "diffusers/dit": dit,
    "diffusers/autoencoder_kl": autoencoder,
    "torch/resnet_batchnorm": resnet,
    "torch/lstm_lm": lstm,
    "torch/two_tower": two_tower,
    "torch/gan": gan,
    "keras/functional": keras_functional,
    "peft/lora_llama": lora,
}
"""Names and factories."""
