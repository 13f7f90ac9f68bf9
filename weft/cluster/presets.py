"""Clusters from data sheets, and this machine before it is measured."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from weft.cluster.curve import Curve
from weft.cluster.file import Table
from weft.cluster.links import Link
from weft.cluster.nodes import Nodes
from weft.cluster.topology import LIMITED_SHARE, UNLIMITED_SHARE, Cluster, Device
from weft.errors import ClusterError
from weft.quantity import parse_size

UNKNOWN = "l40s"
"""Stands in for accelerators that have no preset, until they are measured: a present one without fast links."""


def parse(text: str) -> Cluster:
    """What ``--cluster`` takes: a file; a preset: ``h100-sxm``, ``h100-sxm:8`` (one node), ``h100-sxm:2x8``; or a mix
    of presets: ``a100-80:2x8+h100-sxm:1x8``.

    Raises:
        ClusterError: none of these.
    """
    if Path(text).is_file():
        return Cluster.load(text)
    parts = [re.fullmatch(r"([\w-]+)(?::(?:(\d+)x)?(\d+))?", part) for part in text.split("+")]
    kinds = [
        preset(part[1], nodes=int(part[2] or 1), devices_per_node=int(part[3]) if part[3] else None)
        for part in parts
        if part is not None and part[1] in names()
    ]
    if len(kinds) == len(parts):
        return kinds[0] if len(kinds) == 1 else mix(kinds)
    raise ClusterError(
        f"{text!r} is neither a cluster file nor a preset; give a file that `weft cluster` saved, or "
        f"PRESET:NODESxDEVICES with PRESET one of {', '.join(names())}, or several of these with + between them"
    )


def mix(parts: Sequence[Cluster]) -> Cluster:
    """One cluster of several presets: their devices in this order, the links inside each as they are, and the slowest
    of their networks between them."""
    devices = sum(part.devices for part in parts)
    table = _table().table("preset")
    links, start = [], 0
    for part in parts:
        links += [replace(link, among=(start, start + part.devices)) for link in part.links]
        start += part.devices
    entries = [table.table(part.device.name) for part in parts]
    networks = [_link(entry.table("network"), devices, _fitted(entry).number("link")) for entry in entries]
    return Cluster(
        name="+".join(part.name for part in parts),
        nodes=tuple(nodes for part in parts for nodes in part.nodes),
        links=(*sorted(links, key=lambda link: link.devices), min(networks, key=lambda link: link.bytes_per_s)),
        calibration=next((p.calibration for p in parts if p.calibration == "datasheet"), parts[0].calibration),
    )


def names() -> list[str]:
    """Every preset."""
    return list(_table().table("preset").data)


def preset(name: str, *, nodes: int = 1, devices_per_node: int | None = None) -> Cluster:
    """A cluster of a kind of accelerator, by its data sheet.

    Args:
        name: one of ``names()``.
        nodes: how many nodes.
        devices_per_node: None: as many as the usual node of this kind has.

    Raises:
        ClusterError: no such preset, or no devices.
    """
    if name not in names():
        raise ClusterError(f"there is no preset {name!r}; choose from {', '.join(names())}, or give a cluster file")
    entry = _table().table("preset").table(name)
    per_node = entry.whole("devices_per_node") if devices_per_node is None else devices_per_node
    if nodes < 1 or per_node < 1:
        raise ClusterError(f"{name} needs at least one node of one device, got {nodes} x {per_node}")
    shares = _fitted(entry)
    memory = _curve(shares.table("memory")).scaled(entry.number("memory_bytes_per_s"))
    peak = entry.table("peak")
    matmul = _curve(shares.table("matmul"))
    device = Device(
        name=name,
        memory_bytes=parse_size(entry.text("memory")),
        matmul={dtype: matmul.scaled(peak.number(dtype)) for dtype in peak.data},
        rates={"pointwise": memory, "attention": _curve(shares.table("attention")).scaled(peak.number("float32"))},
        overhead_s=entry.number("overhead_s"),
        accelerator=True,
        reserved_bytes=accelerator_memory()[0],
        allocator_share=accelerator_memory()[1],
    )
    share = shares.number("link")
    links = []
    if per_node > 1:
        links.append(_link(entry.table("node_link"), per_node, share))
    if nodes > 1:
        links.append(_link(entry.table("network"), nodes * per_node, share))
    return Cluster(
        name=f"{name}:{nodes}x{per_node}",
        nodes=(Nodes(count=nodes, devices=per_node, device=device),),
        links=tuple(links),
        calibration=f"preset fitted on {shares.text('source')}" if "source" in shares.data else "datasheet",
    )


def _fitted(entry: Table) -> Table:
    """What a preset's kernels and links reach of its peaks."""
    return _table().table("fitted").table(entry.text("fitted") if "fitted" in entry.data else "guess")


def like(driver_name: str) -> str:
    """The preset of a device by the name its driver gives it; UNKNOWN where none has it."""
    table = _table().table("preset")
    return next((name for name in names() if table.table(name).text("driver_name") in driver_name), UNKNOWN)


def processes(devices: int, *, memory_bytes: int, cores: float, limited: bool = True) -> Cluster:
    """Processes on this machine's processor, by a guess at its cores.

    Args:
        devices: how many processes.
        memory_bytes: of each.
        cores: the machine's.
        limited: the operating system holds them to their memory.
    """
    entry = _table().table("cpu")
    memory = entry.number("memory_bytes_per_s")
    matmul = entry.table("matmul")
    device = Device(
        name="CPU process",
        memory_bytes=memory_bytes,
        matmul={dtype: _flat(matmul.number(dtype)) for dtype in matmul.data},
        rates={
            "pointwise": _flat(memory),
            "attention": _flat(entry.number("attention")),
            "transcendental": _flat(entry.number("transcendental_bytes_per_s")),
        },
        overhead_s=entry.number("overhead_s"),
        accelerator=False,
        reserved_bytes=process_bytes(),
        allocator_share=LIMITED_SHARE if limited else UNLIMITED_SHARE,
    )
    return Cluster(
        name=f"{devices} CPU processes",
        nodes=(Nodes(count=1, devices=devices, device=device, cores=cores if cores < devices else None),),
        links=(_link(entry.table("link"), devices, 1.0),) if devices > 1 else (),
        calibration="preset",
    )


def process_bytes() -> int:
    """What a CPU process takes besides tensors."""
    return _table().table("cpu").size("reserved")


def accelerator_memory() -> tuple[int, float]:
    """What an accelerator takes besides tensors, and the share that its allocator keeps."""
    table = _table().table("accelerator")
    return table.size("reserved"), table.number("allocator_share")


def _table() -> Table:
    text = resources.files("weft.cluster").joinpath("presets.toml").read_text()
    return Table(tomllib.loads(text), "presets.toml")


def _curve(table: Table) -> Curve:
    return Curve(table.numbers("sizes"), table.numbers("rates"))


def _flat(rate: float) -> Curve:
    return Curve((1.0,), (rate,))


def _link(table: Table, devices: int, share: float) -> Link:
    return Link(
        name=table.text("name"),
        devices=devices,
        latency_s=table.number("latency_s"),
        bytes_per_s=share * table.number("bytes_per_s"),
    )
