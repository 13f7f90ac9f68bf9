"""Nodes: the entries of a cluster. Devices are numbered consecutively over them.

A node whose devices are all of one kind is an entry, or one of an entry's ``count``. A node that has several kinds (one
CPU process is held back by a quota, or has less memory) is several entries, one for each run of equal devices, tied
together by the name of their host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from weft.errors import ClusterError

if TYPE_CHECKING:  # it has entries of this kind itself
    from weft.cluster.topology import Device


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """Nodes of one kind; or the devices of one kind on a node that has several kinds.

    Attributes:
        count: how many nodes.
        devices: devices of each.
        device: their kind.
        cores: how many devices of a node compute at full speed at once; None: all of them. It need not be whole: two
            threads of one core are worth about 1.3.
        host: name of a node that has devices of several kinds: consecutive entries with one name are one node, and
            state the same cores, which all of them share.
    """

    count: int
    devices: int
    device: Device
    cores: float | None = None
    host: str | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or self.devices < 1:
            raise ClusterError(f"nodes need a count and devices of at least 1, got {self.count} x {self.devices}")
        if self.cores is not None and not self.cores > 0:
            raise ClusterError(f"cores must be positive, got {self.cores}")
        if self.host is not None and self.count != 1:
            raise ClusterError(
                f"nodes of host {self.host}: count must be 1, got {self.count}; entries of one host make one node"
            )


def check(entries: Sequence[Nodes], name: str) -> None:
    """Refuse entries that contradict each other.

    Args:
        entries: of a cluster.
        name: the cluster's.

    Raises:
        ClusterError: there is none; those of a host are not consecutive, or state different cores.
    """
    if not entries:
        raise ClusterError(f"cluster {name} has no nodes; list at least one [[nodes]]")
    hosts = [(host, {nodes.cores for nodes in run}) for host, run in groupby(entries, lambda nodes: nodes.host) if host]
    for i, (host, cores) in enumerate(hosts):
        if host in [other for other, _ in hosts[:i]]:
            raise ClusterError(f"cluster {name}: list the [[nodes]] of host {host} one after the other")
        if len(cores) > 1:
            raise ClusterError(f"cluster {name}: the [[nodes]] of host {host} share its cores, state the same number")


def node_starts(entries: Sequence[Nodes]) -> tuple[int, ...]:
    """Number of the first device of every node."""
    starts: list[int] = []
    first, host = 0, None
    for nodes in entries:
        end = first + nodes.count * nodes.devices
        if nodes.host is None or nodes.host != host:
            starts += range(first, end, nodes.devices)
        first, host = end, nodes.host
    return tuple(starts)
