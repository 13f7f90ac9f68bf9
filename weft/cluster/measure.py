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

REPEATS = 7
IN_A_ROW_S, SPEND_S = 2e-3, 0.4
"""A measurement of a communication is of so many in a row as take this long; there are REPEATS of them, or as many as
take SPEND_S: one where it takes longer."""

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
        small, large = MESSAGE_BYTES
        latency = _transfer_s(device, small, ranks, below) / 2
        rates = [
            large / max(seconds - 2 * latency, 0.1 * seconds)
            for alone in (False, True)[: 1 + (below > 1)]
            for seconds in [_transfer_s(device, large, ranks, below, alone=alone)]
        ]
        links.append(
            Link(
                name=name,
                devices=devices,
                latency_s=latency,
                bytes_per_s=rates[0],
                collectives=tuple(
                    c for size, stride in groups_of(below, devices) for c in _collectives(device, ranks, size, stride)
                ),
                alone_bytes_per_s=rates[1] if below > 1 else None,
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


def _transfer_s(device: torch.device, size: int, ranks: int, stride: int, *, alone: bool = False) -> float:
    """Seconds of a message from a rank to the one ``stride`` above it and of a word back. All pairs at once, or one
    ``alone``."""
    rank = dist.get_rank()
    upper = rank // stride % 2 == 1
    peer = rank - stride if upper else rank + stride
    message, word = torch.zeros(size, dtype=torch.uint8, device=device), torch.zeros(1, device=device)

    def there_and_back() -> None:
        if upper:
            dist.recv(message, peer)
            dist.send(word, peer)
        else:
            dist.send(message, peer)
            dist.recv(word, peer)

    takes_part = peer < ranks and not (alone and min(rank, peer))
    return _typical(there_and_back if takes_part else None, device)


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
    """Seconds until a communication is over on all ranks: the lower quartile, as disturbances only add.

    The first runs open connections and say how often it can be repeated.
    """

    def measure(count: int, repeats: int) -> list[float]:
        return _over_ranks(max, [_seconds(run, count, device) for _ in range(repeats)])

    once = measure(1, 1)[0]
    if once < SPEND_S / REPEATS:
        once = measure(1, 1)[0]
    count = max(1, min(8, round(IN_A_ROW_S / once)))
    repeats = min(REPEATS, int(SPEND_S / (count * once)))
    times = measure(count, repeats) if repeats else [once]
    return quantiles(times, n=4)[0] if repeats > 1 else times[0]


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
    return _over_ranks(fmean, values)


def _over_ranks(combine: Callable[[tuple[float, ...]], float], values: list[float]) -> list[float]:
    """Every value combined with the other ranks'."""
    if not dist.is_initialized():
        return values
    gathered: list[list[float]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, values)
    return [combine(column) for column in zip(*gathered, strict=True)]


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
