"""Seconds of operations where a process is the device and nothing but forwards is computed.

A training step's products have many rows, so that their rate says all. A step of decoding has one row for each
sequence: a product reads a matrix that has left the caches since the last step, and then computes little with it:

    product    = flops / rate(flops) + bytes / (READ stream)
    attention  = flops / rate(flops) + bytes / (READ stream), of one query bytes / (LOOKED_UP stream)
    operation  = as in a training step, with OVERHEADS instead of one: modules are Python, and nothing outweighs that

``stream`` is the rate at which one operation goes through as much memory as a forward reads of weights. The constants
are ratios, as seen on processors of two kinds of work: 36 operations of a block of Llama with next to no numbers in
them took 100 overheads, one forward of a stage with none 200.
"""

from __future__ import annotations

from weft.capture.profile import Operation
from weft.cluster.topology import FLOP_KINDS, Device

OVERHEADS = 2.8
"""Overheads that an operation of a forward takes, with its part of the modules around it."""

FORWARD_OVERHEADS = 200.0
"""Overheads that a forward of a stage takes, however much it computes: its recording is looked up, masks are made."""

READ, LOOKED_UP = 0.55, 0.3
"""Shares of the streaming rate at which a product reads its matrices, and a single query its keys and values."""

FEW = 8.0
"""Flops for each byte below which an attention is of single queries."""


def eager_s(device: Device, op: Operation, flops: float, size: float, weights_bytes: float) -> float:
    """Seconds of one operation.

    Args:
        device: a process.
        op: what it is.
        flops, size: operations and bytes of this rank's part.
        weights_bytes: of all products' operands that a forward reads whatever its batch.
    """
    more = (OVERHEADS - 1) * device.overhead_s
    if op.kind not in FLOP_KINDS or op.kind == "convolution":
        return device.seconds(op.kind, flops, size, op.dtype) + more
    stream = device.rates["pointwise"].at(weights_bytes)
    if op.kind == "attention" and flops < FEW * size:
        return size / (LOOKED_UP * stream) + more + device.overhead_s
    return device.seconds(op.kind, flops, 0.0, op.dtype) + size / (READ * stream) + more


def forward_s(device: Device) -> float:
    """Seconds of a forward of a stage besides its operations."""
    return 0.0 if device.accelerator else FORWARD_OVERHEADS * device.overhead_s
