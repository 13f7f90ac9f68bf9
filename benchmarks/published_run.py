"""What one published measurement says, typed: the model's dimensions, the plan it ran under, what was measured.

Nothing here knows how a table wrote it down (published_training.py, published_megatron.py) nor how it is predicted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Dimensions of a transformer, enough to build it. Models of one shape share a capture.

    Attributes:
        family: ``"decoder"``, ``"bert"`` (an encoder with a masked-language head) or ``"t5"``.
        layers: blocks; for T5 the encoder's, which its decoder has as many of.
        hidden, heads, kv_heads, head_size, ffn: widths; ``ffn`` is that of one half where the MLP is gated.
        vocab: rows of the embedding, padding for tensor parallelism included.
        seq_len: tokens of a sample; for T5 the encoder's.
        decoder_len: tokens of a T5 decoder's sample, else 0.
        gated: the MLP multiplies two projections (SwiGLU).
        norm: ``"layer"`` or ``"rms"``.
        tied: the output projection is the embedding.
        positions: ``"learned"``, ``"rope"`` or ``"none"``.
        bias: linear layers have one.
        dropout: probability after embedding, attention and MLP; 0 leaves the operations out.
        attention_dropout: of the attention's weights; inside the kernel where that is fused.
        attention: ``"flash"`` (one fused kernel) or ``"unfused"`` (two products around a fused scale-mask-softmax).
        fused: norms, rotary positions and gates are one kernel each; False spells them out in PyTorch's operators.
        fused_gate: of what is fused, gates are, too; else they are spelled out.
        copied_heads: queries, keys and values are copied into the layout of the attention kernel.
        joined: queries, keys and values come from one projection.
        experts: of each MoE layer, 0 for none; every token goes to ``top_k`` of them, evenly.
        expert_ffn, shared_ffn: widths of an expert, and of the expert that all tokens go through.
        dense_layers: blocks at the beginning that have a plain MLP in a model with experts.
        latent: multi-head latent attention's ranks and head sizes, if it has that.
        qk_norm: queries and keys are normalised.
        extra_heads: further next-token predictions, each by a block of its own (MTP).
    """

    family: str = "decoder"
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocab: int
    seq_len: int
    decoder_len: int = 0
    gated: bool = False
    norm: str = "layer"
    tied: bool = True
    positions: str = "learned"
    bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    attention: str = "flash"
    fused: bool = True
    fused_gate: bool = True
    copied_heads: bool = False
    joined: bool = True
    experts: int = 0
    top_k: int = 1
    expert_ffn: int = 0
    shared_ffn: int = 0
    dense_layers: int = 0
    latent: Latent | None = None
    qk_norm: bool = False
    extra_heads: int = 0

    @property
    def parameters(self) -> int:
        """How many parameters the embedding, the blocks' matrices and the head have; for telling models apart only."""
        mlp = (3 if self.gated else 2) * self.hidden
        routed = self.experts * self.expert_ffn * mlp + self.shared_ffn * mlp if self.experts else self.ffn * mlp
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        sparse = self.layers - self.dense_layers if self.experts else 0
        blocks = self.layers * attention + sparse * routed + (self.layers - sparse) * self.ffn * mlp
        positions = self.seq_len if self.positions == "learned" else 0
        return blocks + self.hidden * (self.vocab * (1 if self.tied else 2) + positions)


class Latent(NamedTuple):
    """Ranks and head sizes of multi-head latent attention; a ``query_rank`` of 0 projects queries directly."""

    query_rank: int
    kv_rank: int
    nope_size: int
    rope_size: int
    value_size: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row: a model, how it was trained, and what that took.

    Attributes:
        source: the table it stands in, as that names it.
        row: its number in the file, from 1.
        model: the row's name of the model, or of the test.
        tier: ``"A"`` where the plan is fully given, ``"B"`` where one knob is assumed.
        framework: ``"megatron"``, ``"megatron-deepspeed"``, ``"nemo"``, ``"torchtitan"``, ``"nanotron"``,
            ``"nnscaler"`` or ``"unknown"``.
        shape: the model.
        dtype: of the matrix products: ``"bf16"``, ``"fp16"`` or ``"fp8"``; activations and weights of fp8 are bf16.
        recipe: how fp8 scales (``"rowwise"``, ``"tensorwise"``, ...), or "".
        micro_batch, global_batch: sequences.
        gpu: a short name (``"a100-80"``, ``"h100"``), or the row's own in lower case where it has none.
        gpus, gpus_per_node: how many.
        dp, tp, pp, vpp, cp, ep, etp: degrees; ``vpp`` counts chunks of a stage, ``etp`` divides experts.
        zero: stage 0 to 3: nothing, optimizer state, gradients too, parameters too.
        recompute: ``"none"``, ``"selective"`` or ``"full"``.
        recompute_what: ``"core"`` (attention's core) or ``"op"`` (all but chosen operators) for selective; for full the
            method, ``"uniform"`` or ``"block"``.
        recompute_layers: of how many layers (block) or in groups of how many (uniform).
        sequence_parallel: activations between tensor-parallel regions are divided, too.
        compiled: run through torch.compile.
        stage_layers: blocks of every pipeline stage where the row's are not equal, or empty.
        features: further words that the row gives: ``"async-tp"``, ``"offload"``, ``"cudagraph"``, ...
        step_time_s: seconds a step, measured or worked out from the row's rate; None where it has neither.
        derived: what the step time was worked out from: "" (it was given), ``"tokens"``, ``"tflops"`` or ``"mfu"``.
        peak_memory_bytes: None where it was not measured.
        memory_of: ``"allocated"`` or ``"reserved"``: which of the allocator's peaks the source reports.
        memory_rank: ``"max"`` over ranks, or of the ``"first"`` or ``"last"`` pipeline stage, where the log is made.
        notes: the row's own, joined.
    """

    source: str
    row: int
    model: str
    tier: str
    framework: str
    shape: Shape
    dtype: str
    recipe: str = ""
    micro_batch: int
    global_batch: int
    gpu: str
    gpus: int
    gpus_per_node: int
    dp: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    zero: int = 0
    recompute: str = "none"
    recompute_what: str = ""
    recompute_layers: int = 1
    sequence_parallel: bool = False
    compiled: bool = False
    stage_layers: tuple[int, ...] = ()
    features: frozenset[str] = field(default_factory=frozenset)
    step_time_s: float | None = None
    derived: str = ""
    peak_memory_bytes: float | None = None
    memory_of: str = "allocated"
    memory_rank: str = "max"
    notes: str = ""

    @property
    def nodes(self) -> int:
        """How many nodes, the last perhaps not full."""
        return -(-self.gpus // self.gpus_per_node)

    @property
    def microbatches(self) -> int:
        """Microbatches of a replica."""
        return max(1, self.global_batch // (self.dp * self.micro_batch))

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.global_batch * self.shape.seq_len

    @property
    def question(self) -> tuple[object, ...]:
        """Equal for runs of one table that answer which plan is fastest: same model, batch and devices."""
        shape = self.shape
        widths = (shape.family, shape.layers, shape.hidden, shape.heads, shape.ffn, shape.seq_len, shape.experts)
        return (self.source, widths, self.global_batch, self.gpu, self.gpus)

    def describe(self) -> str:
        """The plan in a line."""
        degrees = ("dp", "tp", "pp", "vpp", "cp", "ep")
        said = [f"{name}={value}" for name in degrees if (value := getattr(self, name)) > 1]
        said += [f"zero={self.zero}"] if self.zero else []
        said += [f"recompute={self.recompute}"] if self.recompute != "none" else []
        said += [word for word, on in (("sp", self.sequence_parallel), ("compiled", self.compiled)) if on]
        return " ".join([f"{self.gpus}x{self.gpu}", f"{self.dtype}", f"mb={self.micro_batch}", *said])


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be modelled, and why; it is counted and printed."""

    source: str
    row: int
    model: str
    reason: str
