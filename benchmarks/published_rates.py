"""How sources turn seconds into FLOP/s and MFU, and back: each counts floating-point operations in a way of its own.

    model FLOP of a sequence, forward and backward     3 (2 s (L (projections + MLP) + V h) + c 4 L s^2 a d)

with s tokens, L layers, hidden size h, a heads of size d, a vocabulary of V. ``c`` is the share of the s x s scores
that counts: 1 in Megatron-LM, NeMo and nanotron, 1/2 in Megatron-Bridge and torchtitan, which leave out what a causal
mask hides. Megatron's table of 2021 counts the forward that recomputation repeats as well (HARDWARE).
"""

from __future__ import annotations

from published_run import Run, Shape

PEAKS = {"v100": 125e12, "a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12, "gb200": 2450e12}
"""FLOP/s by data sheet, dense, of 16-bit tensor cores, which MFU is a share of; fp8 has twice as much."""

CAUSAL_HALF = ("Megatron-Bridge", "torchtitan")
"""Sources, by what their names begin with, that count half of the scores."""

HARDWARE = "hardware"
"""What ``tflops_kind`` begins with where recomputation counts."""


def model_flops(shape: Shape, scores: float = 1.0) -> float:
    """Floating-point operations of the forward and backward of a sequence, of matrix products only.

    Args:
        shape: the model.
        scores: share of the attention scores that counts.
    """
    s, h = shape.seq_len, shape.hidden
    projections = 2 * h * shape.head_size * (shape.heads + shape.kv_heads)
    width = shape.top_k * shape.expert_ffn + shape.shared_ffn if shape.experts else shape.ffn
    mlp = (3 if shape.gated else 2) * h * width
    attention = 4 * shape.layers * s * s * shape.heads * shape.head_size
    return 3.0 * (2 * s * (shape.layers * (projections + mlp) + shape.vocab * h) + scores * attention)


def recomputing_flops(shape: Shape) -> float:
    """The same with the forward of every layer done twice, as "Efficient Large-Scale Language Model Training on GPU
    Clusters Using Megatron-LM" (2021) counts it: 96 s L h^2 (1 + s/6h + V/16Lh)."""
    s, h, layers = shape.seq_len, shape.hidden, shape.layers
    return 96.0 * s * layers * h * h * (1 + s / (6 * h) + shape.vocab / (16 * layers * h))


def sequence_flops(source: str, kind: str, shape: Shape) -> float:
    """Floating-point operations of a sequence by the convention of a source.

    Args:
        source: its name.
        kind: the row's ``tflops_kind``, or "".
        shape: the model, with the vocabulary the source counts.
    """
    if kind.startswith(HARDWARE):
        return recomputing_flops(shape)
    return model_flops(shape, 0.5 if source.startswith(CAUSAL_HALF) else 1.0)


def peak_flops(gpu: str, dtype: str) -> float | None:
    """Peak rate that a source's MFU is a share of; None for a GPU that has none here."""
    peak = PEAKS.get(gpu.partition("-")[0])
    return None if peak is None else peak * (2 if dtype == "fp8" else 1)


def rates_of(run: Run, shape: Shape, kind: str = "") -> dict[str, float]:
    """What the run's step time is in the other units: ``tokens``/s/GPU, ``tflops``/GPU and ``mfu`` in percent.

    Args:
        run: with a step time.
        shape: its model with the vocabulary the source counts.
        kind: the row's ``tflops_kind``.
    """
    assert run.step_time_s is not None
    device_s = run.step_time_s * run.gpus
    flops = sequence_flops(run.source, kind, shape) * run.global_batch / device_s
    peak = peak_flops(run.gpu, run.dtype)
    return {"tokens": run.tokens / device_s, "tflops": flops / 1e12} | ({"mfu": 100 * flops / peak} if peak else {})
