"""Models the capture tests record: small, of every shape of graph weft has to follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from examples.code_lm import CodeLM
from examples.code_lm import loss as code_loss

SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, vocab_size=32)
PAIRS = dict(num_key_value_heads=2)


class Case(NamedTuple):
    """A model, its loss and a batch of any number of samples."""

    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Any]
    batch: Callable[[int], dict[str, Tensor]]


class Skips(nn.Module):
    """Two stages down, two up, with skip connections over them."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 4), (4, 8))
        self.down = nn.ModuleList(Down(a, b) for a, b in widths)
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in ((8, 4), (8, 3)))
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for block in self.down:
            seen.append(block(seen[-1]))
        y = seen.pop()
        for block in self.up:
            y = torch.cat([block(y), seen.pop()], 1)
        return self.head(y)


class Down(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, 2, 1)
        self.norm = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu_()


class Twice(nn.Module):
    """A module called twice, a gate and a buffer the glue reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.gate = nn.Parameter(torch.ones(8))
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(self.a(x) * self.gate) + self.shift)


def _tokens(samples: int) -> dict[str, Tensor]:
    x = torch.arange(samples * 12).reshape(samples, 12) % 29 + 3
    mask = torch.ones_like(x)
    mask[1:, 8:] = 0
    return {"x": x, "y": x.clone(), "mask": mask}


def _images(samples: int) -> dict[str, Tensor]:
    return {"x": torch.linspace(-1, 1, samples * 192).reshape(samples, 3, 8, 8), "y": torch.arange(samples) % 2}


def _vectors(samples: int) -> dict[str, Tensor]:
    return {"x": torch.linspace(-1, 1, samples * 8).reshape(samples, 8), "y": torch.arange(samples) % 2}


def language(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["x"], labels=batch["y"]).loss


def masked_language(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["x"], labels=batch["y"], attention_mask=batch["mask"]).loss


def image(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]).logits, batch["y"])


def squares(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    y = model(batch["x"])
    return y.square().sum(), y.shape[0]


def llama(**settings: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **PAIRS, **settings}))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=3, n_embd=16, n_head=2, vocab_size=32, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return transformers.GPT2LMHeadModel(config)


def gemma2() -> nn.Module:
    config = transformers.Gemma2Config(**SMALL, **PAIRS, head_dim=4, sliding_window=4, query_pre_attn_scalar=4)
    return transformers.Gemma2ForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=16, d_ff=24, num_layers=3, num_heads=2, d_kv=8, vocab_size=32, decoder_start_token_id=0, dropout_rate=0
    )
    return transformers.T5ForConditionalGeneration(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(**SMALL, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    return transformers.BertForMaskedLM(config)


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=8, patch_size=4))


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, **PAIRS))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


CASES: dict[str, Case] = {
    "example": Case(lambda: CodeLM(layers=3, hidden=16, heads=2, context=12), code_loss, _tokens),
    "llama": Case(llama, language, _tokens),
    "llama, mask": Case(llama, masked_language, _tokens),
    "gpt2": Case(gpt2, language, _tokens),
    "gemma2": Case(gemma2, language, _tokens),
    "t5": Case(t5, masked_language, _tokens),
    "bert": Case(bert, masked_language, _tokens),
    "vit": Case(vit, image, _images),
    "mixtral": Case(mixtral, language, _tokens),
    "mlp": Case(mlp, squares, _vectors),
    "skips": Case(Skips, squares, _images),
    "twice": Case(Twice, squares, _vectors),
}
