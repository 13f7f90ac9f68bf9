"""Kinds: what every rank measures of its own device, and which devices are alike.

    speed     of a rank: how much faster than the ranks' mean it does the probes (geometric mean over them), times the
              share of a core that it may use (``local.core_share``)
    noise     processes of one node that differ by less than NOISE are equal: they share its cores
    kinds     ranks in the order of their speed: one that is more than TOLERANCE slower than the next faster one begins
              another kind, as does one of another name
    device    of a rank: means over the ranks of its kind, so that noise is averaged and not taken for a difference,
              with the rank's own memory
    cores     of a node: the work that all its ranks together do per second, in what one does alone on a core

A processor's rates are taken per second of processor time, so that a rank that waits for a core is not taken for a slow
one; a device that may use a share of a core does that much less.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, median

import torch
import torch.distributed as dist

from weft.cluster.local import core_share, usable_cores
from weft.cluster.nodes import Nodes
from weft.cluster.parts import Node, entries
from weft.cluster.rates import Clock, Probe, curves, overhead_s, time_probes
from weft.cluster.topology import Device

TOLERANCE = 0.15
"""How much slower than the next faster one a device of the same kind may be. Four and eight equal processes on two busy
cores differed by up to 10 % from one to the next."""

NOISE = 0.35
"""How much slower than the fastest one of the same node a process may be and still be its equal, since what makes it
slower within a measurement passes. Four equal processes on two busy cores differed by 30 %; processes that are pinned
to slower cores of the same machine differ by more."""

WINDOWS, WINDOW_S, ALONE_S = 5, 0.2, 0.04
"""How often and how long all ranks compute at once to see what they get of the cores, and how long each by itself, in
turns."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What one rank measured.

    Attributes:
        name: of its device.
        memory_bytes: of its device.
        seconds: of every probe, by its clock, while all ranks compute.
        overhead_s: of an operation, likewise.
        core_share: of a core that it may use.
        work: per window in which all ranks compute, what it does per second, in what it does alone per processor
            second. Empty where devices are not processes on shared cores.
        cores: of its machine that it may use.
    """

    name: str
    memory_bytes: int
    seconds: tuple[float, ...]
    overhead_s: float
    core_share: float = 1.0
    work: tuple[float, ...] = ()
    cores: float = math.inf


def look(clock: Clock, probes: Sequence[Probe], *, name: str, memory_bytes: int, per_node: int) -> Rank:
    """Measure this rank's device. All ranks of the job call it, ``per_node`` consecutive ones on a node."""
    meet()
    overhead = overhead_s(clock)
    seconds = tuple(time_probes(list(probes), clock, repeats=5, at_least_s=5e-4))
    if not clock.shares_cores:
        return Rank(name=name, memory_bytes=memory_bytes, seconds=seconds, overhead_s=overhead)
    rank = dist.get_rank() if dist.is_initialized() else 0
    together, alone = [], []
    for _ in range(WINDOWS):
        meet()
        together.append(_spin(clock, WINDOW_S))
        for turn in range(per_node):
            meet()
            if rank % per_node == turn:  # its neighbours wait in the barrier, asleep
                alone.append(_spin(clock, ALONE_S)[1])
        meet()
    return Rank(
        name=name,
        memory_bytes=memory_bytes,
        seconds=seconds,
        overhead_s=overhead,
        core_share=core_share(),
        work=tuple(got * products / median(alone) for got, products in together),
        cores=usable_cores(),
    )


def kinds_of(ranks: Sequence[Rank]) -> list[int]:
    """The kind of every rank, by number."""
    speeds = _speeds(ranks)
    order = sorted(range(len(ranks)), key=lambda r: (ranks[r].name, -speeds[r]))
    kinds = [0] * len(ranks)
    for before, r in pairwise(order):
        other = ranks[r].name != ranks[before].name or speeds[r] < (1 - TOLERANCE) * speeds[before]
        kinds[r] = kinds[before] + other
    return kinds


def nodes_of(
    ranks: Sequence[Rank],
    probes: Sequence[Probe],
    *,
    per_node: int,
    accelerator: bool,
    reserved_bytes: int,
    allocator_share: float,
) -> tuple[Nodes, ...]:
    """The entries of a cluster of these ranks.

    Args:
        ranks: what each measured.
        probes: that they measured it with.
        per_node: consecutive ranks on a node.
        accelerator, reserved_bytes, allocator_share: of every device, as in Device.
    """
    ranks = [rank for start in range(0, len(ranks), per_node) for rank in _levelled(ranks[start : start + per_node])]
    kinds, speeds = kinds_of(ranks), _speeds(ranks)
    fastest: dict[str, float] = {}  # kinds of one name come in the order of their speed
    devices: list[Device] = []
    for kind in range(max(kinds) + 1):
        members = [rank for rank, own in zip(ranks, kinds, strict=True) if own == kind]
        name = members[0].name
        share = fmean(rank.core_share for rank in members)
        speed = fmean(speed for speed, own in zip(speeds, kinds, strict=True) if own == kind)
        relative = speed / fastest.setdefault(name, speed)
        overhead = fmean(rank.overhead_s for rank in members) / share
        seconds = [fmean(column) / share for column in zip(*(rank.seconds for rank in members), strict=True)]
        rates = curves(list(probes), seconds, overhead)
        devices.append(
            Device(
                name=name if relative > 1 - TOLERANCE else f"{name} at {relative:.0%}",
                memory_bytes=members[0].memory_bytes,
                matmul={what.split()[1]: curve for what, curve in rates.items() if what.startswith("matmul")},
                rates={what: curve for what, curve in rates.items() if not what.startswith("matmul")},
                overhead_s=overhead,
                accelerator=accelerator,
                reserved_bytes=reserved_bytes,
                allocator_share=allocator_share,
                core_share=share,
            )
        )
    own = [replace(devices[kind], memory_bytes=rank.memory_bytes) for kind, rank in zip(kinds, ranks, strict=True)]
    starts = range(0, len(ranks), per_node)
    alike = {s: tuple(kinds[s : s + per_node]) for s in starts}
    return entries(
        Node(
            tuple(own[start : start + per_node]),
            _cores([ranks[s : s + per_node] for s in starts if alike[s] == alike[start]]),
        )
        for start in starts
    )


def _levelled(node: Sequence[Rank]) -> Sequence[Rank]:
    """Processes of one node, each with the mean of their seconds where they differ by no more than noise."""
    means = [fmean(column) for column in zip(*(rank.seconds for rank in node), strict=True)]
    speeds = [speed / rank.core_share for speed, rank in zip(_speeds(node), node, strict=True)]
    if not node[0].work or len({rank.name for rank in node}) > 1 or min(speeds) < (1 - NOISE) * max(speeds):
        return node
    return [replace(rank, seconds=tuple(means)) for rank in node]


def _speeds(ranks: Sequence[Rank]) -> list[float]:
    """Of every rank, relative to the others'."""
    means = [fmean(column) for column in zip(*(rank.seconds for rank in ranks), strict=True)]
    return [
        rank.core_share * math.exp(fmean(math.log(m / s) for m, s in zip(means, rank.seconds, strict=True)))
        for rank in ranks
    ]


def _cores(nodes: Sequence[Sequence[Rank]]) -> float | None:
    """How many cores' work nodes of the same kinds do, on average; None: as much as their ranks can take.

    Other programs come and go: the best of the windows is what a node gives, up to the cores it has.
    """
    if len(nodes[0]) == 1 or not nodes[0][0].work:
        return None
    cores = fmean(min(node[0].cores, max(map(sum, zip(*(rank.work for rank in node), strict=True)))) for node in nodes)
    wanted = fmean(sum(rank.core_share for rank in node) for node in nodes)
    return None if cores > 0.95 * wanted else round(cores, 2)


def _spin(clock: Clock, seconds: float) -> tuple[float, float]:
    """Compute for so long: processor seconds per second, and matrix products per processor second."""
    x, w = torch.randn(256, 256), torch.randn(256, 256)
    count, began, spent = 0, time.perf_counter(), 0.0
    while time.perf_counter() - began < seconds:
        spent += clock.seconds(lambda: x @ w)
        count += 1
    return spent / (time.perf_counter() - began), count / spent


def meet() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()
