"""A directory as Hugging Face has them: a tiny Llama of random weights in several files, and a tokenizer that chats."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import tokenizers
import torch
import transformers as tf
from tokenizers import decoders, models, pre_tokenizers, trainers

WORDS = 600
END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer() -> tf.PreTrainedTokenizerFast:
    """Pairs of bytes, as often as they are in some of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=[END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [(library / f"{name}.py").read_text() for name in ("abc", "ast", "json/decoder", "os", "typing")]
    made.train_from_iterator(texts, trainer)
    found = tf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)
    found.chat_template = TEMPLATE
    return found


def save(path: Path) -> Path:
    """Write the directory; the same one as is returned."""
    words = tokenizer()
    words.save_pretrained(path)
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
        initializer_range=0.2,  # or greedy tokens repeat themselves at once
    )
    tf.LlamaForCausalLM(config).save_pretrained(path, max_shard_size="300KB")
    return path
