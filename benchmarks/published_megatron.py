"""Rows of megatron_memory.csv: functional tests of Megatron-LM, with the flags they set.

A flag that a row lacks has Megatron-LM's default. Flags without a column are told by the test's name and directory, as
the tests' own model_config.yaml have them (NVIDIA/Megatron-LM, tests/functional_tests/test_cases):

    attention       Tests that only run on set ``--attention-backend unfused``; those that resume from a checkpoint,
                    measure speed, are released, or divide sequences run a fused kernel. To resume, old images (goldens
                    of "dracooci", and short ones of "lts") had none that was deterministic. BERT and T5: unfused.
    experts, MLA    FAMILIES has the flags of families of tests, by words of their names.
    vocabulary      GPT-2's of 50,257, BERT's of 30,522, T5's of 28,996 and 100 more, Mixtral's of 32,000; padded.
    rank            TensorBoard is written by the last rank, so memory is the last stage's.

Dropout of 0.1 is the default, which tests that divide sequences turn off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from published_run import GIB, Latent, Run, Shape, Skipped
from published_training import gpu_name, number, whole

Row = Mapping[str, str]

SOURCE = "Megatron-LM continuous integration"
DEEPSEEK = Latent(query_rank=1536, kv_rank=512, nope_size=128, rope_size=64, value_size=128)
RELEASE_NODES = 8
"""Nodes of tests that are released, where the row does not say."""

UNKNOWN = {
    "grpo": "reinforcement learning: an inference engine shares the device's memory",
    "hybrid": "Mamba layers, whose dimensions are not given",
    "mamba": "Mamba layers, whose dimensions are not given",
    "nemotron": "Mamba layers, whose dimensions are not given",
    "llava": "a vision tower, whose dimensions are not given",
    "mimo": "a vision tower, whose dimensions are not given",
    "multimodal": "a vision tower, whose dimensions are not given",
}
"""Words of tests that cannot be modelled, and why."""

LLAMA = dict(norm="rms", positions="rope", bias=False, dropout=0.0, attention_dropout=0.0)
LATENT = dict(**LLAMA, qk_norm=True, attention="unfused")
SMALL_EXPERTS = dict(bias=False, top_k=2, expert_ffn=1024)


@dataclass(frozen=True)
class Family:
    """Flags of tests whose names match: fields of Shape, and a few that are no part of it."""

    pattern: str
    fields: Mapping[str, Any]
    vocab: int = 0
    vocab_unit: int = 128
    features: tuple[str, ...] = ()
    global_batch: int = 0
    etp: int = 0


FAMILIES = (
    Family("gpt3_15b", {**LLAMA, "norm": "layer"}, vocab=256_000, features=("fused-loss",), global_batch=384),
    Family("mixtral_8x", {**LLAMA, "top_k": 2}, vocab=32_000),
    Family("mixtral_8x7b_tp1pp4ep8vpp8", {}, etp=1),
    Family(
        "deepseekv3_proxy",
        {**LATENT, "attention": "flash", "latent": DEEPSEEK, "top_k": 8, "expert_ffn": 2048, "shared_ffn": 2048}
        | {"dense_layers": 3, "extra_heads": 1},
        vocab=256_000,
        vocab_unit=3232,
        features=("fused-loss",),
    ),
    Family(
        "deepseek_proxy_fsdp",
        {**LATENT, "latent": DEEPSEEK._replace(query_rank=256, kv_rank=128), "top_k": 4, "expert_ffn": 1024}
        | {"shared_ffn": 1024, "dense_layers": 3},
        vocab_unit=64,
    ),
    Family(
        "tp2_pp2_ep4_etp1",
        {**LATENT, "latent": DEEPSEEK, "top_k": 4, "expert_ffn": 1024, "shared_ffn": 1024, "dense_layers": 1},
        vocab_unit=3232,
        features=("fused-loss",),
    ),
    Family("ep4_etp1_(mtp|selective)|fine_grained", {"extra_heads": 1}),
    Family("no_mtp", {"extra_heads": 0}),
    Family("selective_recompute|fine_grained", {"dense_layers": 3}, features=("recompute-modules",)),
    Family("fine_grained_offloading", {}, features=("offload",)),
    Family("experts2parallel|4experts_groupedGEMM", {"bias": False, "top_k": 1}),
    Family("moe_mcore_te_ep8", SMALL_EXPERTS),
    Family("te_tp4_ep2_etp2", {**SMALL_EXPERTS, "shared_ffn": 512}),
    Family("a2a_ovlp_8experts", {"bias": False, "top_k": 2}),
    Family(
        "scoped_cudagraph",
        {"positions": "rope", "dropout": 0.0, "attention_dropout": 0.0, "dense_layers": 4, "extra_heads": 1},
        features=("recompute-modules",),
    ),
    Family("_mla", {"latent": Latent(query_rank=192, kv_rank=64, nope_size=16, rope_size=8, value_size=16)}),
    Family(
        "modelopt_distill",
        {"norm": "rms", "positions": "rope", "bias": False, "attention": "unfused"},
        features=("teacher",),
    ),
    Family("rope", {"positions": "rope"}),
    Family("disable_bias_linear", {"bias": False}),
    Family("qk_layernorm", {"qk_norm": True}),
    Family("_cp[24]|cp2_", {"dropout": 0.0, "attention_dropout": 0.0}),
    Family("cudagraph", {}, features=("cudagraph",)),
    Family("muon", {}, features=("muon",)),
    Family("tunable_overlap", {}, features=("group=5",)),
    Family("reshard", {}, features=("reshard",)),
    Family("uneven_pipeline", {}, features=("uneven=2",)),
)
"""What names of tests say that no column does; all that match apply, later ones over earlier ones."""


def read_megatron(row: Row, index: int) -> Run | Skipped:
    """A row of megatron_memory.csv.

    Args:
        row: its cells by column.
        index: its number in the file.
    """
    test, golden = row["test_case"].strip(), row["golden"]
    name = test.lower()
    if reason := next((why for word, why in UNKNOWN.items() if word in name), None):
        return Skipped(SOURCE, index, test, reason)
    missing = [n for n in ("hidden-size", "num-attention-heads") if not whole(row, n)]
    if missing or not (whole(row, "num-layers") or name.startswith("t5")):
        return Skipped(SOURCE, index, test, f"{', '.join(missing or ['num-layers'])} not given")
    tp, pp, cp, ep = (
        whole(row, flag) or 1
        for flag in (
            "tensor-model-parallel-size",
            "pipeline-model-parallel-size",
            "context-parallel-size",
            "expert-model-parallel-size",
        )
    )
    matching = [family for family in FAMILIES if re.search(family.pattern, name)]
    gpus, per_node = _devices(row, name, tp * pp * cp)
    if gpus % (tp * pp * cp):
        return Skipped(SOURCE, index, test, f"tp={tp} pp={pp} cp={cp} do not divide {gpus} GPUs")
    dp = gpus // (tp * pp * cp)
    shape = _shape(row, name, golden, tp, cp, matching)
    micro = whole(row, "micro-batch-size") or 1
    features = [word for family in matching for word in family.features]
    fsdp = _on(row, "use-megatron-fsdp")
    uneven = next((int(word[-1]) for word in features if word.startswith("uneven=")), 0)
    middle = (shape.layers - 2 * uneven) // max(1, pp - 2)
    return Run(
        source=SOURCE,
        row=index,
        model=test.partition("/")[2] or test,
        tier="A",
        framework="megatron",
        shape=shape,
        dtype="fp8" if row["fp8-format"] else "fp16" if _on(row, "fp16") else "bf16" if _on(row, "bf16") else "fp32",
        recipe=row["fp8-format"].strip('"'),
        micro_batch=micro,
        global_batch=whole(row, "global-batch-size")
        or next((f.global_batch for f in matching if f.global_batch), micro * dp),
        gpu=gpu_name(row["platform"]),
        gpus=gpus,
        gpus_per_node=per_node,
        dp=dp,
        tp=tp,
        pp=pp,
        vpp=_chunks(row, shape.layers, pp),
        cp=cp,
        ep=ep,
        etp=_expert_tensor_parallel(name, tp, matching) if shape.experts else 1,
        zero=_zero(row) if fsdp else int(_on(row, "use-distributed-optimizer") and dp * cp > 1),
        recompute=row["recompute-granularity"] or "none",
        recompute_what=_recomputed(row, features),
        recompute_layers=whole(row, "recompute-num-layers") or 1,
        sequence_parallel=tp > 1 and _on(row, "sequence-parallel"),
        stage_layers=(uneven, *([middle] * (pp - 2)), uneven) if uneven and pp > 2 else (),
        features=frozenset([*features, *(["old-image"] if _old_image(row, golden) else [])]),
        step_time_s=number(row, "iteration_time_s_median_2nd_half"),
        peak_memory_bytes=GIB * peak if (peak := number(row, "max_mem_allocated_GiB")) else None,
        memory_of="allocated",
        memory_rank="last",
        notes=golden,
    )


def _shape(row: Row, name: str, golden: str, tp: int, cp: int, matching: list[Family]) -> Shape:
    """Dimensions, defaults first, then what the family of tests has."""
    family = "t5" if name.startswith("t5") else "bert" if name.startswith("bert") else "decoder"
    hidden, heads = whole(row, "hidden-size") or 0, whole(row, "num-attention-heads") or 1
    gated, experts = _on(row, "swiglu"), whole(row, "num-experts") or 0
    # Megatron-LM makes a gated MLP as large as a plain one of four times the hidden size, in steps of 64.
    ffn = whole(row, "ffn-hidden-size") or (4 * hidden * 2 // 3 // 64 * 64 if gated else 4 * hidden)
    unit = max((f.vocab_unit for f in matching if f.vocab_unit != 128), default=128) * tp
    usual = {"decoder": 50_257, "bert": 30_522, "t5": 28_996 + 100}[family]
    vocab = whole(row, "vocab-size") or next((f.vocab for f in matching if f.vocab), usual)
    seq_len = whole(row, "seq-length") or (512 if family == "t5" else 1024)
    fields: dict[str, Any] = dict(
        family=family,
        layers=whole(row, "num-layers") or 12,
        hidden=hidden,
        heads=heads,
        kv_heads=whole(row, "num-query-groups") or heads,
        head_size=hidden // heads,
        ffn=ffn,
        vocab=-(-vocab // unit) * unit,
        seq_len=seq_len,
        decoder_len=128 if family == "t5" else 0,
        gated=gated,
        tied=not _on(row, "untie-embeddings-and-output-weights"),
        dropout=0.1,
        attention_dropout=0.1,
        attention="flash" if _fused_attention(row, name, golden, cp) and family == "decoder" else "unfused",
        experts=experts,
        top_k=2 if experts else 1,
        expert_ffn=ffn if experts else 0,
    )
    for match in matching:
        fields |= match.fields
    if not experts:
        fields |= dict(top_k=1, expert_ffn=0, shared_ffn=0, dense_layers=0)
    return Shape(**fields)


def _fused_attention(row: Row, name: str, golden: str, cp: int) -> bool:
    """Whether attention ran as one kernel: see the top of this file."""
    if cp > 1 or "release" in name:
        return True
    if any(word in name for word in ("memory_speed", "cudagraph", "op_fuser", "native_fp8", "fsdp_dtensor")):
        return True
    # Without Transformer Engine (te) nothing is fused.
    return "resume" in name and "mcore_te_" in name and not _old_image(row, golden)


def _old_image(row: Row, golden: str) -> bool:
    return "dracooci" in golden or ("lts" in golden and (whole(row, "n_points") or 0) <= 21)


def _devices(row: Row, name: str, least: int) -> tuple[int, int]:
    """GPUs, and GPUs of a node."""
    usual = 4 if "gb200" in row["platform"] and not row["gpus_per_node"] else 8
    per_node = whole(row, "gpus_per_node") or usual
    nodes = whole(row, "nodes") or (RELEASE_NODES * 8 // per_node if "release" in name else 1)
    gpus = nodes * per_node
    return (gpus if gpus >= least else -(-least // per_node) * per_node), per_node


def _expert_tensor_parallel(name: str, tp: int, matching: list[Family]) -> int:
    """Into how many parts experts' matrices are divided: as others are, unless the test says so."""
    said = re.search(r"etp(\d+)", name)
    return int(said.group(1)) if said else next((f.etp for f in matching if f.etp), tp)


def _chunks(row: Row, layers: int, pp: int) -> int:
    """Chunks of a pipeline stage."""
    each = whole(row, "num-layers-per-virtual-pipeline-stage")
    return (
        (whole(row, "num-virtual-stages-per-pipeline-rank") or (layers // pp // each if each else 1)) if pp > 1 else 1
    )


def _recomputed(row: Row, features: list[str]) -> str:
    if row["recompute-granularity"] == "full":
        return row["recompute-method"] or "uniform"
    return ("modules" if "recompute-modules" in features else "core") if row["recompute-granularity"] else ""


def _zero(row: Row) -> int:
    """Stage of Megatron's FSDP by its sharding strategy."""
    strategy = row["data-parallel-sharding-strategy"].strip('"')
    return {"optim": 1, "optim_grads": 2, "optim_grads_params": 3}.get(strategy, 0)


def _on(row: Row, flag: str) -> bool:
    return row[flag].strip().lower() == "true"
