"""Seconds and bytes of communication.

For ``n`` ranks, a tensor of ``B`` bytes (the whole tensor), latency ``a`` and bandwidth ``w`` of the link they span, by
the ring algorithm (Patarasuk and Yuan 2009):

    all_reduce      2 (n - 1) (a + B / (n w))
    all_gather        (n - 1) (a + B / (n w))
    reduce_scatter    (n - 1) (a + B / (n w))
    transfer                   a + B / w                     point to point

A link that carries measured collectives is believed instead: the measurement on as many ranks, or the one nearest in
number, scaled by the ratio of the formulas above.
"""

from __future__ import annotations

from bisect import bisect_right

from weft.cluster.topology import Cluster, Collective, Link

ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
"""Times a ring passes ``n - 1`` parts of a tensor around."""


def ring_s(kind: str, size: float, ranks: int, link: Link) -> float:
    """Seconds of a collective on a tensor of ``size`` bytes by the ring algorithm."""
    return ROUNDS[kind] * (ranks - 1) * (link.latency_s + size / (ranks * link.bytes_per_s))


def collective_s(kind: str, size: float, ranks: int, link: Link) -> float:
    """Seconds of a collective on a tensor of ``size`` bytes (the whole tensor) over ``ranks`` ranks."""
    if ranks == 1 or size <= 0:
        return 0.0
    measured = [c for c in link.collectives if c.kind == kind]
    if not measured:
        return ring_s(kind, size, ranks, link)

    def distance(collective: Collective) -> float:
        return max(collective.ranks / ranks, ranks / collective.ranks)

    nearest = min(measured, key=distance)
    seconds = measured_s(nearest, size)
    if nearest.ranks == ranks:
        return seconds
    return seconds * ring_s(kind, size, ranks, link) / ring_s(kind, size, nearest.ranks, link)


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


class Mesh:
    """The links that each dimension of a mesh spans on a cluster, in the rank order of ``plan.DIMENSIONS``."""

    def __init__(self, cluster: Cluster, *, pp: int, dp_replicate: int, dp_shard: int, tp: int) -> None:
        stride = 1
        self._links: dict[str, Link] = {}
        self._ranks = {"tp": tp, "dp_shard": dp_shard, "dp_replicate": dp_replicate, "pp": pp}
        for dimension, ranks in self._ranks.items():
            if ranks > 1:
                self._links[dimension] = cluster.link(ranks, stride)
            stride *= ranks
        self._everyone = cluster.link(stride) if stride > 1 else None
        self._devices = stride

    def collective_s(self, dimension: str, kind: str, size: float) -> float:
        """Seconds of a collective along a dimension; 0 where its degree is 1."""
        if dimension not in self._links:
            return 0.0
        return collective_s(kind, size, self._ranks[dimension], self._links[dimension])

    def bytes(self, dimension: str, kind: str, size: float) -> float:
        """Bytes a rank sends in a collective along a dimension."""
        return collective_bytes(kind, size, self._ranks[dimension])

    def everyone_s(self, size: float) -> float:
        """Seconds of an all-reduce over every device."""
        return 0.0 if self._everyone is None else collective_s("all_reduce", size, self._devices, self._everyone)

    @property
    def pipeline(self) -> Link | None:
        """The link between neighbouring stages; None where there is one stage."""
        return self._links.get("pp")
