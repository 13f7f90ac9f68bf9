"""Links: what devices exchange messages over, one level of the hierarchy each, and collectives as measured on them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from weft.cluster.curve import Curve
from weft.errors import ClusterError

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """A collective as measured on groups of ``ranks`` ranks, ``stride`` apart, all groups at once: ``rates`` in bytes/s
    over bytes, both of the whole tensor."""

    kind: str
    ranks: int
    rates: Curve
    stride: int = 1

    def __post_init__(self) -> None:
        if self.kind not in COLLECTIVES:
            raise ClusterError(f"collective {self.kind!r} is unknown; known ones are {', '.join(COLLECTIVES)}")
        if self.ranks < 2 or self.stride < 1:
            raise ClusterError(
                f"collective {self.kind}: ranks must be at least 2 and stride at least 1, got {self.ranks} and "
                f"{self.stride}"
            )


@dataclass(frozen=True, kw_only=True)
class Link:
    """One level of the hierarchy of links.

    Attributes:
        devices: how many consecutive devices the level connects.
        latency_s: of one message, besides what it costs its ends.
        busy_s: that each end of a message spends on it and does not compute; 0 for accelerators, whose messages cost
            them nothing.
        bytes_per_s: per device and direction, while all devices send.
        collectives: as measured at this level; where there are none they are computed by the ring algorithm.
        alone_bytes_per_s: of a device whose neighbours send nothing, where they share what carries the messages (a
            node's one network card); None: a device has the same whatever others do.
        among: the devices it is about, from the first up to the second number: a level of some nodes only, whose
            groups are counted from the first; None: all devices.
    """

    name: str
    devices: int
    latency_s: float
    bytes_per_s: float
    collectives: tuple[Collective, ...] = ()
    alone_bytes_per_s: float | None = None
    busy_s: float = 0.0
    among: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.devices < 2 or not min(self.latency_s, self.busy_s) >= 0 or not self.bytes_per_s > 0:
            raise ClusterError(
                f"link {self.name}: needs devices >= 2, latency_s >= 0, busy_s >= 0 and bytes_per_s > 0, "
                f"got {self.devices}, {self.latency_s}, {self.busy_s} and {self.bytes_per_s}"
            )
        if self.alone_bytes_per_s is not None and not self.alone_bytes_per_s > 0:
            raise ClusterError(f"link {self.name}: alone_bytes_per_s must be positive, got {self.alone_bytes_per_s}")
        if self.among is not None and not 0 <= self.among[0] < self.among[1]:
            raise ClusterError(f"link {self.name}: among needs two device numbers, first and end, got {self.among}")

    def shared_by(self, senders: int, of: int) -> Link:
        """The link as one of ``senders`` devices sees it that send at once, ``of`` so many that share it."""
        alone = self.alone_bytes_per_s or self.bytes_per_s
        return replace(self, bytes_per_s=max(self.bytes_per_s, min(alone, self.bytes_per_s * of / senders)))

    def measured(self, kind: str, stride: int) -> tuple[Collective, ...]:
        """Collectives of a kind as measured on groups of ranks that are so far apart; none were: on any groups."""
        known = tuple(c for c in self.collectives if c.kind == kind)
        return tuple(c for c in known if c.stride == stride) or known

    def connects(self, one: int, other: int) -> bool:
        """Whether it connects two devices, by number."""
        start, end = self.among or (0, math.inf)
        inside = start <= min(one, other) and max(one, other) < end
        return inside and (one - start) // self.devices == (other - start) // self.devices
