"""Shrink the default configuration of any transformers architecture, by the names of its fields.

Nothing here knows an architecture except FORCED, which holds what no rule about names can know, with the reason. A rule
that does not suit a configuration is left out by a recipe: ``RECIPES`` are tried in turn until the model runs.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

VOCABULARY, HIDDEN, HEADS, KV_HEADS, HEAD, LAYERS, LENGTH, IMAGE = 128, 64, 4, 2, 16, 4, 16, 64
FIRST_SPECIAL = 100
"""Tokens from here on are special ones; data has none of them."""


@dataclass(frozen=True)
class Recipe:
    """Which rules are left out.

    Attributes:
        skip: names of rules.
        most: other values of rules.
        fill: give fields that are None a value (``FILLED``).
        codebooks: a sample is a sequence of tokens per codebook.
        audio: the model wants a spectrogram beside every token.
        length: of a sequence of tokens.
        image: edge of an image, in pixels.
    """

    skip: frozenset[str] = frozenset()
    length: int = LENGTH
    image: int = IMAGE
    most: Mapping[str, int] = field(default_factory=dict)
    fill: bool = False
    audio: bool = False
    codebooks: bool = False


RECIPES = (
    Recipe(),
    Recipe(fill=True),
    Recipe(frozenset({"patch"})),
    Recipe(frozenset({"widths", "depths"})),
    Recipe(frozenset({"head_dim"})),
    Recipe(frozenset({"window"}), length=32),
    Recipe(frozenset({"patch", "widths", "depths", "window", "head_dim"})),
    Recipe(most={"window": 2}),
    Recipe(most={"heads": 1}),
    Recipe(frozenset({"patch", "image"}), image=224),
    Recipe(audio=True),
    Recipe(codebooks=True),
)

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FORCED: dict[str, dict[str, Any]] = {
    # a value the default leaves out and the model needs
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": ROPE}},
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "EsmConfig": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 2},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": HEADS,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "XmodConfig": {"default_language": "en_XX"},
    # a keyword that is no field
    "Dots3NoteTextConfig": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_kv_lora_rank": HEAD,
        "swa_q_lora_rank": HEAD,
        "swa_head_dim": 2 * HEAD,
        "swa_qk_nope_head_dim": HEAD,
        "swa_v_head_dim": HEAD,
    },
    "Gemma4TextConfig": {"global_head_dim": HEAD},
    "Gemma4UnifiedTextConfig": {"global_head_dim": HEAD},
    "ShieldGemma2Config": {"yes_token_index": 20, "no_token_index": 21},
    # layers counted in another field
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2)},
    "ZambaConfig": {"layers_block_type": ["linear_attention", "hybrid"] * (LAYERS // 2)},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "Zamba2Config": {"layers_block_type": ["linear_attention", "hybrid"] * (LAYERS // 2)},
    # numbers that must agree with each other
    "EfficientNetConfig": {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 1280 // 4},
    "Mamba2Config": {"num_heads": 2 * HIDDEN // HEAD},
    "ReformerConfig": {
        "axial_pos_shape": (4, LENGTH // 4),
        "axial_pos_embds_dim": (HIDDEN // 4, 3 * HIDDEN // 4),
        # it seeds its draws from the operating system: no two runs on one process agree
        "hash_seed": 0,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
}
"""Arguments that no rule about names can know, by class of configuration."""
FILLED = {
    "head_dim": HEAD,
    "vocab_size": VOCABULARY,
    "num_key_value_heads": KV_HEADS,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": HIDDEN // 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "layer_types": ["full_attention"] * LAYERS,
}
"""What stands for None where a model cannot do without, if the recipe says so."""


RULES: tuple[tuple[str, str, int], ...] = (
    ("vocab", r"vocab_size|vocab$|^unpadded_vocab|codebook_size", VOCABULARY),
    ("lists", r"lstm_layers|residual_layers|adapter_layers|dense_layers|predict_layers", 1),
    ("shared", r"kv_shared_layers", 2),
    ("layers", r"layers?$|^depth$|num_blocks$|layers_per_stack$|self_attends_per_block|^first_k", LAYERS),
    ("head_dim", r"head_dim|head_size$|^d_kv$|d_head$|^dim_head$|kv_channels|headdim|rotary_dim", HEAD),
    ("heads", r"mamba.*heads$", 2 * HIDDEN // HEAD),
    ("heads", r"heads?$", HEADS),
    ("experts", r"shared_experts$", 1),
    ("experts", r"experts$|expert_num$", 4),
    ("experts", r"per_tok(en)?$|moe_top_?k|moe_k$|^top_k_experts", 2),
    ("experts", r"n_group$|num_expert_group$", 2),
    ("experts", r"topk_group$", 1),
    ("index", r"topk$|topk_blocks$|keep_window_size", 8),
    ("moe", r"(moe|expert).*(intermediate|ffn)", HIDDEN // 2),
    ("rank", r"rank$", HEAD),
    (
        "inner",
        r"intermediate|d_ssm|ffn|ff_dim|dim_ff|d_ff|dff|^d_inner|inner_dim|mlp_dim|feed_forward_size",
        2 * HIDDEN,
    ),
    (
        "positions",
        r"max.*position|max_source_pos|n_positions|n_ctx|max_seq|model_max_length|context_length|max_length",
        4 * LENGTH,
    ),
    ("image", r"image_size|crop_size", IMAGE),
    ("patch", r"^patch_size$", 16),
    (
        "window",
        r"sliding_window$|window_size|attention_window|window_len|chunk_size$|chunk_length|block_size$|local_attention",
        8,
    ),
    ("state", r"state_size|d_state", HEAD),
    ("period", r"(period|interval|every|frequency|sparse_step|group_size|every_n_layers)$", 2),
    ("period", r"offset$|start_index$", 1),
    ("groups", r"(n|num)_?groups$|o_groups", 2),
    ("widths", r"^embed_dim$", HIDDEN // 2),
    ("widths", r"stem.*channels|neck_hidden", 16),
    ("filters", r"num_filters$", 4),
    (
        "hidden",
        r"hidden|d_model|n_embd|embed|emb_dim|emb_size|^dim$|_dim$|width$|latents|input_size|output_size|channels?$",
        HIDDEN,
    ),
)
TOKENS = re.compile(r"token_ids?$|token_index$|(unk|mask|pad|bos|eos|lang)_index$")
FIXED = re.compile(
    r"num_channels|^channels$|audio_channels|latent_channels|in_channels|chunk_size_feed_forward|num_labels"
)


class Shrinker:
    """One configuration with its nested ones; equal special tokens stay equal across them."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokens: dict[int, int] = {}

    def config(self, config: PretrainedConfig) -> PretrainedConfig:
        """The same kind of configuration, small."""
        values = self.values(config) | FORCED.get(type(config).__name__, {})
        return type(config)(**values)

    def values(self, config: PretrainedConfig) -> dict[str, Any]:
        """Arguments that differ from the defaults. What a default derives from others is left to it."""
        base = inspect.signature(PretrainedConfig.__init__).parameters
        layers = {
            v for k, v in vars(config).items() if isinstance(v, int) and v > LAYERS and re.search(r"layers?$|depth", k)
        }
        numbers = {k: v for k, v in vars(config).items() if isinstance(v, int)}
        heads = next(
            (numbers[name] for name in ("num_attention_heads", "num_heads", "n_head") if name in numbers), None
        )
        values: dict[str, Any] = {}
        for name, parameter in inspect.signature(type(config).__init__).parameters.items():
            if name in ("self", "kwargs", "args") or (name in base and not TOKENS.search(name)):
                continue
            old = vars(config).get(name, parameter.default)
            if isinstance(old, PretrainedConfig):
                values[name] = self.config(old)
            elif old is None and self.recipe.fill:
                values |= {name: FILLED[name]} if name in FILLED else {}
            elif isinstance(old, int) and re.search(r"(kv|key_value|num_key).*heads$|kv_n_heads", name):
                values[name] = min(old, HEADS if old == heads else KV_HEADS)
            elif parameter.default is not None or TOKENS.search(name):
                new = self.value(name, old, layers)
                if new != old:
                    values[name] = new
        return values

    def value(self, name: str, old: Any, layers: set[int]) -> Any:
        """The new value of a field."""
        if TOKENS.search(name):
            return self.token(old)
        if isinstance(old, bool):
            return old
        if isinstance(old, int):
            return old if FIXED.search(name) else self.number(name, old)
        if isinstance(old, list | tuple) and old:
            return type(old)(self.sequence(name, old, layers))
        return old

    def token(self, old: Any) -> Any:
        """A special token: kept where the vocabulary still has it."""
        if isinstance(old, list | tuple):
            return type(old)(self.token(each) for each in old)
        if not isinstance(old, int) or isinstance(old, bool) or old < VOCABULARY:
            return old
        return self.tokens.setdefault(old, max(FIRST_SPECIAL, VOCABULARY - 1 - len(self.tokens)))

    def number(self, name: str, old: int) -> int:
        """The first rule that fits the name."""
        for rule, pattern, most in RULES:
            if re.search(pattern, name):
                return old if rule in self.recipe.skip else min(old, self.recipe.most.get(rule, most))
        return old

    def sequence(self, name: str, old: Any, layers: set[int]) -> Any:
        """One value per layer: as many as there are layers now, every kind among them. Else a value per stage."""
        numbers = all(isinstance(each, int) and not isinstance(each, bool) for each in old)
        if len(old) in layers and len(old) > LAYERS:
            kept = [old[i] for i in _varied([str(each) for each in old], LAYERS)]
            return [self.number(name, each) for each in kept] if numbers else kept
        if not numbers:
            return old
        if re.search(r"depths|block_sizes|num_block_repeats|stage_num|numb_of_layers|n_attn_blocks", name):
            return old if "depths" in self.recipe.skip else [min(each, 2) for each in old]
        if re.search(r"indices|indexes|idxs|layers|ids$", name) and max(old) >= LAYERS:
            return [i for i in old if i < LAYERS] or [LAYERS - 1]
        if re.search(r"heads", name):
            return [min(HEADS, 1 << (each.bit_length() - 1)) for each in old]
        if re.search(r"hidden|dims?$|channels|sizes$|widths", name) and "kernel" not in name and "patch" not in name:
            return old if "widths" in self.recipe.skip else [_width(each) for each in old]
        return [self.number(name, each) for each in old]


def _varied(kinds: list[str], count: int) -> list[int]:
    """Places of ``count`` entries, in order, taking from every kind in turn."""
    places = [[i for i, each in enumerate(kinds) if each == kind] for kind in dict.fromkeys(kinds)]
    turns = [place for turn in itertools.zip_longest(*places) for place in turn if place is not None]
    return sorted(turns[:count])


def _width(old: int) -> int:
    """An eighth, in steps of sixteen; an image's channels stay."""
    return old if old <= 16 else max(16, -(-old // 8 // 16) * 16)


def shrink(config: PretrainedConfig, recipe: Recipe) -> PretrainedConfig:
    """A small configuration of the same kind."""
    return Shrinker(recipe).config(config)
