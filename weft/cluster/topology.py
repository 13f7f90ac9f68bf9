"""Cluster: what there is to compute on. Devices with sustained rates, links in a hierarchy; plain numbers, no torch.

A device's rates are those of one device computing alone. Where devices share processor cores (CPU processes),
``Nodes.cores`` says how many of them a node can drive at full speed at once, and ``A`` devices that compute together
each run at ``min(1, cores / A)``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from weft.cluster.curve import Curve
from weft.errors import ClusterError

CALIBRATIONS = ("measured here", "preset", "datasheet")
FLOP_KINDS = ("matmul", "attention", "convolution")
"""Kinds of operation whose rate is in flop/s over flops; the other kinds' is in bytes/s over bytes."""
BYTE_KINDS = (
    "pointwise", "transcendental", "reduction", "normalization", "softmax", "gather", "random", "copy",
)  # fmt: skip
LIMITED_SHARE = 0.02
"""What the allocator of a CPU process keeps besides what is asked of it where its memory is limited: it is then told to
give freed memory back (runtime/memory.py)."""

UNLIMITED_SHARE = 0.3
"""The same where it is not limited: freed tensors stay in one heap, with holes."""

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of device, computing alone.

    Attributes:
        memory_bytes: what a plan may use of it.
        matmul: flop/s over flops, by dtype.
        rates: by kind of operation: flop/s over flops for FLOP_KINDS, bytes/s over bytes for BYTE_KINDS. A kind that is
            not listed runs at the rate of ``matmul`` or ``pointwise``.
        overhead_s: seconds every operation takes at least, whatever its size.
        accelerator: the process that drives it runs ahead of it; False where the device is the process itself.
        reserved_bytes: taken besides tensors: libraries' scratch memory, and the process's own objects.
        allocator_share: memory that the allocator keeps besides what is asked of it, as a share of that.
        price_per_hour: of one device; 0 where unknown.
    """

    name: str
    memory_bytes: int
    matmul: Mapping[str, Curve]
    rates: Mapping[str, Curve]
    overhead_s: float
    accelerator: bool
    reserved_bytes: int
    allocator_share: float
    price_per_hour: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.memory_bytes, int) or self.memory_bytes < 1:
            raise ClusterError(
                f"device {self.name}: memory_bytes must be a whole number of at least 1, got {self.memory_bytes!r}"
            )
        if "float32" not in self.matmul:
            raise ClusterError(
                f"device {self.name}: matmul needs a curve for float32, got {', '.join(self.matmul) or 'none'}"
            )
        if "pointwise" not in self.rates:
            raise ClusterError(
                f"device {self.name}: rates needs a curve for pointwise, got {', '.join(self.rates) or 'none'}"
            )
        if unknown := sorted(set(self.rates) - {*FLOP_KINDS, *BYTE_KINDS}):
            known = ", ".join((*FLOP_KINDS, *BYTE_KINDS))
            raise ClusterError(f"device {self.name}: rate of unknown kind {unknown[0]!r}; known kinds are {known}")
        for name in ("overhead_s", "reserved_bytes", "allocator_share", "price_per_hour"):
            if not getattr(self, name) >= 0:
                raise ClusterError(f"device {self.name}: {name} must not be negative, got {getattr(self, name)!r}")

    def seconds(self, kind: str, flops: float, bytes: float, dtype: str = "float32") -> float:
        """Seconds of one operation: the slower of its arithmetic and its memory traffic, and the overhead."""
        if kind in FLOP_KINDS:
            single = self.matmul["float32"]
            matmul = self.matmul.get(dtype, single)
            rate = matmul.at(flops)
            if kind in self.rates:  # stated for float32: another dtype is as much faster as it is for products
                rate *= self.rates[kind].at(flops) / single.at(flops)
            arithmetic = flops / rate
            return max(arithmetic, bytes / self.rates["pointwise"].at(bytes)) + self.overhead_s
        return bytes / self.rates.get(kind, self.rates["pointwise"]).at(bytes) + self.overhead_s


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
        latency_s: of one message.
        bytes_per_s: per device and direction, while all devices send.
        collectives: as measured at this level; where there are none they are computed by the ring algorithm.
        alone_bytes_per_s: of a device whose neighbours send nothing, where they share what carries the messages (a
            node's one network card); None: a device has the same whatever others do.
    """

    name: str
    devices: int
    latency_s: float
    bytes_per_s: float
    collectives: tuple[Collective, ...] = ()
    alone_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        if self.devices < 2 or not self.latency_s >= 0 or not self.bytes_per_s > 0:
            raise ClusterError(
                f"link {self.name}: needs devices >= 2, latency_s >= 0 and bytes_per_s > 0, "
                f"got {self.devices}, {self.latency_s} and {self.bytes_per_s}"
            )
        if self.alone_bytes_per_s is not None and not self.alone_bytes_per_s > 0:
            raise ClusterError(f"link {self.name}: alone_bytes_per_s must be positive, got {self.alone_bytes_per_s}")

    def shared_by(self, senders: int, of: int) -> Link:
        """The link as one of ``senders`` devices sees it that send at once, ``of`` so many that share it."""
        if self.alone_bytes_per_s is None:
            return self
        rate = min(self.alone_bytes_per_s, self.bytes_per_s * of / senders)
        return replace(self, bytes_per_s=max(rate, self.bytes_per_s))

    def measured(self, kind: str, stride: int) -> tuple[Collective, ...]:
        """Collectives of a kind as measured on groups of ranks that are so far apart; none were: on any groups."""
        known = tuple(c for c in self.collectives if c.kind == kind)
        return tuple(c for c in known if c.stride == stride) or known


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """Nodes of one kind.

    Attributes:
        count: how many nodes.
        devices: devices of each.
        device: their kind.
        cores: how many devices of a node compute at full speed at once; None: all of them. It need not be whole: two
            threads of one core are worth about 1.3.
    """

    count: int
    devices: int
    device: Device
    cores: float | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or self.devices < 1:
            raise ClusterError(f"nodes need a count and devices of at least 1, got {self.count} x {self.devices}")
        if self.cores is not None and not self.cores > 0:
            raise ClusterError(f"cores must be positive, got {self.cores}")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices and links.

    Attributes:
        nodes: one entry per kind of node. One kind for now: devices that differ are an error.
        links: innermost first; the last connects every device. Empty for a single device.
        calibration: where the numbers come from, one of CALIBRATIONS.

    Raises:
        ClusterError: links that do not reach every device, nodes of several kinds.
    """

    name: str
    nodes: tuple[Nodes, ...]
    links: tuple[Link, ...] = field(default=())
    calibration: str

    def __post_init__(self) -> None:
        if len(self.nodes) != 1:
            raise ClusterError(
                f"cluster {self.name}: {len(self.nodes)} kinds of nodes; weft plans for one kind, list one [[nodes]]"
            )
        if self.calibration not in CALIBRATIONS:
            raise ClusterError(
                f"cluster {self.name}: calibration {self.calibration!r} is not one of {', '.join(CALIBRATIONS)}"
            )
        spans = [link.devices for link in self.links]
        if spans != sorted(set(spans)):
            raise ClusterError(
                f"cluster {self.name}: links must connect more devices from one to the next, got {spans}"
            )
        if self.devices > 1 and (not spans or spans[-1] < self.devices):
            raise ClusterError(
                f"cluster {self.name}: the last link connects {spans[-1] if spans else 0} devices of "
                f"{self.devices}; add a link with devices = {self.devices}"
            )

    @classmethod
    def local(cls, devices: int | None = None, memory: str | int | None = None) -> Cluster:
        """This machine, not yet measured: its accelerators, or CPU processes. See ``cluster.local``."""
        from weft.cluster.local import local  # asks torch what there is; the rest of this file needs no torch

        return local(devices, memory)

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Read a cluster file. See ``cluster.file``."""
        from weft.cluster.file import load

        return load(path)

    def save(self, path: str | Path) -> None:
        """Write a cluster file that ``load`` reads back equal."""
        from weft.cluster.file import save

        save(self, path)

    @classmethod
    def preset(cls, name: str, *, nodes: int = 1, devices_per_node: int | None = None) -> Cluster:
        """A cluster of a kind of accelerator, by its data sheet. See ``cluster.presets``."""
        from weft.cluster.presets import preset

        return preset(name, nodes=nodes, devices_per_node=devices_per_node)

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """What ``--cluster`` takes: a file, or a preset: ``h100-sxm``, ``h100-sxm:8`` (one node), ``h100-sxm:2x8``.

        Raises:
            ClusterError: none of these.
        """
        from weft.cluster.presets import names

        match = re.fullmatch(r"([\w-]+)(?::(?:(\d+)x)?(\d+))?", text)
        if match is not None and match[1] in names() and not Path(text).is_file():
            return cls.preset(match[1], nodes=int(match[2] or 1), devices_per_node=int(match[3]) if match[3] else None)
        if Path(text).is_file():
            return cls.load(text)
        raise ClusterError(
            f"{text!r} is neither a cluster file nor a preset; give a file that `weft cluster` saved, or "
            f"PRESET:NODESxDEVICES with PRESET one of {', '.join(names())}"
        )

    @property
    def devices(self) -> int:
        """Number of devices."""
        return sum(nodes.count * nodes.devices for nodes in self.nodes)

    @property
    def devices_per_node(self) -> int:
        """Devices of one node."""
        return self.nodes[0].devices

    @property
    def device(self) -> Device:
        """The kind of the devices."""
        return self.nodes[0].device

    @property
    def cores(self) -> float | None:
        """How many devices of a node compute at full speed at once; None: all of them."""
        return self.nodes[0].cores

    @property
    def memory_bytes(self) -> int:
        """Memory of one device."""
        return self.device.memory_bytes

    def link(self, ranks: int, stride: int = 1) -> Link:
        """The innermost link that connects every group of ``ranks`` ranks, ``stride`` apart, of a mesh dimension."""
        span = ranks * stride
        return next((link for link in self.links if link.devices % span == 0), self.links[-1])

    def link_between(self, one: int, other: int, senders: int | None = None) -> Link:
        """The innermost link that connects two devices, by number, as seen while ``senders`` devices of a node send
        over it at once; None: all of them."""
        link = next((link for link in self.links if one // link.devices == other // link.devices), self.links[-1])
        return link if senders is None else link.shared_by(min(senders, self.devices_per_node), self.devices_per_node)

    def with_memory(self, memory_bytes: int) -> Cluster:
        """The same cluster, its devices limited to this much memory."""
        nodes = self.nodes[0]
        share = nodes.device.allocator_share if nodes.device.accelerator else LIMITED_SHARE
        device = replace(nodes.device, memory_bytes=memory_bytes, allocator_share=share)
        return replace(self, nodes=(replace(nodes, device=device),))

    def with_devices(self, devices: int) -> Cluster:
        """The first ``devices`` devices of this cluster.

        Raises:
            ClusterError: more devices than there are, or a part of the nodes that is not whole nodes.
        """
        nodes = self.nodes[0]
        if not 1 <= devices <= self.devices or (devices > nodes.devices and devices % nodes.devices):
            raise ClusterError(
                f"cannot take {devices} of the {self.devices} devices of {self.name} in whole nodes of {nodes.devices}"
            )
        part = replace(nodes, count=max(1, devices // nodes.devices), devices=min(devices, nodes.devices))
        return replace(self, nodes=(part,), links=self.links if devices > 1 else ())
