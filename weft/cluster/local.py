"""This machine: its accelerators, or processes on its cores."""

from __future__ import annotations

import os
from dataclasses import replace

import psutil
import torch

from weft.cluster import presets
from weft.cluster.topology import Cluster
from weft.errors import ClusterError
from weft.quantity import format_bytes, parse_size


def local(devices: int | None = None, memory: str | int | None = None) -> Cluster:
    """The devices of this machine, not yet measured.

    Args:
        devices: how many; None: every accelerator, or a process for every core.
        memory: limit of each device; None: an accelerator's own memory, or an equal part of the machine's.

    Raises:
        ClusterError: more accelerators, or more memory, than there are.
    """
    limit = None if memory is None else parse_size(memory)
    accelerators = torch.accelerator.device_count()
    if accelerators:
        return _accelerators(accelerators if devices is None else devices, limit)
    cores = usable_cores()
    count = cores if devices is None else devices
    if count < 1:
        raise ClusterError(f"devices must be at least 1, got {count}")
    own = device_memory(count)
    return presets.processes(count, memory_bytes=_within(limit, own), cores=cores, limited=limit is not None)


def usable_cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_memory(devices: int) -> int:
    """Bytes of one of ``devices`` devices here: an accelerator's own, or an equal part of the machine's memory."""
    if torch.accelerator.device_count():
        return int(torch.accelerator.get_memory_info(0)[1])
    return int(psutil.virtual_memory().total) // devices


def _within(limit: int | None, own: int) -> int:
    if limit is not None and limit > own:
        raise ClusterError(f"a device here has {format_bytes(own)}, less than the {format_bytes(limit)} asked for")
    return own if limit is None else limit


def _accelerators(devices: int, limit: int | None) -> Cluster:
    there = torch.accelerator.device_count()
    if not 1 <= devices <= there:
        raise ClusterError(
            f"this machine has {there} accelerators, {devices} were asked for; use --devices 1 to {there}"
        )
    memory = _within(limit, device_memory(devices))
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else str(torch.accelerator.current_accelerator())
    known = presets.preset(presets.like(name), devices_per_node=devices)
    nodes = known.nodes[0]
    device = replace(nodes.device, name=name, memory_bytes=memory)
    return replace(known, name=f"{devices} x {name}", nodes=(replace(nodes, device=device),), calibration="preset")
