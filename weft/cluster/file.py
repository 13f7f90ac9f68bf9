"""Clusters as TOML: what ``weft cluster`` saves and ``--cluster`` reads. Unknown and missing keys are errors.

::

    name = "two cores"
    calibration = "measured here"

    [[nodes]]                        # one for each kind; devices are numbered over them
    count = 1
    devices = 4
    cores = 2.0                      # left out where every device computes at full speed
    host = "a"                       # left out but where a node has several kinds: the same name for each

    [nodes.device]
    name = "CPU process"
    memory = "2GiB"
    overhead_s = 4e-06
    accelerator = false
    reserved = "24MiB"
    allocator_share = 0.02
    price_per_hour = 0.0
    core_share = 0.5                 # left out where it has a core, or what it needs of one, to itself

    [nodes.device.matmul.float32]    # flop/s over flops
    sizes = [...]
    rates = [...]

    [nodes.device.rates.pointwise]   # bytes/s over bytes; a convolution's: flop/s over flops for each byte
    ...

    [[links]]                        # innermost first
    name = "loopback"
    devices = 4
    among = [0, 8]                   # left out where the level is about all devices
    latency_s = 5e-05
    busy_s = 2e-05                   # left out where messages cost their ends nothing
    bytes_per_s = 2e9
    alone_bytes_per_s = 4e9          # left out where devices share nothing that carries messages

    [[links.collectives]]            # may be left out
    kind = "all_reduce"
    ranks = 4
    stride = 1                       # may be left out
    sizes = [...]
    rates = [...]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from weft.cluster.curve import Curve
from weft.cluster.links import Collective, Link
from weft.cluster.nodes import Nodes
from weft.cluster.topology import Cluster, Device
from weft.errors import ClusterError
from weft.plain import LARGEST, UnreadableError, read_toml, shown
from weft.quantity import parse_size


def load(path: str | Path) -> Cluster:
    """Read a cluster file.

    Raises:
        ClusterError: missing, not TOML, unknown or missing keys, values that cannot be.
    """
    try:
        data = read_toml(Path(path))
    except UnreadableError as error:
        raise ClusterError(f"{path}: {error}") from error
    return read_cluster(Table(data, str(path)))


def save(cluster: Cluster, path: str | Path) -> None:
    """Write a cluster file that ``load`` reads back equal."""
    Path(path).write_bytes(tomli_w.dumps(write_cluster(cluster)).encode())


@dataclass(frozen=True)
class Table:
    """A TOML table being read: every key is asked for once by kind, ``close`` refuses what nobody asked for."""

    data: Mapping[str, Any]
    where: str

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._value(key, default)
        if not _is_number(value):
            raise ClusterError(f"{self.where}: {key} must be a finite number, got {shown(value)}")
        return float(value)

    def whole(self, key: str) -> int:
        """A whole number."""
        value = self._value(key, None)
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > LARGEST:
            raise ClusterError(f"{self.where}: {key} must be a whole number of at most 64 bits, got {shown(value)}")
        return value

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self._value(key, None)
        if not isinstance(value, bool):
            raise ClusterError(f"{self.where}: {key} must be true or false, got {shown(value)}")
        return value

    def size(self, key: str) -> int:
        """A size: text with a unit, or bytes."""
        value = self._value(key, None)
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ClusterError(f'{self.where}: {key} must be a size such as "2GiB", got {shown(value)}')
        try:
            return parse_size(value)
        except ClusterError as error:
            raise ClusterError(f"{self.where}: {key}: {error}") from error

    def text(self, key: str) -> str:
        """A string."""
        value = self._value(key, None)
        if not isinstance(value, str):
            raise ClusterError(f"{self.where}: {key} must be text, got {shown(value)}")
        return value

    def table(self, key: str) -> Table:
        """A table inside this one."""
        value = self._value(key, None)
        if not isinstance(value, dict):
            raise ClusterError(f"{self.where}: {key} must be a table, got {shown(value)}")
        return Table(value, f"{self.where}: {key}")

    def tables(self, key: str, *, optional: bool = False) -> list[Table]:
        """An array of tables."""
        value = self._value(key, [] if optional else None)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise ClusterError(f"{self.where}: {key} must be an array of tables, got {shown(value)}")
        return [Table(item, f"{self.where}: {key}[{i}]") for i, item in enumerate(value)]

    def numbers(self, key: str) -> tuple[float, ...]:
        """An array of numbers."""
        value = self._value(key, None)
        if not isinstance(value, list) or not all(map(_is_number, value)):
            raise ClusterError(f"{self.where}: {key} must be an array of finite numbers, got {shown(value)}")
        return tuple(map(float, value))

    def close(self, *known: str) -> None:
        """Refuse keys other than these."""
        if unknown := sorted(set(self.data) - set(known)):
            raise ClusterError(f"{self.where}: unknown key {shown(unknown[0])}; known keys are {', '.join(known)}")

    def _value(self, key: str, default: Any) -> Any:
        if key not in self.data and default is None:
            raise ClusterError(f"{self.where}: key {key!r} is missing")
        return self.data.get(key, default)


def _is_number(value: Any) -> bool:
    """Whether a value is a number, and one that can be computed with."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= LARGEST if isinstance(value, int) else math.isfinite(value)


def read_cluster(table: Table) -> Cluster:
    """A cluster of a table."""
    table.close("name", "calibration", "nodes", "links")
    return Cluster(
        name=table.text("name"),
        calibration=table.text("calibration"),
        nodes=tuple(map(_read_nodes, table.tables("nodes"))),
        links=tuple(map(_read_link, table.tables("links", optional=True))),
    )


def _read_nodes(table: Table) -> Nodes:
    table.close("count", "devices", "cores", "host", "device")
    return Nodes(
        count=table.whole("count"),
        devices=table.whole("devices"),
        cores=table.number("cores") if "cores" in table.data else None,
        host=table.text("host") if "host" in table.data else None,
        device=_read_device(table.table("device")),
    )


def _read_device(table: Table) -> Device:
    table.close(
        "name",
        "memory",
        "overhead_s",
        "accelerator",
        "reserved",
        "allocator_share",
        "price_per_hour",
        "core_share",
        "matmul",
        "rates",
    )
    return Device(
        name=table.text("name"),
        memory_bytes=table.size("memory"),
        overhead_s=table.number("overhead_s"),
        accelerator=table.flag("accelerator"),
        reserved_bytes=table.size("reserved"),
        allocator_share=table.number("allocator_share"),
        price_per_hour=table.number("price_per_hour", 0.0),
        core_share=table.number("core_share", 1.0),
        matmul=_read_curves(table.table("matmul")),
        rates=_read_curves(table.table("rates")),
    )


def _read_curves(table: Table) -> dict[str, Curve]:
    curves = {}
    for name in table.data:
        inner = table.table(name)
        inner.close("sizes", "rates")
        curves[name] = Curve(inner.numbers("sizes"), inner.numbers("rates"))
    return curves


def _read_link(table: Table) -> Link:
    table.close("name", "devices", "among", "latency_s", "busy_s", "bytes_per_s", "alone_bytes_per_s", "collectives")
    among = table.numbers("among") if "among" in table.data else None
    if among is not None and (len(among) != 2 or not all(number.is_integer() for number in among)):
        raise ClusterError(f"{table.where}: among must be two device numbers, first and end, got {shown(list(among))}")
    return Link(
        name=table.text("name"),
        devices=table.whole("devices"),
        among=None if among is None else (int(among[0]), int(among[1])),
        latency_s=table.number("latency_s"),
        busy_s=table.number("busy_s") if "busy_s" in table.data else 0.0,
        bytes_per_s=table.number("bytes_per_s"),
        alone_bytes_per_s=table.number("alone_bytes_per_s") if "alone_bytes_per_s" in table.data else None,
        collectives=tuple(map(_read_collective, table.tables("collectives", optional=True))),
    )


def _read_collective(table: Table) -> Collective:
    table.close("kind", "ranks", "stride", "sizes", "rates")
    rates = Curve(table.numbers("sizes"), table.numbers("rates"))
    stride = table.whole("stride") if "stride" in table.data else 1
    return Collective(kind=table.text("kind"), ranks=table.whole("ranks"), stride=stride, rates=rates)


def write_cluster(cluster: Cluster) -> dict[str, Any]:
    """The table that ``read_cluster`` reads."""
    return {
        "name": cluster.name,
        "calibration": cluster.calibration,
        "nodes": [
            {
                "count": nodes.count,
                "devices": nodes.devices,
                **({} if nodes.cores is None else {"cores": nodes.cores}),
                **({} if nodes.host is None else {"host": nodes.host}),
                "device": {
                    "name": nodes.device.name,
                    "memory": nodes.device.memory_bytes,
                    "overhead_s": nodes.device.overhead_s,
                    "accelerator": nodes.device.accelerator,
                    "reserved": nodes.device.reserved_bytes,
                    "allocator_share": nodes.device.allocator_share,
                    "price_per_hour": nodes.device.price_per_hour,
                    **({} if nodes.device.core_share == 1 else {"core_share": nodes.device.core_share}),
                    "matmul": {name: _write_curve(curve) for name, curve in nodes.device.matmul.items()},
                    "rates": {name: _write_curve(curve) for name, curve in nodes.device.rates.items()},
                },
            }
            for nodes in cluster.nodes
        ],
        "links": [
            {
                "name": link.name,
                "devices": link.devices,
                **({} if link.among is None else {"among": list(link.among)}),
                "latency_s": link.latency_s,
                **({"busy_s": link.busy_s} if link.busy_s else {}),
                "bytes_per_s": link.bytes_per_s,
                **({} if link.alone_bytes_per_s is None else {"alone_bytes_per_s": link.alone_bytes_per_s}),
                "collectives": [
                    {"kind": c.kind, "ranks": c.ranks, "stride": c.stride, **_write_curve(c.rates)}
                    for c in link.collectives
                ],
            }
            for link in cluster.links
        ],
    }


def _write_curve(curve: Curve) -> dict[str, list[float]]:
    return {"sizes": list(curve.sizes), "rates": list(curve.rates)}
