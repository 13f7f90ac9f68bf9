"""Pretrained: a Hugging Face directory as a workload: ``config.json``, and safetensors that are read by their owners.

Nothing is fetched and no code of the directory's is run. The model is made by its config on fake tensors, as any
other; then each process reads, tensor by tensor, the piece of it that the plan gives it, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.capture.blame import first_line
from weft.errors import InputError, ModelError
from weft.inference.weights import entries_of, match
from weft.workload import Stored, Workload

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
LENGTH = 32
"""Tokens of the samples that stand in for data."""


def target_of(directory: Path) -> Callable[..., Workload]:
    """The workload function of a directory: what TARGET is where it names one."""

    def workload(dtype: str | None = None, batch_size: int = 1, length: int = LENGTH) -> Workload:
        return pretrained(directory, dtype=dtype, batch_size=batch_size, length=length)

    return workload


def pretrained(
    directory: str | Path, *, dtype: str | torch.dtype | None = None, batch_size: int = 1, length: int = LENGTH
) -> Workload:
    """The model of a directory, with its weights; it predicts logits [B, T, vocabulary].

    Its data are samples of ``length`` tokens that stand in for prompts; give others by ``dataclasses.replace``.

    Args:
        directory: with ``config.json`` and ``model.safetensors``, or several files and their index.
        dtype: of the parameters; None: as the config says, or float32.
        batch_size: as in a Workload.
        length: of the samples.

    Raises:
        InputError: there is no such directory, or a dtype that is none.
        ModelError: it is not of a language model that can be made from its config, or its files do not fit it.
    """
    directory = Path(directory)
    config = config_of(directory)
    kind = dtype_of(dtype if dtype is not None else config.dtype)

    def model() -> nn.Module:
        return make(directory, config, kind)

    def weights(model: nn.Module) -> Mapping[str, Stored]:
        return match(model, entries_of(directory), where=directory)

    # What is wrong shows here, before there are processes; and what transformers imports late is imported.
    with torch.device("meta"):
        weights(model())
    return Workload(
        model=model,
        weights=weights,
        predict=predict,
        data=[sample(config, length)],
        batch_size=batch_size,
        shuffle=False,
    )


def beside(directory: Path, name: str) -> Any | None:
    """What a directory has beside its weights: ``tokenizer`` is its tokenizer, if it has one; None for all else."""
    if name != "tokenizer" or not (directory / TOKENIZER).is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def config_of(directory: Path) -> Any:
    """The config of a directory.

    Raises:
        InputError: transformers is not there, or the directory has no config it can read.
        ModelError: the model is none that is read here.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise InputError(
            f"{directory}: a directory of weights needs transformers, which is not installed; pip install transformers"
        ) from error
    if not (directory / CONFIG).is_file():
        raise InputError(f"{directory}: has no {CONFIG}; give a directory that model.save_pretrained(directory) wrote")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(f"{directory / CONFIG}: transformers cannot read it: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{directory}: its weights are quantized; give a directory of weights that are not")
    return config


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype:
    """A dtype by its name. Raises InputError for what is none that weights have."""
    if dtype is None:
        return torch.float32
    known = {str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.bfloat16, torch.float16)}
    found = {**known, "float64": torch.float64}.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise InputError(f"dtype={dtype} is unknown; choose from {', '.join(known)}")
    return found


def make(directory: Path, config: Any, dtype: torch.dtype) -> nn.Module:
    """The model of a config, without its weights."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        made: Any = auto.from_config(config, dtype=dtype, trust_remote_code=False)  # type: ignore[no-untyped-call]  # transformers has no type for it
    except ValueError as error:
        raise ModelError(f"{directory}: is not of a language model: {first_line(error)}") from error
    if (directory / "generation_config.json").is_file():
        made.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    model: nn.Module = made.eval()
    return model


def sample(config: Any, length: int) -> dict[str, Tensor]:
    """A prompt that stands in for data: tokens [T]."""
    text = config.get_text_config()
    tokens = torch.arange(length) % text.vocab_size
    return {"input_ids": tokens, **({"decoder_input_ids": tokens[:1]} if config.is_encoder_decoder else {})}


def predict(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits of a batch: [B, T, vocabulary]."""
    logits: Tensor = model(**batch, use_cache=False).logits
    return logits
