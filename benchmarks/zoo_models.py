"""Small workloads of every architecture that transformers ships for text and image classification, and of others.

``models()`` gives names (``causal/llama``) and factories of ``weft.Workload``; nothing is built before a factory is
called. A factory tries the recipes of ``zoo_shrink`` in turn until the model runs forward and backward on one process.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto
from zoo_others import BATCH, OTHERS, SAMPLES, Rows, sgd
from zoo_shrink import FIRST_SPECIAL, RECIPES, Recipe, shrink

import weft

KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
FIRST_TOKEN = 10
"""Tokens below are special in some vocabularies."""
CLASSES = 8
SMALLEST = 2
"""Samples in the smallest microbatch that a plan of the zoo makes."""
LARGEST = 30_000_000
"""Parameters of a model that counts as small."""


class DoesNotRunError(Exception):
    """The architecture does not run on one process; the message says why."""


@dataclass(frozen=True)
class Architecture:
    """One architecture of transformers.

    Attributes:
        name: ``kind/type``.
        kind: of KINDS.
        model_type, model_class: names of its configuration and of its model.
    """

    name: str
    kind: str
    model_type: str
    model_class: str

    def config(self, recipe: Recipe) -> PretrainedConfig:
        """A small configuration."""
        model = getattr(transformers, self.model_class)
        config = CONFIG_MAPPING[self.model_type]()
        if not isinstance(config, model.config_class):  # registered for a part of it
            config = model.config_class()
        small = shrink(config, recipe)
        if self.kind == "image":
            small.num_labels = CLASSES
        elif self.kind == "causal" and getattr(small, "is_decoder", None) is False:
            small.is_decoder = True
        return small

    def __call__(self, recipe: int | None = None) -> weft.Workload:
        """The workload under one recipe, or under the first that runs.

        Raises:
            DoesNotRunError: no recipe gives a model that runs.
        """
        return self.build(recipe)[0]

    def build(self, recipe: int | None = None) -> tuple[weft.Workload, int]:
        """The workload and the index of its recipe."""
        reasons = []
        for index in range(len(RECIPES)) if recipe is None else (recipe,):
            try:
                workload = self.workload(RECIPES[index])
                if recipe is None:
                    try_once(workload)
                return workload, index
            except Exception as error:  # whatever a model raises is the reason it does not run
                reasons.append(f"{type(error).__name__}: {message(error)}")
                if isinstance(error, ImportError):
                    break
        raise DoesNotRunError(reasons[0])

    def workload(self, recipe: Recipe) -> weft.Workload:
        """The workload under a recipe, not yet tried."""
        quiet()
        config = self.config(recipe)
        build = getattr(transformers, self.model_class)
        with torch.device("meta"):
            model = build(config)
        if (size := sum(p.numel() for p in model.parameters())) > LARGEST:
            raise DoesNotRunError(f"{size:,} parameters are left after shrinking")
        forward = inspect.signature(model.forward).parameters
        extra = {"use_cache": False} if "use_cache" in forward else {}
        data = DATA[self.kind](config, recipe, forward)
        return weft.Workload(
            model=functools.partial(build, config),
            loss=functools.partial(LOSSES[self.kind], extra=extra),
            data=data,
            optimizer=sgd,
            batch_size=BATCH,
            shuffle=False,
        )


def message(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())[:300]


def quiet() -> None:
    """Keep transformers' advice to itself."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()


def tokens(config: PretrainedConfig, recipe: Recipe, *, seed: int = 7) -> Tensor:
    """Random tokens, none of them special."""
    most = min(FIRST_SPECIAL, getattr(config, "vocab_size", None) or FIRST_SPECIAL)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TOKEN, most, (SAMPLES, recipe.length), generator=generator)


def causal_data(config: PretrainedConfig, recipe: Recipe, forward: Any) -> Rows:
    """Tokens; the labels are the tokens that follow."""
    if not recipe.codebooks:
        return Rows(input_ids=tokens(config, recipe))
    books = [tokens(config, recipe, seed=seed) for seed in range(config.num_codebooks)]
    return Rows(input_ids=torch.stack(books, 1))


def seq2seq_data(config: PretrainedConfig, recipe: Recipe, forward: Any) -> Rows:
    """Tokens of the source and of the target, where the model takes one."""
    columns = {"input_ids": tokens(config, recipe)}
    if "decoder_input_ids" in forward:
        columns["decoder_input_ids"] = tokens(config, recipe, seed=8)
    if recipe.audio:
        shape = (
            SAMPLES,
            config.audio_config.num_mel_bins,
            recipe.length * config.audio_length_per_tok * config.downsample_factor,
        )
        columns["input_features"] = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    return Rows(**columns)


def masked_data(config: PretrainedConfig, recipe: Recipe, forward: Any) -> Rows:
    """Tokens, and labels at some of the places only; how many differs from sample to sample."""
    ids = tokens(config, recipe)
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(9)) < 0.4
    columns = {"input_ids": ids, "labels": torch.where(chosen, ids, -100)}
    if "decoder_input_ids" in forward:
        columns["decoder_input_ids"] = tokens(config, recipe, seed=8)
    return Rows(**columns)


def image_data(config: PretrainedConfig, recipe: Recipe, forward: Any) -> Rows:
    """Noise and classes."""
    generator = torch.Generator().manual_seed(7)
    vision = getattr(config, "vision_config", config)
    edge = getattr(vision, "image_size", None) or recipe.image
    edge = edge if isinstance(edge, int) else edge[0]
    channels = getattr(vision, "num_channels", 3)
    pixels = torch.randn(SAMPLES, channels, edge, edge, generator=generator)
    classes = torch.randint(2, (SAMPLES,), generator=generator)  # the least any of them distinguishes
    if "spatial_shapes" in forward:  # images of any shape, cut into patches by whoever loads them
        patch, edge = vision.patch_size, 4
        pixels = torch.randn(SAMPLES, edge * edge, channels * patch * patch, generator=generator)
        shapes = torch.full((SAMPLES, 2), edge)
        mask = torch.ones(SAMPLES, edge * edge, dtype=torch.long)
        return Rows(pixel_values=pixels, pixel_attention_mask=mask, spatial_shapes=shapes, labels=classes)
    if "input_ids" in forward:
        return Rows(input_ids=tokens(config, recipe), labels=classes)
    return Rows(pixel_values=pixels, labels=classes)


def causal_loss(model: nn.Module, batch: dict[str, Tensor], *, extra: dict[str, Any]) -> Tensor:
    """Cross entropy of the next token."""
    ids = batch["input_ids"].flatten(0, -2)  # codebooks, where there are some, stand with the samples
    logits = model(input_ids=ids, **extra).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def seq2seq_loss(model: nn.Module, batch: dict[str, Tensor], *, extra: dict[str, Any]) -> Tensor:
    """Cross entropy of the next token of the target."""
    logits = model(**batch, **extra).logits
    target = batch.get("decoder_input_ids", batch["input_ids"])
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target[:, 1:].flatten())


def masked_loss(model: nn.Module, batch: dict[str, Tensor], *, extra: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropy at the labelled places, and their number."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, **extra).logits
    logits = logits[:, : batch["labels"].shape[1]]
    labels = batch["labels"].flatten()
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum", ignore_index=-100)
    return total, (labels != -100).sum()


def image_loss(model: nn.Module, batch: dict[str, Tensor], *, extra: dict[str, Any]) -> Tensor:
    """Cross entropy of the classes."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    out = model(**inputs, **extra)
    logits = out.logits if "logits" in out else out[0].flatten(1)
    return F.cross_entropy(logits.float(), batch["labels"])


DATA: dict[str, Callable[..., Rows]] = {
    "causal": causal_data,
    "seq2seq": seq2seq_data,
    "masked": masked_data,
    "image": image_data,
}
LOSSES: dict[str, Callable[..., Any]] = {
    "causal": causal_loss,
    "seq2seq": seq2seq_loss,
    "masked": masked_loss,
    "image": image_loss,
}


def try_once(workload: weft.Workload) -> None:
    """One forward and backward.

    Raises:
        DoesNotRunError: the loss does not reach a parameter or is not finite.
    """
    torch.manual_seed(workload.seed)
    model = workload.model()
    value = workload.loss(model, workload.sample_batch(SMALLEST))
    total = value[0] if isinstance(value, tuple) else value
    total.backward()
    if not bool(torch.isfinite(total)):
        raise DoesNotRunError("the loss is not finite")
    if not any(p.grad is not None for p in model.parameters()):
        raise DoesNotRunError("no parameter gets a gradient")


def architectures() -> dict[str, Architecture]:
    """Every architecture once, by name; a model class that serves two tasks counts for the first."""
    found: dict[str, Architecture] = {}
    seen = set()
    types_of: dict[str, list[str]] = {}
    for mapping in KINDS.values():
        for model_type, classes in getattr(modeling_auto, mapping).items():
            for model_class in (classes,) if isinstance(classes, str) else classes:
                types_of.setdefault(model_class, []).append(model_type)
    for kind, mapping in KINDS.items():
        for classes in getattr(modeling_auto, mapping).values():
            for i, model_class in enumerate((classes,) if isinstance(classes, str) else classes):
                if model_class not in seen:
                    seen.add(model_class)
                    best = max(types_of[model_class], key=lambda each: _likeness(each, model_class))
                    name = f"{kind}/{best if i == 0 else model_class}"
                    found[name] = Architecture(name, kind, best, model_class)
    return found


def _likeness(model_type: str, model_class: str) -> tuple[int, int]:
    """How much of a class's name a type's name begins; of equals, the shorter."""
    plain = model_type.replace("_", "").replace("-", "")
    common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(plain, model_class.lower(), strict=False))
    return len(list(common)), -len(plain)


def models() -> dict[str, Callable[..., weft.Workload]]:
    """Names and factories of all workloads."""
    return {**architectures(), **OTHERS}
