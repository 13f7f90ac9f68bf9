"""Measures a cluster from inside a job: every rank of an initialised process group calls ``measure``.

    rates, cores  all ranks compute at once, each on its own device; where devices are processes on shared cores, each
                  of them while its neighbours sleep, too (``kinds``)
    links         inside a node and between nodes: pairs of neighbours exchange messages, all pairs at once; between
                  nodes also one pair by itself, since a node's devices may share one network card
    collectives   at either level, over groups of every size and stride that a mesh can have there, all groups at once;
                  where devices are processes these and the latency of messages are what they make computations longer,
                  and what each end of a message costs a core is told apart

so that more processes than cores are predicted as they run. A few seconds in all: where a message takes long it is
sent less often.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from statistics import fmean, median, quantiles
from typing import TypeVar

import torch
import torch.distributed as dist

from weft.cluster import presets
from weft.cluster.curve import Curve
from weft.cluster.kinds import look, nodes_of
from weft.cluster.links import COLLECTIVES, Collective, Link
from weft.cluster.local import device_memory
from weft.cluster.rates import Clock, probes
from weft.cluster.topology import (
    LIMITED_SHARE,
    UNLIMITED_SHARE,
    Cluster,
)
from weft.errors import ClusterError
from weft.quantity import Sizes, each_of, parse_sizes

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

BETWEEN_IN_A_ROW, BETWEEN_REPEATS, BETWEEN_AT_MOST_S = 6, 7, 0.03
"""How many collectives with a computation before each, and how often; longer ones are measured without."""

CACHED_BYTES, COLD_BYTES = 2**16, 2**26
"""Tensors above the first size take turns that are the second in all, more than caches keep: so does training."""

T = TypeVar("T")


def measure(
    *, memory_bytes: Sizes = None, devices_per_node: int | None = None, dtypes: tuple[str, ...] = ("float32",)
) -> Cluster:
    """The cluster that this job's ranks form; every rank returns the same.

    Args:
        memory_bytes: limit of each device, or of every rank's; None: an accelerator's own memory, or an equal part of
            the machine's.
        devices_per_node: consecutive ranks on one node; None: as many as torchrun says, or all; where nodes differ in
            it, every rank counts as a node by itself.
        dtypes: of the matrix products to time.

    Raises:
        ClusterError: nodes that are not equal.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    own = devices_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    per_node = own if len(set(_gather(own))) == 1 else 1  # nodes that lost devices: all links are those between nodes
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
    memory = _memory(limits, ranks, own)[dist.get_rank() if ranks > 1 else 0]
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


def _memory(limits: Sequence[int], ranks: int, own: int) -> list[int]:
    """Memory of every rank's device, of which this node has ``own``. Where nothing limits it, nodes that differ little
    count as equal."""
    if limits:
        return [limit for limit in each_of(limits, ranks) if limit is not None]
    every = _gather(device_memory(own))
    return [min(every)] * ranks if min(every) > 0.95 * max(every) else every


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
        latency, busy = _transfer_s(device, small, ranks, below) / 2, 0.0
        late = latency
        if device.type == "cpu":
            late, busy = (seconds / 2 for seconds in _between(_messages(device, small, ranks, below), device))
        rates = [
            large / max(seconds - 2 * latency, 0.1 * seconds)
            for alone in (False, True)[: 1 + (below > 1)]
            for seconds in [_transfer_s(device, large, ranks, below, alone=alone)]
        ]
        links.append(
            Link(
                name=name,
                devices=devices,
                latency_s=max(latency, late - busy),
                busy_s=busy,
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
    return _typical(_messages(device, size, ranks, stride, alone=alone), device)


def _messages(
    device: torch.device, size: int, ranks: int, stride: int, *, alone: bool = False
) -> Callable[..., torch.Tensor] | None:
    """A message and a word back, as in ``_transfer_s``. Called with False, it does nothing."""
    rank = dist.get_rank()
    upper = rank // stride % 2 == 1
    peer = rank - stride if upper else rank + stride
    message, word = torch.zeros(size, dtype=torch.uint8, device=device), torch.zeros(1, device=device)

    def there_and_back(communicates: bool = True) -> torch.Tensor:
        if communicates and upper:
            dist.recv(message, peer)
            dist.send(word, peer)
        elif communicates:
            dist.send(message, peer)
            dist.recv(word, peer)
        return word

    return there_and_back if peer < ranks and not (alone and min(rank, peer)) else None


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
    found, seconds_of = [], _typical if device.type != "cpu" else _between_s
    for kind in COLLECTIVES:
        seconds = [seconds_of(_collective(kind, total, size, mine, device), device) for total in COLLECTIVE_BYTES]
        rates = tuple(total / spent for total, spent in zip(COLLECTIVE_BYTES, seconds, strict=True))
        curve = Curve(tuple(map(float, COLLECTIVE_BYTES)), rates)
        found.append(Collective(kind=kind, ranks=size, stride=stride, rates=curve))
    if mine is not None:
        dist.destroy_process_group(mine)
    return found


def _collective(
    kind: str, total: int, ranks: int, group: dist.ProcessGroup | None, device: torch.device
) -> Callable[..., torch.Tensor] | None:
    """One collective on a tensor of ``total`` bytes, of which each rank holds a part where the kind divides it. Called
    with False, it does nothing but give the tensor the result would be in."""
    if group is None:
        return None
    share = total // 4 // ranks
    turns = cycle(
        [torch.zeros(share * ranks, device=device), torch.zeros(share, device=device)]
        for _ in range(COLD_BYTES // total if device.type == "cpu" and total > CACHED_BYTES else 1)
    )

    def run(communicates: bool = True) -> torch.Tensor:
        whole, part = next(turns)
        result = part if kind == "reduce_scatter" else whole
        if communicates and kind == "all_reduce":
            dist.all_reduce(whole, group=group)
        elif communicates and kind == "all_gather":
            ALL_GATHER(whole, part, group=group)
        elif communicates:
            REDUCE_SCATTER(part, whole, group=group)
        return result

    return run


def _between(run: Callable[..., torch.Tensor] | None, device: torch.device) -> tuple[float, float]:
    """Seconds by which a communication makes computations longer that it comes between, on processors: ranks do not
    come to it at the same time, who waits has to be woken, and what others sent is far from one's caches. And how many
    of them a rank spends on a core. Accelerators' queues hide this."""
    alone_s = _typical(run, device)
    if alone_s > BETWEEN_AT_MOST_S:
        return alone_s, 0.0
    x, w = torch.randn(512, 256), torch.randn(256, 1024)

    def compute(communicates: bool) -> None:
        x @ w
        if run is not None:
            run(communicates).sum()

    def spent(communicates: bool) -> tuple[float, float]:
        began = time.process_time()
        on_wall = _seconds(partial(compute, communicates), BETWEEN_IN_A_ROW, device)
        return on_wall, (time.process_time() - began) / BETWEEN_IN_A_ROW

    times = [(*spent(True), *spent(False)) for _ in range(BETWEEN_REPEATS)]
    columns = [list(column) for column in zip(*times, strict=True)]
    longer, computing = (median(_over_ranks(max, columns[i])) for i in (0, 2))
    busy, busy_alone = (median(_over_ranks(fmean, columns[i])) for i in (1, 3))
    return max(alone_s, longer - computing), max(0.0, busy - busy_alone)


def _between_s(run: Callable[..., torch.Tensor] | None, device: torch.device) -> float:
    """Seconds by which a communication makes computations longer, as in ``_between``."""
    return _between(run, device)[0]


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
    return [combine(column) for column in zip(*_gather(values), strict=True)]


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
