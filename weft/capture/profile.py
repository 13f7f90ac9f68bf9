"""Profile: what a workload costs, per call of a unit. Plain numbers, no torch.

Costs grow with the samples of a microbatch as ``fixed + per_sample * samples``: the workload is captured at two sizes
and every operation is put on the line through both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from weft.plan import TensorStyle

LOSS = "loss"
"""Name of the last pseudo-call: the glue after the last unit, which ends in the loss. It is on the last stage."""

NO_GROUP = -1


class Affine(NamedTuple):
    """A quantity that grows with the samples of a microbatch: ``fixed + per_sample * samples``."""

    fixed: float
    per_sample: float

    def at(self, samples: float) -> float:
        """The quantity for this many samples."""
        return self.fixed + self.per_sample * samples


class Operation(NamedTuple):
    """One operation on tensors, as the dispatcher saw it.

    Attributes:
        name: for example ``"aten.addmm"``.
        kind: ``"matmul"``, ``"attention"``, ``"convolution"``, ``"pointwise"`` (memory bound), ``"transcendental"``
            (exp, tanh, erf per element), ``"reduction"``, ``"normalization"``, ``"batch_norm"``, ``"softmax"``,
            ``"gather"``, ``"random"`` or ``"copy"``.
        flops: floating-point operations (a multiply-add counts two); 0 for what is not a matrix product.
        bytes: bytes read and written.
        group: index into ``Profile.tensor_groups`` of the group that divides this operation under tensor parallelism,
            or NO_GROUP: every rank of the tensor-parallel group repeats it.
        dtype: of its result, by torch's name; the rate of matrix products depends on it.
    """

    name: str
    kind: str
    flops: Affine
    bytes: Affine
    group: int = NO_GROUP
    dtype: str = "float32"


class Saved(NamedTuple):
    """Activations a call keeps for its backward, in bytes; ``group`` as in Operation."""

    bytes: Affine
    group: int = NO_GROUP


class Recomputed(NamedTuple):
    """What one way of recomputing a call changes.

    Attributes:
        saved: what is kept from forward to backward instead of ``Call.saved``.
        again: operations of the forward that are done again in the backward.
    """

    saved: tuple[Saved, ...]
    again: tuple[Operation, ...]


class Source(NamedTuple):
    """A tensor that comes from an earlier call: leaf number ``leaf`` of the outputs of call number ``call``."""

    call: int
    leaf: int


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor among the outputs of a call."""

    bytes: Affine
    requires_grad: bool


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a unit, with the glue that leads to it.

    Attributes:
        name: ``"h.0"``, ``"h.0@2"`` for the second call of the unit in a forward, LOSS for the last.
        unit: name of the module, "" for LOSS.
        kind: equal for calls that cost the same (the repeated blocks); an index of first occurrence.
        forward, backward: operations, in order. ``backward`` leaves out recomputation and gradient accumulation.
        saved: what is kept from forward to backward, parameters left out, each storage once.
        inputs: which outputs of earlier calls this call or its glue reads.
        outputs: the tensors the call returns, in pytree order.
        parameters: names of the parameters (and ``buffers``) that the call or its glue reads.
        workspace_bytes: largest sum of live temporaries while the call runs (forward or backward), above what is saved.
        recompute: by mode of ``plan.RECOMPUTE``, what it changes; empty for LOSS, which is no unit.
    """

    name: str
    unit: str
    kind: int
    forward: tuple[Operation, ...]
    backward: tuple[Operation, ...]
    saved: tuple[Saved, ...]
    inputs: tuple[Source, ...]
    outputs: tuple[Output, ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    workspace_bytes: Affine
    recompute: Mapping[str, Recomputed] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter or buffer under its first single-device name.

    Attributes:
        names: every name it has; more than one where it is tied.
        shape: full shape, on one device.
        bytes: full size.
        trainable: whether it gets a gradient; False for buffers.
        tensor_dim: the dimension tensor parallelism divides, None if it is replicated.
        group: the tensor group that divides it, or NO_GROUP.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    bytes: int
    trainable: bool
    tensor_dim: int | None = None
    group: int = NO_GROUP

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Modules that tensor parallelism divides together, between one column and one row projection.

    Attributes:
        unit: the unit they belong to.
        styles: names of modules, parameters and numbers, and how each is divided.
        sizes: what the degree must divide: ``(("key/value heads", 2), ("features", 256))``. Where it does not, the
            group stays replicated.
        forward_bytes: bytes of the tensors all-reduced (or gathered) in a forward of each call.
        backward_bytes: likewise in the backward.
        uneven: lengths (a vocabulary) that any degree may divide, in shares as ``torch.chunk`` cuts them.
    """

    unit: str
    styles: tuple[tuple[str, TensorStyle], ...]
    sizes: tuple[tuple[str, int], ...]
    forward_bytes: Affine
    backward_bytes: Affine
    uneven: tuple[int, ...] = ()

    def divisible_by(self, degree: int) -> bool:
        """Whether the degree divides every size, and leaves no rank without a share of what may be cut unevenly."""
        whole = all(size % degree == 0 for _, size in self.sizes)
        return whole and all(-(-n // -(-n // degree)) == degree for n in self.uneven)


@dataclass(frozen=True, slots=True)
class Profile:
    """What one forward and backward of a workload costs.

    Attributes:
        calls: every call of a unit in order of the forward; the last is LOSS.
        parameters: parameters and buffers by first name.
        tensor_groups: what tensor parallelism can divide.
        tensor_refused: ``(what, reason)`` of modules that look divisible but are not.
        optimizer_state_bytes: bytes of optimizer state per byte of trainable parameter (AdamW: 2.0).
        optimizer_passes: bytes an optimizer step reads and writes, per byte of trainable parameter.
        batch_size: global batch size of the workload, in samples.
        sample_bytes: bytes of one sample of the batch.
        sample_tokens: length of the longest sequence of whole numbers in a sample; 0 where it has none.
        capture_s: seconds the capture took.
        precision: the operations', one of ``plan.PRECISIONS``.
        batch_statistics: a normalisation takes its statistics from the microbatch.
    """

    calls: tuple[Call, ...]
    parameters: dict[str, Parameter]
    tensor_groups: tuple[TensorGroup, ...]
    tensor_refused: tuple[tuple[str, str], ...]
    optimizer_state_bytes: float
    optimizer_passes: float
    batch_size: int
    sample_bytes: int
    capture_s: float
    precision: str = "float32"
    batch_statistics: bool = False
    sample_tokens: int = 0

    def divided_share(self, tp: int) -> float:
        """Share of the parameters' bytes that tensor parallelism of this degree divides."""
        parameters = [p for p in self.parameters.values() if p.bytes]
        divided = [p for p in parameters if p.group != NO_GROUP and self.tensor_groups[p.group].divisible_by(tp)]
        return sum(p.bytes for p in divided) / max(sum(p.bytes for p in parameters), 1)


@dataclass(frozen=True, slots=True)
class Kept:
    """What calls of a unit keep of every sequence that is generated, from one token to the next.

    Attributes:
        unit: whose calls write it.
        token_bytes: of one token, keys and values.
        window: tokens kept at most; None: all there are.
        cross: of the prompt's tokens alone: the attention of a decoder to its encoder.
        group: the tensor group that divides it, or NO_GROUP.
    """

    unit: str
    token_bytes: int
    window: int | None = None
    cross: bool = False
    group: int = NO_GROUP

    def bytes(self, prompt: int, tokens: int) -> int:
        """Of a sequence of so many tokens in all, after a prompt of so many."""
        length = prompt if self.cross else tokens
        return self.token_bytes * (length if self.window is None else min(length, self.window - 1))


@dataclass(frozen=True, slots=True)
class Generation:
    """What generating costs: profiles of the two forwards it is made of, and what is kept between them.

    Attributes:
        prefill: of whole prompts; a sample is one prompt.
        decode: of one more token for each sequence, of half the length they grow to on average.
        kept: by layer.
        prompt, new_tokens: of each sequence.
        encodes: whether the prompt is an encoder's, and the new tokens are all of what a decoder sees.
    """

    prefill: Profile
    decode: Profile
    kept: tuple[Kept, ...]
    prompt: int
    new_tokens: int
    encodes: bool = False

    @property
    def length(self) -> int:
        """Tokens of a sequence at its end, of an encoder-decoder those of the decoder."""
        return self.new_tokens + (0 if self.encodes else self.prompt)

    @property
    def batch_size(self) -> int:
        """Sequences generated at once."""
        return self.prefill.batch_size
