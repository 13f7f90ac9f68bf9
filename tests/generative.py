"""Small random models of transformers that generate, float32, and prompts of different lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from workloads import Tokens, adamw, causal_lm

import weft

VOCABULARY, LENGTH = 64, 12
PROMPTS = [[5, 9, 31], [7], [40, 41, 42, 43, 44, 45, 46], [3, 60, 8, 2], [11, 12], [50, 4, 33, 21, 6, 19, 28, 30, 1]]


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def _qwen() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=True))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=128, n_embd=32, n_layer=4, n_head=4))


def _gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, sliding_window=16))


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2))


def _t5(layers: int = 3) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": layers, "num_heads": 4, "vocab_size": VOCABULARY}
    return T5ForConditionalGeneration(T5Config(**sizes, num_decoder_layers=3, decoder_start_token_id=0))


def causal(model: Callable[[], nn.Module]) -> weft.Workload:
    """A model that is trained and generates."""
    return weft.Workload(
        model=model, loss=causal_lm, data=Tokens(64, LENGTH, VOCABULARY), optimizer=adamw, batch_size=8
    )


def translating(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    return loss


def t5(layers: int = 3) -> weft.Workload:
    """An encoder of so many layers, and a decoder of three."""
    return weft.Workload(
        model=lambda: _t5(layers), loss=translating, data=Tokens(64, LENGTH, VOCABULARY), optimizer=adamw, batch_size=8
    )


GENERATIVE: dict[str, Callable[[], weft.Workload]] = {
    "llama": lambda: causal(_llama),
    "qwen": lambda: causal(_qwen),
    "gpt2": lambda: causal(_gpt2),
    "gemma2": lambda: causal(_gemma2),
    "mixtral": lambda: causal(_mixtral),
    "t5": t5,
}


def by_transformers(workload: weft.Workload, tokens: int, **settings: Any) -> Tensor:
    """What transformers generates on one device after PROMPTS."""
    torch.manual_seed(workload.seed)
    model: Any = workload.model().eval()
    longest = max(map(len, PROMPTS))
    left = not model.config.is_encoder_decoder
    pads = [[0] * (longest - len(prompt)) for prompt in PROMPTS]
    ids = torch.tensor([[*x, *p] if left else [*p, *x] for x, p in zip(pads, PROMPTS, strict=True)])
    ones = [[[0] * len(x), [1] * len(p)][:: 1 if left else -1] for x, p in zip(pads, PROMPTS, strict=True)]
    mask = torch.tensor([[*a, *b] for a, b in ones])
    settings = {"do_sample": False, "eos_token_id": None, **settings}
    found: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, pad_token_id=0, **settings)
    return found
