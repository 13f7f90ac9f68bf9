"""Seconds of operations where a process is the device and nothing but forwards is computed.

A training step's products have many rows, so that their rate says all. A step of decoding has one row for each
sequence: a product reads a matrix that has left the caches since the last step, and then computes little with it:

    product    = flops / most flops/s + matrices / (READ reading) + activations / reading
    attention  = as in a training step; of single queries, what every head reads / (LOOKED_UP reading)
    operation  = as in a training step, with OVERHEADS instead of one: modules are Python, and nothing outweighs that
    forward    = its operations + FORWARD_OVERHEADS, on a stage of several + STAGE_OVERHEADS

``reading`` is the rate of a reduction that goes through as much memory as a forward reads of matrices: operations that
write as much are five times as slow in some runs of a process as in others, by whether their results' memory is fresh.
Few rows are no slower to compute than many once the matrix is there. The constants are ratios to a cluster's file, so
that they hold for other processors: ``python benchmarks/eager.py`` measures them, and checks what follows.
"""

from __future__ import annotations

import math

from weft.capture.profile import Operation
from weft.cluster.topology import ITEM_BYTES, Device

OVERHEADS = 2.2
"""Overheads that an operation of a forward takes, with its part of the modules around it."""

FORWARD_OVERHEADS = 40.0
"""Overheads that a forward takes besides its operations, however much it computes: positions, the choice of tokens."""

STAGE_OVERHEADS = 400.0
"""What it takes more on one of several stages: its recording is looked up, tensors come and go, other stages' modules
have stand-ins."""

READ, READ_BY_ONE, LOOKED_UP = 0.65, 0.7, 0.55
"""Shares of a reduction's rate at which a product of few rows reads its matrices, one with a single row does, and a
single query its keys and values (0.5 to 0.8 over widths of 32 to 128, the longer the faster)."""

ONE = 0.75
"""Flops for each byte below which a product has a single row."""

FLOPS_OF_A_KEY = 2.0
"""Flops of a single query for each number of a key or a value."""

FEW = 8.0
"""Flops for each byte below which an attention is of single queries."""


def eager_s(device: Device, op: Operation, flops: float, size: float, weights_bytes: float) -> float:
    """Seconds of one operation.

    Args:
        device: a process.
        op: what it is.
        flops, size: operations and bytes of this rank's part.
        weights_bytes: of all products' operands that a forward reads whatever its batch.

    An attention's ``flops`` say what its heads read: keys and values that heads share (grouped queries) are read by
    every one of them.
    """
    overhead = OVERHEADS * device.overhead_s
    reading = device.rates.get("reduction", device.rates["pointwise"])
    if op.kind == "attention" and flops < FEW * size:
        read = flops / FLOPS_OF_A_KEY * ITEM_BYTES.get(op.dtype, 4)
        return read / (LOOKED_UP * reading.at(weights_bytes)) + overhead
    if op.kind != "matmul":
        return device.seconds(op.kind, flops, size, op.dtype) + overhead - device.overhead_s
    # What every sample adds is there from the operation before, or is fresh; the rest are matrices.
    samples = flops / op.flops.per_sample if op.flops.per_sample else 0.0
    activations = min(size, op.bytes.per_sample * samples)
    share = READ_BY_ONE if flops < ONE * size else READ
    arithmetic = flops / device.matmul.get(op.dtype, device.matmul["float32"]).at(math.inf)
    read = (size - activations) / (share * reading.at(weights_bytes))
    return arithmetic + read + activations / reading.at(activations) + overhead


def forward_s(device: Device, stages: int) -> float:
    """Seconds of a forward of one of so many stages besides its operations."""
    if device.accelerator:
        return 0.0
    return (FORWARD_OVERHEADS + (STAGE_OVERHEADS if stages > 1 else 0.0)) * device.overhead_s
