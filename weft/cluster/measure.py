"""Measures a cluster from inside a job: every rank of an initialised process group calls ``measure``.

    rates, cores  all ranks compute at once, each on its own device; where devices are processes on shared cores, each
                  of them while its neighbours sleep, too (``kinds``)
    links         pairs of neighbours exchange messages, all pairs at once
    collectives   over groups of every size that divides the number of ranks, all groups at once

so that more processes than cores are predicted as they run. A few seconds in all.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean, quantiles
from typing import TypeVar

import torch
import torch.distributed as dist

from weft.cluster import presets
from weft.cluster.curve import Curve
from weft.cluster.kinds import look, nodes_of
from weft.cluster.local import device_memory
from weft.cluster.rates import Clock, probes
from weft.cluster.topology import (
    COLLECTIVES,
    LIMITED_SHARE,
    UNLIMITED_SHARE,
    Cluster,
    Collective,
    Link,
)
from weft.errors import ClusterError
from weft.quantity import Sizes, each_of, parse_sizes

# Renamed in torch 2.13, which warns of the old names.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

REPEATS = 7
MESSAGE_BYTES = (64, 2**22)
"""A message that is all latency, and one that is all bandwidth."""

COLLECTIVE_BYTES = (2**12, 2**18, 2**22)

T = TypeVar("T")


def measure(
    *, memory_bytes: Sizes = None, devices_per_node: int | None = None, dtypes: tuple[str, ...] = ("float32",)
) -> Cluster:
    """The cluster that this job's ranks form; every rank returns the same.

    Args:
        memory_bytes: limit of each device, or of every rank's; None: an accelerator's own memory, or an equal part of
            the machine's.
        devices_per_node: consecutive ranks on one node; None: all.
        dtypes: of the matrix products to time.

    Raises:
        ClusterError: nodes that are not equal.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    per_node = devices_per_node or ranks
    if ranks % per_node:
        raise ClusterError(f"{ranks} ranks do not make whole nodes of {per_node} devices per node")
    accelerator = torch.accelerator.current_accelerator()
    device = torch.device("cpu") if accelerator is None else accelerator
    clock = Clock(device)
    name = "CPU process" if device.type == "cpu" else _device_name(device)
    limits = parse_sizes(memory_bytes)
    reserved, share = presets.accelerator_memory()
    if device.type == "cpu":
        reserved, share = presets.process_bytes(), LIMITED_SHARE if limits else UNLIMITED_SHARE
    work = list(probes(device, tuple(getattr(torch, dtype) for dtype in dtypes)))
    memory = _memory(limits, ranks, per_node)[dist.get_rank() if ranks > 1 else 0]
    every = _gather(look(clock, work, name=name, memory_bytes=memory, per_node=per_node))
    found = Cluster(
        name=" + ".join(f"{count} x {name}" for name, count in Counter(rank.name for rank in every).items()),
        nodes=nodes_of(
            every,
            work,
            per_node=per_node,
            accelerator=device.type != "cpu",
            reserved_bytes=reserved,
            allocator_share=share,
        ),
        links=_links(device, ranks, per_node),
        calibration="measured here",
    )
    return _agree(found)


def _memory(limits: Sequence[int], ranks: int, per_node: int) -> list[int]:
    """Memory of every rank's device. Where nothing limits it, nodes that differ a little count as equal."""
    if limits:
        return [limit for limit in each_of(limits, ranks) if limit is not None]
    every = _gather(device_memory(per_node))
    return [min(every)] * ranks if min(every) > 0.95 * max(every) else every


def _links(device: torch.device, ranks: int, per_node: int) -> tuple[Link, ...]:
    """Links inside a node and between nodes."""
    if ranks == 1:
        return ()
    levels = [("inside a node", per_node, 1)] if per_node > 1 else []
    if ranks > per_node:
        levels.append(("between nodes", ranks, per_node))
    links = []
    for name, devices, stride in levels:
        latency, transfer = (_transfer_s(device, size, ranks, stride) for size in MESSAGE_BYTES)
        sizes = [n for n in range(2, devices // stride + 1) if (devices // stride) % n == 0]
        links.append(
            Link(
                name=name,
                devices=devices,
                latency_s=latency,
                bytes_per_s=MESSAGE_BYTES[1] / max(transfer - latency, 0.1 * transfer),
                collectives=tuple(c for n in sizes for c in _collectives(device, ranks, n, stride)),
            )
        )
    return tuple(links)


def _transfer_s(device: torch.device, size: int, ranks: int, stride: int) -> float:
    """Seconds of a message from a rank to the one ``stride`` above it, all pairs at once: half a round trip."""
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

    return _typical(round_trip if peer < ranks else None, device, count=4) / 2


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
        seconds = [
            _typical(_collective(kind, total, size, mine, device), device, count=3) for total in COLLECTIVE_BYTES
        ]
        rates = tuple(total / spent for total, spent in zip(COLLECTIVE_BYTES, seconds, strict=True))
        found.append(Collective(kind=kind, ranks=size, rates=Curve(tuple(map(float, COLLECTIVE_BYTES)), rates)))
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


def _typical(run: Callable[[], object] | None, device: torch.device, *, count: int) -> float:
    """Seconds of a communication, ``count`` in a row: the lower quartile, as disturbances only add; mean over ranks."""
    times = []
    for _ in range(REPEATS):
        _barrier()
        if run is None:
            continue
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(count):
            run()
        _synchronize(device)
        times.append((time.perf_counter() - began) / count)
    seconds = quantiles(times, n=4)[0] if times else 0.0
    total, taking_part = _mean([seconds, float(run is not None)])
    return total / taking_part


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _mean(values: list[float]) -> list[float]:
    """Means over all ranks."""
    return [fmean(column) for column in zip(*_gather(values), strict=True)]


def _gather(value: T) -> list[T]:
    """Every rank's value."""
    if not dist.is_initialized():
        return [value]
    gathered = [value] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


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
