"""Sites: which devices work on each stage, and how many samples they get. Where all are alike there is one.

Rank ``(stage * replicas + replica) * tp + part`` is the device of that number: they are taken in the cluster's order.

    site     devices of a stage that are alike and get as many samples
    line     replicas whose stages are the same sites: one pipeline stands for all of them. The replicas of ``dp_shard``
             wait for each other in every microbatch from ``zero`` 2 on: they are one line then, on each stage as slow
             as the slowest of them
    shares   samples in proportion to the speed of replicas (``Layouts.shares``)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, TypeVar

from weft.cluster.parts import nodes
from weft.cluster.topology import Cluster
from weft.planner.sharing import level
from weft.planner.space import Candidate, Degrees
from weft.shares import apportion

T = TypeVar("T")
Spot = tuple[int, float]
"""Kind and speed of a device, as in Site."""


class Site(NamedTuple):
    """Devices that do the same for a stage.

    Attributes:
        kind: which of ``Cluster.kinds`` they are.
        samples: of their largest microbatch.
        speed: what the cores of their node leave each while all its devices compute, 1 alone.
        batch: samples of a whole batch.
    """

    kind: int
    samples: int
    speed: float
    batch: int


class Place(NamedTuple):
    """Where a line's devices of a stage are: ``devices`` of them on a node, each taking ``core_share`` of a core of its
    ``cores``."""

    node: int = 0
    devices: int = 1
    core_share: float = 1.0
    cores: float = math.inf


class Line(NamedTuple):
    """Replicas that are alike; ``sites`` and ``places`` by device of the pipeline, or what holds for all of them."""

    replicas: Sequence[int]
    sites: tuple[tuple[Site, ...], ...]
    places: tuple[Place, ...]

    @property
    def samples(self) -> int:
        """Of the largest microbatch."""
        return max(site.samples for sites in self.sites for site in sites)


class Layout(NamedTuple):
    """Where a candidate runs: its lines; and the sites of all of them by device of the pipeline, or one for all."""

    lines: tuple[Line, ...]
    sites: tuple[tuple[Site, ...], ...]


class Column(NamedTuple):
    """What tells a replica from others: the spots of each stage, and the links from stage to stage, by number."""

    spots: tuple[tuple[Spot, ...], ...]
    links: tuple[int, ...]


class Layouts:
    """Layouts of any candidate for a batch on a cluster, each worked out once."""

    def __init__(self, batch_size: int, cluster: Cluster) -> None:
        self.batch_size, self.cluster = batch_size, cluster
        self._spots = spots(cluster)
        self.alike = len(set(self._spots)) == 1
        self._known: dict[object, Layout] = {}
        self._columns = lru_cache(maxsize=None)(self._all_columns)

    def of(self, candidate: Candidate) -> Layout:
        """The layout of a candidate."""
        degrees, shares = candidate.degrees, candidate.shares
        together = degrees.uses_fsdp and candidate.zero > 1
        key = (degrees, candidate.microbatches, shares, together)
        if key not in self._known:
            one = self.alike and not shares
            self._known[key] = self._one(candidate) if one else self._lines(candidate, together)
        return self._known[key]

    def shares(self, candidate: Candidate, seconds: Sequence[float]) -> tuple[int, ...]:
        """Shares in proportion to the speed of replicas, of the samples of a microbatch; none where equal ones are as
        fast.

        A replica is as fast as its slowest stage, with stages cut in proportion to the speed of all their devices.

        Args:
            candidate: with equal shares.
            seconds: of the whole model on each kind of device, for as many samples as equal shares give.
        """
        if self.alike or candidate.degrees.replicas == 1:
            return ()
        rates = {spot: spot[1] / seconds[spot[0]] for spot in set(self._spots)}
        columns = self._columns(candidate.degrees)
        speeds = [[min(rates[spot] for spot in stage) for stage in column.spots] for column in columns]
        stages = [math.fsum(stage) for stage in zip(*speeds, strict=True)]
        each = [max(part / own for part, own in zip(stages, column, strict=True)) for column in speeds]
        length = self.batch_size // candidate.microbatches
        samples = quickest(length, each)
        slowest, equal = (
            max(n * s for n, s in zip(own, each, strict=True)) for own in (samples, apportion(length, [1] * len(each)))
        )
        divisor = math.gcd(*samples)
        return tuple(n // divisor for n in samples) if slowest < equal * (1 - 1e-9) else ()

    def _one(self, candidate: Candidate) -> Layout:
        """All devices are alike, and so are their shares."""
        degrees, cluster, batch = candidate.degrees, self.cluster, self.batch_size
        site = Site(0, -(-batch // (degrees.replicas * candidate.microbatches)), 1.0, -(-batch // degrees.replicas))
        places: tuple[Place, ...] = (Place(),)
        if cluster.cores is not None:
            per_node, share, apart = cluster.devices_per_node, cluster.device.core_share, degrees.devices // degrees.pp
            one = Place(0, min(apart, per_node), share, cluster.cores)
            places = tuple(one._replace(node=stage * apart // per_node) for stage in range(degrees.pp))
        return Layout((Line(range(degrees.replicas), ((site,),), places),), ((site,),))

    def _lines(self, candidate: Candidate, together: bool) -> Layout:
        degrees = candidate.degrees
        columns, counts = self._columns(degrees), list(zip(*self._counts(candidate), strict=True))
        width, groups = degrees.dp_shard if together else 1, dict[object, list[int]]()
        for first in range(0, degrees.replicas, width):
            members = range(first, first + width)
            groups.setdefault(tuple((columns[r], counts[r]) for r in members), []).extend(members)

        def sites(replicas: Sequence[int], stage: int) -> tuple[Site, ...]:
            found = ((counts[r], spot) for r in replicas for spot in columns[r].spots[stage])
            return tuple(dict.fromkeys(Site(kind, n, speed, batch) for (n, batch), (kind, speed) in found))

        stages = range(degrees.pp)
        lines = tuple(
            Line(own, tuple(sites(own, stage) for stage in stages), self._places(degrees, own))
            for own in groups.values()
        )
        every = (dict.fromkeys(site for line in lines for site in line.sites[stage]) for stage in stages)
        return Layout(lines, tuple(map(tuple, every)))

    def _counts(self, candidate: Candidate) -> tuple[list[int], list[int]]:
        """Samples of every replica: in its largest microbatch, and in a batch."""
        replicas, microbatches = candidate.degrees.replicas, candidate.microbatches
        shares, (length, longer) = candidate.shares or (1,) * replicas, divmod(self.batch_size, microbatches)
        short, long = (apportion(n, shares) for n in (length, length + 1))
        both = list(zip(short, long, strict=True))
        batches = [(microbatches - longer) * a + longer * b for a, b in both]
        return [max(a, b * (longer > 0), 1) for a, b in both], batches

    def _places(self, degrees: Degrees, replicas: Sequence[int]) -> tuple[Place, ...]:
        cluster, tp = self.cluster, degrees.tp * degrees.cp
        if cluster.cores is None:
            return (Place(),)
        found = []
        for stage in range(degrees.pp):
            ranks = [(stage * degrees.replicas + r) * tp + part for r in replicas for part in range(tp)]
            node, cores = cluster.node_of(ranks[0]), cluster.nodes_of(ranks[0]).cores or math.inf
            own = [cluster.device_of(rank).core_share for rank in ranks if cluster.node_of(rank) == node]
            found.append(Place(node, len(own), sum(own) / len(own), cores))
        return tuple(found)

    def _all_columns(self, degrees: Degrees) -> list[Column]:
        """Of every replica."""
        cluster, tp = self.cluster, degrees.tp * degrees.cp
        found = []
        for replica in range(degrees.replicas):
            firsts = [(stage * degrees.replicas + replica) * tp for stage in range(degrees.pp)]
            own = tuple(tuple(sorted(set(self._spots[first : first + tp]))) for first in firsts)
            links = tuple(cluster.links.index(cluster.link_between(*pair)) for pair in pairwise(firsts))
            found.append(Column(own, links))
        return found


def at(items: Sequence[T], device: int) -> T:
    """What holds for a device of the pipeline, of what is by device or one for all."""
    return items[device % len(items)]


def spots(cluster: Cluster) -> list[Spot]:
    """The kind and the speed of every device."""
    kinds = cluster.kinds
    if len(kinds) == 1 and cluster.cores is None:
        return [(0, 1.0)] * cluster.devices
    found: list[Spot] = []
    for node in nodes(cluster):
        share = level([(device.core_share, 1) for device in node.devices], node.cores or math.inf)
        found += [(kinds.index(device), min(1.0, share / device.core_share)) for device in node.devices]
    return found


def quickest(samples: int, seconds: Sequence[float]) -> list[int]:
    """Samples for each of some replicas, at least one, so that the last is done as early as can be: one by one to the
    replica that is done first with one more.

    Args:
        samples: to divide, at least as many as there are replicas.
        seconds: of each replica for a sample.
    """
    counts = [1] * len(seconds)
    done = [(2 * each, replica) for replica, each in enumerate(seconds)]
    heapq.heapify(done)
    for _ in range(samples - len(seconds)):
        _, replica = done[0]
        counts[replica] += 1
        heapq.heapreplace(done, ((counts[replica] + 1) * seconds[replica], replica))
    return counts
