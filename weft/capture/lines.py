"""Lines: what was recorded at two sizes of the batch, as straight lines over the size."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import torch

from weft.capture.frames import RawOp
from weft.capture.profile import NO_GROUP, Affine, Operation

SAMPLES = (2, 4)
"""Batch sizes the loss is recorded at; not one, which some models treat specially."""


def affine(small: float, large: float) -> Affine:
    """The line through a quantity at the two SAMPLES."""
    slope = (large - small) / (SAMPLES[1] - SAMPLES[0])
    return Affine(small - slope * SAMPLES[0], slope)


def operations(
    small: Sequence[RawOp],
    large: Sequence[RawOp],
    group: Mapping[int, int] = MappingProxyType({}),
    chosen: tuple[Collection[int], Collection[int]] | None = None,
) -> tuple[Operation, ...]:
    """Operations on the line through both.

    Args:
        small, large: the same stretch at both SAMPLES.
        group: tensor groups, by the place of an operation in the larger one.
        chosen: places of the operations that are wanted in each; None: all.
    """
    before = [op for place, op in enumerate(small) if op.kind != "view" and (chosen is None or place in chosen[0])]
    after = [
        (op, group.get(place, NO_GROUP), op.outputs[0].dtype if op.outputs else torch.float32)
        for place, op in enumerate(large)
        if op.kind != "view" and (chosen is None or place in chosen[1])
    ]
    if [op.name for op in before] != [op.name for op, *_ in after]:
        # Other operations for another batch size: scale those of the larger one, which is nearer to real ones.
        return tuple(
            Operation(op.name, op.kind, Affine(0, op.flops / SAMPLES[1]), Affine(0, op.bytes / SAMPLES[1]), g, _name(d))
            for op, g, d in after
        )
    return tuple(
        Operation(b.name, b.kind, affine(a.flops, b.flops), affine(a.bytes, b.bytes), g, _name(d))
        for a, (b, g, d) in zip(before, after, strict=True)
    )


def _name(dtype: torch.dtype) -> str:
    """A dtype as rates of devices are listed."""
    return str(dtype).removeprefix("torch.")
