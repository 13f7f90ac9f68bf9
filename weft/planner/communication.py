"""Seconds and bytes of communication.

Ranks that talk to each other span levels of links (``Path``). On a level, ``M`` devices stand together below it, each
has its own link of bandwidth ``w`` out of there, and all of them carry a part, so ``n`` ranks reach ``W = min(M w)``
over the levels, and a message goes ``n - 1`` hops of latency ``a``, each of its level. For a tensor of ``B`` bytes (the
whole tensor), by the ring algorithm (Patarasuk and Yuan 2009):

    all_reduce      2 (sum a + (n - 1) / n B / W)
    all_gather         sum a + (n - 1) / n B / W
    reduce_scatter     sum a + (n - 1) / n B / W
    all_to_all             a + max (m' - m) / n B / w    a level with m ranks below it, m' within
    transfer               a + B / w                     point to point

or, where it is less, an all-reduce by trees over the ``N`` parts of the outermost level and chains below (Sanders,
Speck and Traff 2009, as in NCCL): ``2 (log2(N) a + chains + B / W)``.

A link that carries measured collectives is believed instead: the measurement on as many ranks, or the one nearest in
number, scaled by the ratio of the formulas above.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import NamedTuple

from weft.cluster.links import Collective, Link
from weft.cluster.topology import Cluster
from weft.planner.space import Degrees

ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
"""Times a rank passes on ``n - 1`` parts of a tensor."""


class Level(NamedTuple):
    """A level of links that ranks span: how many ranks stand together below it, and with it."""

    link: Link
    below: int
    within: int


class Path(NamedTuple):
    """The levels of links that a group of ranks spans, innermost first."""

    levels: tuple[Level, ...]
    stride: int = 1
    trees: bool = False  # the outermost level is a network of nodes, of which each may hold one of the ranks

    @classmethod
    def of(cls, cluster: Cluster, ranks: int, stride: int) -> Path:
        """The path of ``ranks`` ranks that are ``stride`` devices apart."""
        levels, below = [], 1
        for link in cluster.levels:
            whole = link.devices // stride if link.devices % stride == 0 or link.devices > stride else 1
            within = min(max(whole, 1), ranks)
            if within > below and ranks % within:  # a group does not end where the level does
                within = math.gcd(ranks, within)
            if within > below:
                levels.append(Level(link, below, within))
                below = within
        if below < ranks:
            levels.append(Level(cluster.links[-1], below, ranks))
        return cls(tuple(levels), stride, bool(levels) and levels[-1].link is not cluster.levels[0])

    @classmethod
    def flat(cls, link: Link, ranks: int) -> Path:
        """Ranks on one level."""
        return cls((Level(link, 1, ranks),))

    @property
    def ranks(self) -> int:
        """How many they are."""
        return self.levels[-1].within

    @property
    def link(self) -> Link:
        """The outermost link."""
        return self.levels[-1].link

    @property
    def bytes_per_s(self) -> float:
        """What every rank passes on while all do."""
        return min(level.below * level.link.bytes_per_s for level in self.levels)

    @property
    def hops_s(self) -> float:
        """Latency of once around the ring, but for the last hop."""
        return sum((self.ranks // v.below - self.ranks // v.within) * v.link.latency_s for v in self.levels)

    @property
    def tree_s(self) -> float:
        """Latency of a tree over the outermost level's parts and of the chains below; infinite inside a node."""
        if not self.trees:
            return math.inf
        top = self.levels[-1]
        chains = sum((v.within // v.below - 1) * v.link.latency_s for v in self.levels[:-1])
        return math.log2(top.within / top.below) * top.link.latency_s + chains


def ring_s(kind: str, size: float, path: Path) -> float:
    """Seconds of a collective on a tensor of ``size`` bytes: by rings, an all-reduce also by trees; an all-to-all goes
    straight from every rank to every other."""
    n = path.ranks
    if kind == "all_to_all":
        return path.link.latency_s + max((v.within - v.below) / n * size / v.link.bytes_per_s for v in path.levels)
    seconds = ROUNDS[kind] * (path.hops_s + (n - 1) / n * size / path.bytes_per_s)
    if kind != "all_reduce":
        return seconds
    return min(seconds, 2 * (path.tree_s + size / path.bytes_per_s))


def collective_s(kind: str, size: float, path: Path) -> float:
    """Seconds of a collective on a tensor of ``size`` bytes (the whole tensor) along a path."""
    if not path.levels or size <= 0:
        return 0.0
    measured = path.link.measured(kind, path.stride)
    if not measured:
        return ring_s(kind, size, path)
    ranks = path.ranks

    def distance(collective: Collective) -> float:
        return max(collective.ranks / ranks, ranks / collective.ranks)

    nearest = min(measured, key=distance)
    seconds = measured_s(nearest, size)
    if nearest.ranks == ranks:
        return seconds
    here, there = Path.flat(path.link, ranks), Path.flat(path.link, nearest.ranks)
    return seconds * ring_s(kind, size, here) / ring_s(kind, size, there)


def measured_s(collective: Collective, size: float) -> float:
    """Seconds, on straight lines between the sizes measured; all latency below the smallest, all bandwidth above the
    largest."""
    sizes = collective.rates.sizes
    seconds = [s / r for s, r in zip(sizes, collective.rates.rates, strict=True)]
    if size <= sizes[0]:
        return seconds[0]
    if size >= sizes[-1]:
        return size / collective.rates.rates[-1]
    i = bisect_right(sizes, size)
    share = (size - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
    return seconds[i - 1] + share * (seconds[i] - seconds[i - 1])


def collective_bytes(kind: str, size: float, ranks: int) -> float:
    """Bytes each rank sends in a collective on a tensor of ``size`` bytes."""
    return ROUNDS[kind] * (ranks - 1) / ranks * size


def transfer_s(size: float, link: Link) -> float:
    """Seconds a message of ``size`` bytes takes."""
    return link.latency_s + size / link.bytes_per_s


def expert_shards(degrees: Degrees, shards: int) -> int:
    """Ranks that shard a part of the experts where ``shards`` ranks shard other parameters."""
    return max(1, shards * degrees.tp // degrees.parts) if shards > 1 else 1


class Mesh:
    """The links that each dimension of a mesh spans on a cluster, in the rank order of ``plan.DIMENSIONS``.

    The ranks of ``cp`` keep the same parameters: they average gradients with those of ``dp_shard``, which shard
    among all of them (``shards``), or with those of ``dp_replicate``. Experts that ``ep`` divides lie with ``etp``
    innermost; what of the ranks is left over keeps the same experts, and shards or copies them.
    """

    def __init__(self, cluster: Cluster, degrees: Degrees, shards: int) -> None:
        self.devices, pp, tp = degrees.devices, degrees.pp, degrees.tp
        copies = self.devices // (pp * tp * shards)
        spans = {"tp": (tp, 1), "cp": (degrees.cp, tp), "dp_shard": (shards, tp), "dp_replicate": (copies, tp * shards)}
        spans |= {"pp": (pp, self.devices // pp), "everyone": (self.devices, 1), "replicas": (shards * copies, tp)}
        parts, alike = degrees.parts, expert_shards(degrees, shards)
        copies = self.devices // (pp * parts * alike)
        spans |= {"ep": (degrees.ep, degrees.etp or tp)}
        spans |= {"expert_shard": (alike, parts), "expert_replicate": (copies, parts * alike)}
        self._paths = {name: Path.of(cluster, *span) for name, span in spans.items() if span[0] > 1}
        self._seconds: dict[tuple[str, str, float], float] = {}

    def ranks(self, dimension: str) -> int:
        """How many ranks a dimension spans, as its collectives do."""
        return self._paths[dimension].ranks if dimension in self._paths else 1

    def collective_s(self, dimension: str, kind: str, size: float) -> float:
        """Seconds of a collective along a dimension; 0 where its degree is 1."""
        if dimension not in self._paths:
            return 0.0
        key = (dimension, kind, size)
        if key not in self._seconds:
            self._seconds[key] = collective_s(kind, size, self._paths[dimension])
        return self._seconds[key]

    def bytes(self, dimension: str, kind: str, size: float) -> float:
        """Bytes a rank sends in a collective along a dimension."""
        return collective_bytes(kind, size, self.ranks(dimension))

    def link(self, dimension: str) -> Link | None:
        """The link between neighbours along a dimension; None where its degree is 1."""
        return self._paths[dimension].link if dimension in self._paths else None
