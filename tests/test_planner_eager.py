"""Seconds of forwards where a process is the device: what is read, how fast, and what Python adds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from test_planner_inference import forwards, generation, llama, machine

from weft.capture.profile import Affine, Operation
from weft.cluster.curve import Curve
from weft.cluster.topology import Cluster, Device
from weft.planner import choose_inference
from weft.planner.eager import (
    FORWARD_OVERHEADS,
    LOOKED_UP,
    OVERHEADS,
    READ,
    READ_BY_ONE,
    STAGE_OVERHEADS,
    eager_s,
    forward_s,
)

INNER, OUTER = 256, 1024
WEIGHTS = 4.0 * INNER * OUTER
PRODUCT = Operation(
    "aten.mm", "matmul", Affine(0, 2.0 * INNER * OUTER), Affine(WEIGHTS, 4.0 * (INNER + OUTER))
)  # one row for each sample


def processor(**rates: float) -> Device:
    """One that computes 100 GFlop/s, of small products half as much, and goes through memory at these rates."""
    curves = {kind: Curve((1.0,), (rate,)) for kind, rate in rates.items()}
    matmul = {"float32": Curve((1e6, 1e9), (5e10, 1e11))}
    return replace(Cluster.local(1).device, matmul=matmul, rates=curves, overhead_s=1e-6)


def seconds(device: Device, op: Operation, samples: float, tp: int = 1) -> float:
    return eager_s(device, op, op.flops.at(samples) / tp, op.bytes.at(samples) / tp, 1e8) - OVERHEADS * 1e-6


@pytest.mark.parametrize("rows", [1, 2, 64])
def test_a_product_reads_its_matrix_at_a_share_of_what_a_reduction_reads(rows: int):
    device = processor(pointwise=5e9, reduction=2e10)
    arithmetic, activations = rows * 2 * INNER * OUTER / 1e11, rows * 4 * (INNER + OUTER) / 2e10
    share = READ_BY_ONE if rows == 1 else READ
    assert seconds(device, PRODUCT, rows) == pytest.approx(arithmetic + activations + WEIGHTS / (share * 2e10))


def test_where_no_reduction_was_measured_it_is_any_operation():
    assert seconds(processor(pointwise=2e10), PRODUCT, 4) == seconds(
        processor(pointwise=2e10, reduction=2e10), PRODUCT, 4
    )


def test_ranks_that_divide_a_product_read_a_part_of_its_matrix_each():
    device = processor(pointwise=2e10)
    assert seconds(device, PRODUCT, 8, tp=2) == pytest.approx(seconds(device, PRODUCT, 8) / 2)


def test_heads_that_share_keys_read_them_all_the_same():
    heads, keys, width = 8, 100, 32
    numbers = 2 * heads * keys * width
    flops = Affine(0, 2.0 * numbers)
    ways = [
        Operation("aten.attention", "attention", flops, Affine(0, 4.0 * numbers / shared + 8.0 * heads * width))
        for shared in (1, 2, 4)
    ]
    device = processor(pointwise=2e10)
    found = [seconds(device, op, 8) for op in ways]
    assert found == pytest.approx([8 * 4 * numbers / (LOOKED_UP * 2e10)] * 3)


def test_a_stage_of_several_takes_more_of_every_step():
    device = processor(pointwise=2e10)
    assert forward_s(device, 1) == pytest.approx(FORWARD_OVERHEADS * 1e-6)
    assert forward_s(device, 2) == forward_s(device, 4) == pytest.approx((FORWARD_OVERHEADS + STAGE_OVERHEADS) * 1e-6)
    assert forward_s(replace(device, accelerator=True), 2) == 0.0
    # In an estimate, both stages of a step do.
    what, cluster = generation(llama, 1), machine(2)
    slower = replace(cluster.nodes[0].device, overhead_s=2 * cluster.device.overhead_s)
    slow = replace(cluster, nodes=(replace(cluster.nodes[0], device=slower),))
    times = [choose_inference(what, each, pp=2, microbatches=1).estimate.token_s for each in (cluster, slow)]
    operations = sum(len(call.forward) for call in what.decode.calls)
    more = (operations * OVERHEADS + 2 * (FORWARD_OVERHEADS + STAGE_OVERHEADS)) * cluster.device.overhead_s
    assert times[1] - times[0] == pytest.approx(more, rel=0.02)
    assert math.isfinite(forwards(what, cluster).task.rounds)
