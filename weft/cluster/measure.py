"""Measures a cluster from inside a job: every rank of an initialised process group calls ``measure``.

    rates         all ranks compute at once, each on its own device; the mean over ranks of the medians
    cores         where devices are processes on shared cores: the processor time that all ranks together got per
                  second, over how much faster one computes while the others sleep
    links         inside a node and between nodes: pairs of neighbours exchange messages, all pairs at once; between
                  nodes also one pair by itself, since a node's devices may share one network card
    collectives   at either level, over groups of every size and stride that a mesh can have there, all groups at once

so that more processes than cores are predicted as they run. A few seconds in all: where a message takes long it is
sent less often.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import fmean, quantiles

import torch
import torch.distributed as dist

from weft.cluster import presets
from weft.cluster.curve import Curve
from weft.cluster.local import device_memory
from weft.cluster.rates import Clock, Probe, curves, overhead_s, probes, time_probes
from weft.cluster.topology import (
    COLLECTIVES,
    LIMITED_SHARE,
    UNLIMITED_SHARE,
    Cluster,
    Collective,
    Device,
    Link,
    Nodes,
)
from weft.errors import ClusterError

# Renamed in torch 2.13, which warns of the old names.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

REPEATS = (2, 7)
"""Fewest and most measurements of a communication: as many as SPEND_S allows."""

IN_A_ROW_S, SPEND_S = 2e-3, 0.2
"""A measurement is of so many in a row as take this long; all of them together take about SPEND_S."""

MESSAGE_BYTES = (64, 2**22)
"""A message that is all latency, and one that is all bandwidth: many times what a network card lets through at once."""

COLLECTIVE_BYTES = (2**12, 2**18, 2**22)
WINDOWS, WINDOW_S = 3, 0.25
"""How often and how long all ranks compute to see how many cores they get."""


def measure(
    *, memory_bytes: int | None = None, devices_per_node: int | None = None, dtypes: tuple[str, ...] = ("float32",)
) -> Cluster:
    """The cluster that this job's ranks form; every rank returns the same.

    Args:
        memory_bytes: limit of each device; None: an accelerator's own memory, or an equal part of the machine's.
        devices_per_node: consecutive ranks on one node; None: as many as torchrun says, or all.
        dtypes: of the matrix products to time.

    Raises:
        ClusterError: nodes that are not equal.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    per_node = devices_per_node or round(_mean([float(os.environ.get("LOCAL_WORLD_SIZE", ranks))])[0])
    if ranks % per_node:
        raise ClusterError(f"{ranks} ranks do not make whole nodes of {per_node} devices per node")
    accelerator = torch.accelerator.current_accelerator()
    device = torch.device("cpu") if accelerator is None else accelerator
    clock = Clock(device)
    rates, overhead = _rates(clock, dtypes)
    cores = _cores(clock, ranks, per_node) if clock.shares_cores and ranks > 1 else None
    name = "CPU process" if device.type == "cpu" else _device_name(device)
    reserved, share = presets.accelerator_memory()
    if device.type == "cpu":
        reserved, share = presets.process_bytes(), UNLIMITED_SHARE if memory_bytes is None else LIMITED_SHARE
    matmul = {kind.split()[1]: curve for kind, curve in rates.items() if kind.startswith("matmul")}
    found = Cluster(
        name=f"{ranks} x {name}",
        nodes=(
            Nodes(
                count=ranks // per_node,
                devices=per_node,
                cores=cores,
                device=Device(
                    name=name,
                    memory_bytes=memory_bytes or device_memory(per_node),
                    matmul=matmul,
                    rates={kind: curve for kind, curve in rates.items() if not kind.startswith("matmul")},
                    overhead_s=overhead,
                    accelerator=device.type != "cpu",
                    reserved_bytes=reserved,
                    allocator_share=share,
                ),
            ),
        ),
        links=_links(device, ranks, per_node),
        calibration="measured here",
    )
    return _agree(found)


def _rates(clock: Clock, dtypes: tuple[str, ...]) -> tuple[dict[str, Curve], float]:
    """Curves by kind and the overhead, means over all ranks."""
    work: list[Probe] = list(probes(clock.device, tuple(getattr(torch, name) for name in dtypes)))
    _barrier()
    overhead = _mean([overhead_s(clock)])[0]
    seconds = _mean(time_probes(work, clock, repeats=5, at_least_s=5e-4))
    return curves(work, seconds, overhead), overhead


def _cores(clock: Clock, ranks: int, per_node: int) -> float | None:
    """How many of a node's processes compute at full speed at once; None: all."""
    # Other programs come and go: the most of several windows is what the machine gives.
    shares = speed = 0.0
    for _ in range(WINDOWS):
        _barrier()
        share, rate = _mean(list(_spin(clock)))
        shares, speed = (share, rate) if share > shares else (shares, speed)
    # The others wait in the barrier, asleep.
    alone = _spin(clock)[1] if dist.get_rank() == 0 else 0.0
    _barrier()
    alone = _mean([alone])[0] * ranks
    cores = shares * per_node * speed / alone
    return None if cores > 0.95 * per_node else round(cores, 2)


def _spin(clock: Clock) -> tuple[float, float]:
    """Compute for WINDOW_S: processor seconds per second, and matrix products per processor second."""
    x, w = torch.randn(256, 256), torch.randn(256, 256)
    count, began, spent = 0, time.perf_counter(), 0.0
    while time.perf_counter() - began < WINDOW_S:
        spent += clock.seconds(lambda: x @ w)
        count += 1
    return spent / (time.perf_counter() - began), count / spent


def _links(device: torch.device, ranks: int, per_node: int) -> tuple[Link, ...]:
    """Links inside a node and between nodes."""
    if ranks == 1:
        return ()
    levels = [("inside a node", 1, per_node)] if per_node > 1 else []
    if ranks > per_node:
        levels.append(("between nodes", per_node, ranks))
    links = []
    for name, below, devices in levels:
        latency, transfer = (_transfer_s(device, size, ranks, below) for size in MESSAGE_BYTES)
        alone = None
        if below > 1:
            alone = _rate(latency, _transfer_s(device, MESSAGE_BYTES[1], ranks, below, alone=True))
        links.append(
            Link(
                name=name,
                devices=devices,
                latency_s=latency,
                bytes_per_s=_rate(latency, transfer),
                collectives=tuple(
                    c for size, stride in groups_of(below, devices) for c in _collectives(device, ranks, size, stride)
                ),
                alone_bytes_per_s=alone,
            )
        )
    return tuple(links)


def groups_of(below: int, devices: int) -> list[tuple[int, int]]:
    """Sizes and strides of the groups of a mesh that need the link which connects ``devices`` devices, where an inner
    one connects ``below``. Inside a node the stride makes no difference."""
    strides = [s for s in range(1, below + 1) if below % s == 0]
    return [
        (size, stride)
        for stride in strides
        for size in range(2, devices // stride + 1)
        if devices // stride % size == 0 and size * stride > below
    ]


def _rate(latency_s: float, transfer_s: float) -> float:
    """Bytes per second of the large message, without the latency."""
    return MESSAGE_BYTES[1] / max(transfer_s - latency_s, 0.1 * transfer_s)


def _transfer_s(device: torch.device, size: int, ranks: int, stride: int, *, alone: bool = False) -> float:
    """Seconds of a message from a rank to the one ``stride`` above it: half a round trip. All pairs at once, or the
    first one ``alone``."""
    rank = dist.get_rank()
    upper = rank // stride % 2 == 1
    peer = rank - stride if upper else rank + stride
    message = torch.zeros(size, dtype=torch.uint8, device=device)

    def round_trip() -> None:
        if upper:
            dist.recv(message, peer)
            dist.send(message, peer)
        else:
            dist.send(message, peer)
            dist.recv(message, peer)

    return _typical(round_trip if peer < ranks and not (alone and min(rank, peer)) else None, device) / 2


def _collectives(device: torch.device, ranks: int, size: int, stride: int) -> list[Collective]:
    """Every collective over groups of ``size`` ranks, ``stride`` apart."""
    rank = dist.get_rank()
    groups = [
        [first + i * stride for i in range(size)]
        for block in range(0, ranks, size * stride)
        for first in range(block, block + stride)
    ]
    mine = None
    for members in groups:
        group = dist.new_group(members)  # every rank takes part in making every group
        if rank in members:
            mine = group
    found = []
    for kind in COLLECTIVES:
        seconds = [_typical(_collective(kind, total, size, mine, device), device) for total in COLLECTIVE_BYTES]
        rates = tuple(total / spent for total, spent in zip(COLLECTIVE_BYTES, seconds, strict=True))
        curve = Curve(tuple(map(float, COLLECTIVE_BYTES)), rates)
        found.append(Collective(kind=kind, ranks=size, stride=stride, rates=curve))
    if mine is not None:
        dist.destroy_process_group(mine)
    return found


def _collective(
    kind: str, total: int, ranks: int, group: dist.ProcessGroup | None, device: torch.device
) -> Callable[[], object] | None:
    """One collective on a tensor of ``total`` bytes, of which each rank holds a part where the kind divides it."""
    if group is None:
        return None
    whole = torch.zeros(total // 4 // ranks * ranks, device=device)
    part = torch.zeros(total // 4 // ranks, device=device)
    if kind == "all_reduce":
        return lambda: dist.all_reduce(whole, group=group)
    if kind == "all_gather":
        return lambda: ALL_GATHER(whole, part, group=group)
    return lambda: REDUCE_SCATTER(part, whole, group=group)


def _typical(run: Callable[[], object] | None, device: torch.device) -> float:
    """Seconds of a communication: the lower quartile, as disturbances only add; mean over the ranks that take part.

    The first run opens connections and says how often it can be repeated.
    """
    once = _seconds(run, 1, device)
    once, taking_part = _mean([min(once, _seconds(run, 1, device)), float(run is not None)])
    once /= taking_part
    count = max(1, min(8, round(IN_A_ROW_S / once)))
    fewest, most = REPEATS
    repeats = max(fewest, min(most, round(SPEND_S / (count * once))))
    times = [_seconds(run, count, device) for _ in range(repeats)]
    return _mean([quantiles(times, n=4)[0]])[0] / taking_part


def _seconds(run: Callable[[], object] | None, count: int, device: torch.device) -> float:
    """Seconds of one run of ``count`` in a row, from a point where all ranks meet; 0 for those that have none."""
    _barrier()
    if run is None:
        return 0.0
    _synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        run()
    _synchronize(device)
    return (time.perf_counter() - began) / count


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _mean(values: list[float]) -> list[float]:
    """Means over all ranks."""
    if not dist.is_initialized():
        return values
    gathered: list[list[float]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, values)
    return [fmean(column) for column in zip(*gathered, strict=True)]


def _agree(cluster: Cluster) -> Cluster:
    """Rank 0's cluster, on every rank: memory may differ in the last bytes."""
    if not dist.is_initialized():
        return cluster
    box: list[Cluster | None] = [cluster]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return box[0]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
