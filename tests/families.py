"""One small workload per family of models, beside those of workloads.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workloads import Tokens, adamw, causal_lm, code_lm, gpt2, llama, mlp

import weft

VOCABULARY = 64


class Images:
    """Random images and labels of ten classes."""

    def __init__(self, samples: int, size: int, channels: int = 3) -> None:
        generator = torch.Generator().manual_seed(7)
        self.images = torch.randn(samples, channels, size, size, generator=generator)
        self.labels = torch.randint(10, (samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"images": self.images[i], "labels": self.labels[i]}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def _workload(model: Any, loss: Any, data: Any, optimizer: Any = adamw) -> weft.Workload:
    return weft.Workload(model=model, loss=loss, data=data, optimizer=optimizer, batch_size=8, max_grad_norm=1.0)


def encoder() -> weft.Workload:
    """Bidirectional attention with dropout; the loss is over masked tokens, whose number differs between samples."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
    )

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids = batch["input_ids"]
        masked = ids % 5 == 0
        logits = model(input_ids=ids.masked_fill(masked, 3)).logits
        losses = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        return (losses * masked).sum(), masked.sum()

    return _workload(lambda: BertForMaskedLM(config), loss, Tokens(64, 12, VOCABULARY))


def encoder_decoder() -> weft.Workload:
    """An encoder whose output every block of the decoder reads; tied embeddings; relative positions."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
        use_cache=False,
    )

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(input_ids=batch["input_ids"], labels=batch["labels"][:, :7].contiguous()).loss

    return _workload(lambda: T5ForConditionalGeneration(config), loss, Tokens(64, 12, VOCABULARY))


def experts() -> weft.Workload:
    """A mixture of experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
    )
    return _workload(lambda: MixtralForCausalLM(config), causal_lm, Tokens(64, 12, VOCABULARY))


def classify(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    result = model(batch["images"])
    return F.cross_entropy(getattr(result, "logits", result), batch["labels"])


def vision_transformer() -> weft.Workload:
    """Patches, a class token, positions the glue adds."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        num_labels=10,
    )
    # Gradients of the keys' biases are zero but for rounding, and Adam would make steps of it.
    return _workload(lambda: ViTForImageClassification(config), classify, Images(64, 16), sgd)


class Block(nn.Module):
    """Two convolutions with batch normalisation, and a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(channels, out, 1, stride) if stride > 1 or channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """Stages of blocks, each wider than the last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.stages = nn.Sequential(
            nn.Sequential(Block(8, 8, 1), Block(8, 8, 1)), nn.Sequential(Block(8, 16, 2), Block(16, 16, 1))
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def batchnorm_cnn() -> weft.Workload:
    """Batch statistics, which replicas share."""
    return _workload(ResNet, classify, Images(64, 8))


def unet() -> weft.Workload:
    """Skips from the way down to the way up; noise and times are drawn in the loss."""
    from diffusers import UNet2DModel

    def model() -> nn.Module:
        return UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
        )

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        clean = batch["images"]
        noise, time = torch.randn_like(clean), torch.rand(len(clean), device=clean.device, dtype=clean.dtype)
        noisy = torch.lerp(clean, noise, time[:, None, None, None])
        return F.mse_loss(model(noisy, (time * 1000).long()).sample, noise - clean)

    return _workload(model, loss, Images(64, 8, channels=1))


class RecurrentLM(nn.Module):
    """Recurrent layers, each a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleList(nn.LSTM(16, 16, batch_first=True) for _ in range(3))
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        for layer in self.layers:
            y, _ = layer(x)
            x = x + y
        return self.head(x)


def lstm() -> weft.Workload:
    """Modules whose weights are in one fused operator."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    return _workload(RecurrentLM, loss, Tokens(64, 12, VOCABULARY))


def lora() -> weft.Workload:
    """A frozen model with small trained additions."""
    from peft import LoraConfig, get_peft_model

    base = llama()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return _workload(lambda: get_peft_model(base.model(), config), causal_lm, Tokens(64, 12, VOCABULARY))


def keras_layers() -> weft.Workload:
    """A functional Keras model."""
    import keras_models

    return keras_models.workload("functional")


FAMILIES = {
    "code_lm": code_lm,
    "mlp": mlp,
    "decoder": llama,
    "tied_decoder": gpt2,
    "encoder": encoder,
    "encoder_decoder": encoder_decoder,
    "experts": experts,
    "vision_transformer": vision_transformer,
    "batchnorm_cnn": batchnorm_cnn,
    "unet": unet,
    "lstm": lstm,
    "keras": keras_layers,
    "lora": lora,
}
