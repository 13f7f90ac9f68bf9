"""Parts of a cluster: its nodes one by one, some of its devices, less of their memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import NamedTuple

from weft.cluster.nodes import Nodes
from weft.cluster.topology import LIMITED_SHARE, Cluster, Device
from weft.errors import ClusterError
from weft.quantity import each_of


class Node(NamedTuple):
    """One node: its devices in the order of their numbers, and the cores they share, as in Nodes."""

    devices: tuple[Device, ...]
    cores: float | None


def nodes(cluster: Cluster) -> list[Node]:
    """Every node of a cluster."""
    devices = [nodes.device for nodes in cluster.nodes for _ in range(nodes.count * nodes.devices)]
    bounds = pairwise((*cluster.node_starts, cluster.devices))
    return [Node(tuple(devices[start:end]), cluster.nodes_of(start).cores) for start, end in bounds]


def entries(nodes: Iterable[Node]) -> tuple[Nodes, ...]:
    """The entries of a cluster of these nodes: one for those in a row that are equal, and for a node of several kinds
    one for each run of equal devices."""
    found: list[Nodes] = []
    first = 0
    for node, equal in groupby(nodes):
        count = len(list(equal))
        runs = [(device, len(list(run))) for device, run in groupby(node.devices)]
        if len(runs) == 1:
            found.append(Nodes(count=count, devices=runs[0][1], device=runs[0][0], cores=node.cores))
        else:
            found += [
                Nodes(count=1, devices=length, device=device, cores=node.cores, host=f"node {number}")
                for number in range(first, first + count)
                for device, length in runs
            ]
        first += count
    return tuple(found)


def limited(cluster: Cluster, memory_bytes: Sequence[int]) -> Cluster:
    """The cluster with its devices limited to this much memory.

    Args:
        cluster: to take it from.
        memory_bytes: of every device alike, or one number for each device; none leaves the cluster as it is.

    Raises:
        ClusterError: another number of numbers.
    """
    if not memory_bytes:
        return cluster
    sizes = iter(each_of(memory_bytes, cluster.devices))

    def limit(device: Device, size: int | None) -> Device:
        assert size is not None
        share = device.allocator_share if device.accelerator else LIMITED_SHARE
        return replace(device, memory_bytes=size, allocator_share=share)

    if len(set(memory_bytes)) == 1:
        same = (replace(nodes, device=limit(nodes.device, memory_bytes[0])) for nodes in cluster.nodes)
        return replace(cluster, nodes=tuple(same))
    each = [node._replace(devices=tuple(limit(d, next(sizes)) for d in node.devices)) for node in nodes(cluster)]
    return replace(cluster, nodes=entries(each))


def first(cluster: Cluster, devices: int) -> Cluster:
    """The first ``devices`` devices of a cluster.

    Raises:
        ClusterError: more devices than there are, or a part of the nodes that is not whole nodes.
    """
    ends = [*cluster.node_starts[1:], cluster.devices]
    if devices != cluster.devices and not 1 <= devices <= ends[0] and devices not in ends:
        sizes = dict.fromkeys(end - start for start, end in pairwise((0, *ends)))
        raise ClusterError(
            f"cannot take {devices} of the {cluster.devices} devices of {cluster.name} in whole nodes of "
            f"{' and '.join(map(str, sizes))}"
        )
    if devices == cluster.devices:
        return cluster
    kept = [node for node, end in zip(nodes(cluster), ends, strict=True) if end <= devices]
    kept = kept or [nodes(cluster)[0]._replace(devices=nodes(cluster)[0].devices[:devices])]
    links = tuple(link for link in cluster.links if link.among is None or link.among[0] < devices - 1)
    return replace(cluster, nodes=entries(kept), links=links if devices > 1 else ())
