"""Rows of training_runs.csv and of single_node_a100.csv.

What a row leaves out is filled in by what its framework did then:

    Megatron-LM to 2022, and vTrain's   fp16, LayerNorm, learned positions, biases, dropout 0.1, GELU, tied head,
    Megatron-DeepSpeed                  attention of two products around a fused scale-mask-softmax kernel
    Megatron-LM and NeMo since          fused attention; distributed optimizer and sequence parallelism where the row
                                        does not say; chunks of one layer where a pipeline's interleaving is not given
    Llama, Mistral, Qwen, ...           RMSNorm, rotary positions, no biases, no dropout, SwiGLU
    torchtitan                          FSDP, float32 master weights; what is not compiled has no fused kernels
    a tied head                         whichever of tied and untied has the row's number of parameters

A question mark in a cell marks the value as likely; it is taken. ``(memory)`` and the like are remarks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from published_rates import peak_flops, sequence_flops
from published_run import GIB, Run, Shape, Skipped

Row = Mapping[str, str]

FRAMEWORKS = {
    "vtrain": "megatron-deepspeed",
    "torchtitan": "torchtitan",
    "nanotron": "nanotron",
    "nnscaler": "nnscaler",
    "megatron-bridge": "nemo",
    "nemo": "nemo",
    "dgxc": "nemo",
    "megatron": "megatron",
    "recomputation": "megatron",
}
"""Framework by a word of the source's name; the first that stands in it."""

UNFUSED = ("vtrain", "sc21", "2020", "recomputation")
"""Words of sources whose attention was not yet one kernel."""

LLAMA_LIKE = ("llama", "mistral", "mixtral", "qwen", "gemma", "deepseek", "nemotron", "yi")
VOCABULARY = 50257
"""GPT-2's, which single-node rows leave out."""

FEATURES = {"async-tp": "async tp", "overlap": "overlap on"}
"""Features by what notes say of them."""

LOSS_COMPILED = ("2025", "04")
"""Year and month from which torchtitan compiles the loss, too, where it compiles."""

SINGLE_NODE = "vTrain ground truth (single node)"


def number(row: Row, name: str) -> float | None:
    """A cell's number; None where it is empty or says no number."""
    match = re.search(r"-?\d+(\.\d+)?([eE][-+]?\d+)?", row.get(name) or "")
    return float(match.group()) if match else None


def whole(row: Row, name: str) -> int | None:
    """A cell's whole number; None where it is empty."""
    value = number(row, name)
    return None if value is None else round(value)


def gpu_name(text: str) -> str:
    """``"A100-40GB (DGX-A100)"`` as ``"a100-40"``: the kind, and its memory where it is told."""
    match = re.match(r"\s*(?:nvidia[ -])?([a-z]+\d+[a-z]*)(?:[- ]+(?:sxm\d?[- ]*)?(\d+) ?gb)?", text.lower())
    if match is None:
        return text.strip().lower()
    return "-".join(filter(None, [match.group(1), match.group(2), "pcie" if "pcie" in text.lower() else None]))


def dtype_of(text: str) -> tuple[str, str]:
    """The dtype of matrix products and fp8's recipe: ``"FP8-CS(unstated)"`` is ``("fp8", "cs")``."""
    word = re.sub(r"\(.*\)", "", text).strip().lower()
    if word.startswith("fp8") or word.startswith("mxfp8") or word.startswith("nvfp8"):
        return "fp8", re.sub(r"^(mx|nv)?fp8-?", "", word) or word.removesuffix("fp8")
    return ("fp16" if "16" in word and "b" not in word else "fp32" if "32" in word else "bf16"), ""


def framework_of(source: str) -> str:
    """The framework that a source's runs used."""
    name = source.lower()
    return next((framework for word, framework in FRAMEWORKS.items() if word in name), "unknown")


def padded(vocab: int, framework: str, tp: int) -> int:
    """Rows of the embedding: Megatron pads them so that every rank has a multiple of 128."""
    unit = 128 * tp if framework in ("megatron", "megatron-deepspeed", "nemo") else tp
    return -(-vocab // unit) * unit


def tied_by(shape: Shape, parameters: float | None) -> bool:
    """Whether the head is tied, told from the number of parameters where that tells; else as ``shape`` has it."""
    if parameters is None:
        return shape.tied
    tied, untied = (abs(replace(shape, tied=t).parameters - parameters) for t in (True, False))
    return shape.tied if max(tied, untied) < 3 * min(tied, untied) else tied < untied


def read_training(row: Row, index: int) -> Run | Skipped:
    """A row of training_runs.csv.

    Args:
        row: its cells by column.
        index: its number in the file.
    """
    source, model = row["source"].strip(), row["model"].strip()
    framework = framework_of(source)
    gpus, missing = whole(row, "num_gpus"), [n for n in ("layers", "hidden", "heads", "seq_len") if not whole(row, n)]
    batch = whole(row, "global_batch_seqs")
    if missing or not gpus or not batch:
        absent = missing + ["num_gpus"] * (not gpus) + ["global_batch_seqs"] * (not batch)
        return Skipped(source, index, model, f"{', '.join(absent)} not given")
    cp, pp, ep = (whole(row, name) or 1 for name in ("cp", "pp", "ep"))
    tp, dp = whole(row, "tp"), whole(row, "dp")
    # Where only a product is known, what is left over divides layers inside: the plan nnScaler prints is of that kind.
    tp = tp or (max(1, gpus // (dp * pp * cp)) if dp else 1)
    dp = dp or max(1, gpus // (tp * pp * cp))
    if dp * tp * pp * cp != gpus:
        return Skipped(source, index, model, f"dp={dp} tp={tp} pp={pp} cp={cp} do not make {gpus} GPUs")
    dtype, recipe = dtype_of(row["dtype"])
    recompute, what = _recompute(row, framework)
    parameters = number(row, "params_B")
    compiled = "compile" in row["notes"].lower()
    plain = _shape(row, source, framework, model, fused=framework != "torchtitan" or compiled)
    counted = replace(plain, tied=tied_by(plain, parameters * 1e9 if parameters else None))
    shape = replace(counted, vocab=padded(counted.vocab, framework, tp))
    zero = _zero(row, framework)
    micro = whole(row, "micro_batch") or (min(4, batch // dp) if pp == 1 else 1)
    vpp = whole(row, "vpp") or (shape.layers // pp if pp > 1 and shape.layers % pp == 0 else 1)
    said = row["sequence_parallel"].strip()
    run = Run(
        source=source,
        row=index,
        model=model,
        tier=row["tier"].strip() or "B",
        framework=framework,
        shape=shape,
        dtype=dtype,
        recipe=recipe,
        micro_batch=micro,
        global_batch=batch,
        gpu=gpu_name(row["gpu"]),
        gpus=gpus,
        gpus_per_node=min(gpus, whole(row, "gpus_per_node") or 8),
        dp=dp,
        tp=tp,
        pp=pp,
        vpp=vpp if pp > 1 else 1,
        cp=cp,
        ep=ep,
        etp=tp,
        zero=zero if dp * cp > 1 else 0,
        recompute=recompute,
        recompute_what=what,
        sequence_parallel=tp > 1 and (said.startswith(("1", "t", "T")) or not said),
        compiled=compiled,
        stage_layers=stages_by_cost(shape, pp) if framework == "nanotron" and pp > 1 else (),
        features=_features(row, framework, compiled=compiled),
        peak_memory_bytes=GIB * memory if (memory := number(row, "peak_mem_GiB")) else None,
        memory_of="reserved" if framework == "torchtitan" else "allocated",
        memory_rank={"torchtitan": "first"}.get(framework, "max"),
        notes="; ".join(filter(None, (row["interconnect"], row["notes"]))),
    )
    step, derived = _step_time(row, run, counted)
    return replace(run, step_time_s=step, derived=derived)


def read_single_node(row: Row, index: int) -> Run | Skipped:
    """A row of single_node_a100.csv: vTrain's measurements on one node, which ran as its others did."""
    names = ("num_gpus", "global_batch_seqs", "micro_batch", "hidden", "heads", "layers", "seq_len", "tp", "dp", "pp")
    cells = {name: whole(row, name) for name in names}
    if absent := [name for name, value in cells.items() if not value]:
        return Skipped(SINGLE_NODE, index, "GPT", f"{', '.join(absent)} not given")
    value = {name: cell for name, cell in cells.items() if cell is not None}
    gpus, hidden, heads, tp = value["num_gpus"], value["hidden"], value["heads"], value["tp"]
    if value["dp"] * tp * value["pp"] != gpus:
        return Skipped(SINGLE_NODE, index, "GPT", f"dp, tp and pp do not make {gpus} GPUs")
    shape = Shape(
        layers=value["layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_size=hidden // heads,
        ffn=4 * hidden,
        vocab=padded(VOCABULARY, "megatron-deepspeed", tp),
        seq_len=value["seq_len"],
        dropout=0.1,
        attention_dropout=0.1,
        attention="unfused",
    )
    return Run(
        source=SINGLE_NODE,
        row=index,
        model=f"GPT {shape.layers}x{hidden}",
        tier="A",
        framework="megatron-deepspeed",
        shape=shape,
        dtype="fp16",
        micro_batch=value["micro_batch"],
        global_batch=value["global_batch_seqs"],
        gpu=gpu_name(row["gpu"]),
        gpus=gpus,
        gpus_per_node=min(gpus, 8),
        dp=value["dp"],
        tp=tp,
        pp=value["pp"],
        recompute="full",
        recompute_what="uniform",
        step_time_s=number(row, "step_time_s"),
    )


def _shape(row: Row, source: str, framework: str, model: str, *, fused: bool) -> Shape:
    """Dimensions, with the vocabulary as the row has it."""
    name, hidden = model.lower(), whole(row, "hidden") or 0
    heads = whole(row, "heads") or 1
    kv_heads = whole(row, "kv_heads") or heads
    llama = any(word in name for word in LLAMA_LIKE) or kv_heads < heads or framework in ("torchtitan", "nanotron")
    unfused = any(word in source.lower() for word in UNFUSED)
    dropout = 0.1 if framework in ("megatron", "megatron-deepspeed") and not llama else 0.0
    experts = int(found.group(1)) if (found := re.search(r"(\d+)x\d+(\.\d+)?b", name)) else 0
    ffn = whole(row, "ffn") or (4 * hidden if not llama else 256 * math.ceil(8 * hidden / 3 / 256))
    return Shape(
        layers=whole(row, "layers") or 0,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=hidden // heads,
        ffn=ffn,
        vocab=whole(row, "vocab") or VOCABULARY,
        seq_len=whole(row, "seq_len") or 0,
        gated=llama,
        norm="rms" if llama else "layer",
        tied=not llama,
        positions="rope" if llama else "learned",
        bias=not llama,
        dropout=dropout,
        attention_dropout=dropout,
        attention="unfused" if unfused else "flash",
        fused=fused,
        fused_gate=framework != "nanotron",
        copied_heads=framework == "nanotron",
        joined=framework not in ("torchtitan", "nnscaler"),
        experts=experts,
        top_k=2 if experts else 1,
        expert_ffn=ffn if experts else 0,
    )


def stages_by_cost(shape: Shape, pp: int) -> tuple[int, ...]:
    """Blocks of every stage as nanotron cuts: block after block goes to a stage until the weights of all so far, the
    head's at the end, are more than its share of them."""
    width = shape.head_size * shape.heads
    block, head = 4 * width * shape.hidden + 3 * shape.ffn * shape.hidden, shape.vocab * shape.hidden
    stages, total = [0] * pp, shape.layers * block + head
    stage = 0
    for number in range(1, shape.layers + 1):
        stages[stage] += 1
        stage += stage < pp - 1 and number * block * pp > total * (stage + 1)
    return tuple(stages)


def _recompute(row: Row, framework: str) -> tuple[str, str]:
    """Mode and what it means: ``"selective(op)"`` is ``("selective", "op")``; "" is what the framework does then."""
    text = row["recompute"].strip().lower()
    word, inside = re.match(r"([a-z]*)\s*(?:\((.*)\))?", text).groups()  # type: ignore[union-attr] # matches anything
    if not word and framework == "torchtitan":  # its configurations: by operator for 8B, all of it for larger models
        return ("full", "uniform") if (number(row, "params_B") or 0) > 20 else ("selective", "op")
    if word.startswith("selective"):
        return "selective", "op" if inside == "op" or framework == "torchtitan" else "core"
    return ("full", "uniform") if word == "full" else ("none", "")


def _zero(row: Row, framework: str) -> int:
    """Stage of ZeRO: 3 for any FSDP; where it is not said, Megatron's distributed optimizer."""
    text = row["zero_or_fsdp"].strip().lower()
    if "fsdp" in text:
        return 3
    if found := re.search(r"\d", text):
        return min(3, int(found.group()))
    return {"torchtitan": 3, "nnscaler": 1, "nemo": 1, "megatron": 1}.get(framework, 0)


def _features(row: Row, framework: str, *, compiled: bool) -> frozenset[str]:
    """What notes say, and what follows from when it was."""
    found = {word for word, said in FEATURES.items() if said in row["notes"].lower()}
    dated = re.search(r"(20\d\d)-?(\d\d)", row["source_ref"])
    if framework == "torchtitan" and compiled and dated and dated.groups() >= LOSS_COMPILED:
        found.add("fused-entropy")
    return frozenset(found)


def _step_time(row: Row, run: Run, counted: Shape) -> tuple[float | None, str]:
    """Seconds a step: given, or from the rate that is closest to it (published_rates says by which conventions)."""
    if given := number(row, "step_time_s"):
        return given, ""
    if tokens := number(row, "tokens_per_s_per_gpu"):
        return run.tokens / (tokens * run.gpus), "tokens"
    work = sequence_flops(run.source, row["tflops_kind"].strip(), counted) * run.global_batch
    if tflops := number(row, "tflops_per_gpu"):
        return work / (tflops * 1e12 * run.gpus), "tflops"
    if (mfu := number(row, "mfu_pct")) and (peak := peak_flops(run.gpu, run.dtype)):
        return work / (mfu / 100 * peak * run.gpus), "mfu"
    return None, ""
