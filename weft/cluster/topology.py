"""Cluster: what there is to compute on. Devices with sustained rates, links in a hierarchy; plain numbers, no torch.

Devices are numbered consecutively over the entries of ``Cluster.nodes``, of which there is one for each kind.

A device's rates are those of one device computing alone. Where devices share processor cores (CPU processes),
``Nodes.cores`` says how many of them a node can drive at full speed at once, and ``A`` devices that compute together
each run at ``min(1, cores / A)``; one that has only a part of a core to itself (``Device.core_share``) counts as that.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

from weft.cluster.curve import Curve
from weft.cluster.links import Link
from weft.cluster.nodes import Nodes, check, node_starts
from weft.errors import ClusterError
from weft.quantity import Sizes

CALIBRATIONS = ("measured here", "preset", "datasheet")
FITTED = "preset fitted on "
"""Beginning of a calibration that goes on with its source."""

FLOP_KINDS = ("matmul", "attention", "convolution")
"""Kinds of operation whose rate is in flop/s over flops, a convolution's over its flops for each byte, were it float32;
the other kinds' is in bytes/s over bytes."""
BYTE_KINDS = (
    "pointwise", "transcendental", "reduction", "normalization", "batch_norm", "softmax", "gather", "random", "copy",
)  # fmt: skip
LIKE = {"batch_norm": "normalization"}
"""The kind whose rate is taken for one that has none; for all others it is ``matmul``'s or ``pointwise``'s."""
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

LIMITED_SHARE = 0.02
"""What the allocator of a CPU process keeps besides what is asked of it where its memory is limited: it is then told to
give freed memory back (runtime/memory.py)."""

UNLIMITED_SHARE = 0.3
"""The same where it is not limited: freed tensors stay in one heap, with holes."""


MOST_DEVICES = 2**20
"""Of a cluster: ten times the largest there is; beyond, lists of them would fill the planner's memory."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of device, computing alone.

    Attributes:
        memory_bytes: what a plan may use of it.
        matmul: flop/s over flops, by dtype.
        rates: by kind of operation: flop/s over flops for FLOP_KINDS, bytes/s over bytes for BYTE_KINDS. A kind that is
            not listed runs at the rate of one that is LIKE it, or of ``matmul`` or ``pointwise``.
        overhead_s: seconds every operation takes at least, whatever its size.
        accelerator: the process that drives it runs ahead of it; False where the device is the process itself.
        reserved_bytes: taken besides tensors: libraries' scratch memory, and the process's own objects.
        allocator_share: memory that the allocator keeps besides what is asked of it, as a share of that.
        price_per_hour: of one device; 0 where unknown.
        core_share: of a core that it takes while it computes alone: 1, or less where a quota holds it back.
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
    core_share: float = 1.0

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
        if not 0 < self.core_share <= 1:
            raise ClusterError(f"device {self.name}: core_share must be above 0 and at most 1, got {self.core_share!r}")

    def seconds(self, kind: str, flops: float, bytes: float, dtype: str = "float32") -> float:
        """Seconds of one operation: the slower of its arithmetic and its memory traffic, and the overhead."""
        if kind in FLOP_KINDS:
            single = self.matmul["float32"]
            matmul = self.matmul.get(dtype, single)
            rate = matmul.at(flops)
            if kind in self.rates:  # stated for float32: another dtype is as much faster as it is for products
                size = flops
                if kind == "convolution":  # how far it is from being bound by memory says more than its size
                    size /= max(bytes * ITEM_BYTES["float32"] / ITEM_BYTES.get(dtype, 4), 1.0)
                rate *= self.rates[kind].at(size) / single.at(flops)
            arithmetic = flops / rate
            return max(arithmetic, bytes / self.rates["pointwise"].at(bytes)) + self.overhead_s
        curve = self.rates.get(kind) or self.rates.get(LIKE.get(kind, "pointwise"), self.rates["pointwise"])
        return bytes / curve.at(bytes) + self.overhead_s


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices and links.

    Attributes:
        nodes: one entry per kind of node, in the order of the devices' numbers.
        links: innermost first; the last connects every device. Empty for a single device.
        calibration: where the numbers come from: one of CALIBRATIONS, or FITTED and a source.

    Raises:
        ClusterError: links that do not reach every device, parts of a node that contradict each other.
    """

    name: str
    nodes: tuple[Nodes, ...]
    links: tuple[Link, ...] = field(default=())
    calibration: str

    def __post_init__(self) -> None:
        check(self.nodes, self.name)
        if self.devices > MOST_DEVICES:
            raise ClusterError(f"cluster {self.name}: {self.devices} devices are more than {MOST_DEVICES}; list fewer")
        if self.calibration not in CALIBRATIONS and not self.calibration.startswith(FITTED):
            raise ClusterError(
                f"cluster {self.name}: calibration {self.calibration!r} is not one of {', '.join(CALIBRATIONS)}"
            )
        spans = [link.devices for link in self.links]
        if spans != sorted(spans) or len({(link.devices, link.among) for link in self.links}) < len(spans):
            raise ClusterError(
                f"cluster {self.name}: links must connect more devices from one to the next, got {spans}"
            )
        if self.devices > 1 and (not spans or spans[-1] < self.devices or self.links[-1].among is not None):
            raise ClusterError(
                f"cluster {self.name}: the last link connects {spans[-1] if spans else 0} devices of "
                f"{self.devices}; add a link with devices = {self.devices}"
            )

    @classmethod
    def local(cls, devices: int | None = None, memory: Sizes = None) -> Cluster:
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
        """What ``--cluster`` takes. See ``cluster.presets``."""
        from weft.cluster.presets import parse

        return parse(text)

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self._starts[-1]

    @cached_property
    def node_starts(self) -> tuple[int, ...]:
        """Number of the first device of every node."""
        return node_starts(self.nodes)

    @cached_property
    def devices_per_node(self) -> int:
        """Devices of one node; of nodes that differ, the largest number that divides every node's."""
        return math.gcd(*(end - start for start, end in pairwise((*self.node_starts, self.devices))))

    @property
    def kinds(self) -> list[Device]:
        """Every kind of device, in the order of the first of each."""
        devices = [nodes.device for nodes in self.nodes]
        return [device for i, device in enumerate(devices) if device not in devices[:i]]

    @property
    def device(self) -> Device:
        """The kind of the devices; of several, the slowest at large matrix products."""
        return min((nodes.device for nodes in self.nodes), key=lambda device: device.matmul["float32"].rates[-1])

    @property
    def cores(self) -> float | None:
        """How many devices of a node compute at full speed at once; None: all. Of nodes that differ, the least."""
        return min((nodes.cores for nodes in self.nodes if nodes.cores is not None), default=None)

    @property
    def memory_bytes(self) -> int:
        """Memory of one device; of several kinds, the least."""
        return min(nodes.device.memory_bytes for nodes in self.nodes)

    def nodes_of(self, device: int) -> Nodes:
        """The entry of a device, by number.

        Raises:
            ClusterError: there is no such device.
        """
        if not 0 <= device < self.devices:
            raise ClusterError(f"cluster {self.name} has devices 0 to {self.devices - 1}, there is no device {device}")
        return self.nodes[bisect_right(self._starts, device) - 1]

    def device_of(self, device: int) -> Device:
        """The kind of a device, by number. Raises as ``nodes_of``."""
        return self.nodes_of(device).device

    def node_of(self, device: int) -> int:
        """The number of the node that a device is on: devices with the same share its cores."""
        return bisect_right(self.node_starts, device) - 1

    def link(self, ranks: int, stride: int = 1) -> Link:
        """The innermost link that connects every group of ``ranks`` ranks, ``stride`` apart, of a mesh dimension; the
        slowest, where one connects some of them and another others."""
        span = ranks * stride
        if all(link.among is None for link in self.links):
            return next((link for link in self.links if link.devices % span == 0), self.links[-1])
        if span not in self._spanning:
            ends = ((start, start + span - 1) for start in range(0, self.devices - span + 1, span))
            links = (self.link_between(*pair) for pair in ends)
            self._spanning[span] = min(links, key=lambda link: (link.bytes_per_s, -link.latency_s))
        return self._spanning[span]

    @cached_property
    def levels(self) -> tuple[Link, ...]:
        """The links as one hierarchy for all devices: where some have another link than others, the slowest of them."""
        if all(link.among is None for link in self.links):
            return self.links
        spans = sorted({min(link.devices, self.devices) for link in self.links})  # a part of a cluster has fewer
        found = [(span, self.link(span)) for span in spans]
        outer = [*found[1:], None]
        return tuple(
            replace(link, devices=span, among=None)
            for (span, link), above in zip(found, outer, strict=True)
            if above is None or above[1] is not link
        )

    def link_between(self, one: int, other: int, senders: int | None = None) -> Link:
        """The innermost link that connects two devices, by number, as seen while ``senders`` devices of a node send
        over it at once; None: all of them."""
        link = next((link for link in self.links if link.connects(one, other)), self.links[-1])
        return link if senders is None else link.shared_by(min(senders, self.devices_per_node), self.devices_per_node)

    def with_memory(self, *memory_bytes: int) -> Cluster:
        """The same cluster, its devices limited to this much memory: one number for all, or one for each. See
        ``cluster.parts``."""
        from weft.cluster.parts import limited

        return limited(self, memory_bytes)

    def with_devices(self, devices: int) -> Cluster:
        """The first ``devices`` devices of this cluster. See ``cluster.parts``."""
        from weft.cluster.parts import first

        return first(self, devices)

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """Number of the first device of every entry, and that of devices."""
        return tuple(accumulate((nodes.count * nodes.devices for nodes in self.nodes), initial=0))

    @cached_property
    def _spanning(self) -> dict[int, Link]:
        return {}
