"""This machine: its accelerators, or processes on its cores."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from weft.cluster import presets
from weft.cluster.topology import Cluster
from weft.errors import ClusterError
from weft.quantity import Sizes, each_of, format_bytes, parse_sizes


def local(devices: int | None = None, memory: Sizes = None) -> Cluster:
    """The devices of this machine, not yet measured.

    Args:
        devices: how many; None: every accelerator, or a process for every core.
        memory: limit of each device, or of one after the other (``"2GiB,1GiB"``); None: an accelerator's own memory, or
            an equal part of the machine's.

    Raises:
        ClusterError: more accelerators, or more memory, than there are.
    """
    limits = parse_sizes(memory)
    accelerators = torch.accelerator.device_count()
    if accelerators:
        return _accelerators(accelerators if devices is None else devices, limits)
    cores = usable_cores()
    count = cores if devices is None else devices
    if count < 1:
        raise ClusterError(f"devices must be at least 1, got {count}")
    own = device_memory(count)
    if own < (least := presets.process_bytes()):
        raise ClusterError(
            f"{count} devices would have {format_bytes(own)} of this machine's memory each, less than the "
            f"{format_bytes(least)} that a process takes; ask for {device_memory(1) // least} at most"
        )
    asked = [limit or own for limit in each_of(limits, count)]
    _within(sum(asked) / count, own)  # processes share the machine's memory in any way
    return presets.processes(count, memory_bytes=own, cores=cores, limited=bool(limits)).with_memory(*limits)


def usable_cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def core_share(root: Path = Path("/")) -> float:
    """What a quota leaves this process of one core: 1, or less. Control groups of Linux, both versions, and the groups
    around its own.

    Args:
        root: where the system's files are.
    """
    share = 1.0
    with contextlib.suppress(OSError):  # another system, or nothing is mounted
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / controllers
            group = top / path.lstrip("/")
            for each in (group, *group.parents)[: len(group.relative_to(top).parts) + 1]:
                share = min(share, _quota(each))
    return share


def _quota(group: Path) -> float:
    """Processor seconds per second that a control group may use."""
    if (group / "cpu.max").is_file():
        quota, period = (group / "cpu.max").read_text().split()
    elif (group / "cpu.cfs_quota_us").is_file():
        quota, period = ((group / f"cpu.cfs_{what}_us").read_text().strip() for what in ("quota", "period"))
    else:
        return math.inf
    return math.inf if quota in ("max", "-1") else int(quota) / int(period)


def device_memory(devices: int) -> int:
    """Bytes of one of ``devices`` devices here: an accelerator's own, or an equal part of the machine's memory."""
    if torch.accelerator.device_count():
        return int(torch.accelerator.get_memory_info(0)[1])
    return int(psutil.virtual_memory().total) // devices


def _within(asked: float, own: int) -> None:
    if asked > own:
        raise ClusterError(f"a device here has {format_bytes(own)}, less than the {format_bytes(asked)} asked for")


def _accelerators(devices: int, limits: Sequence[int]) -> Cluster:
    there = torch.accelerator.device_count()
    if not 1 <= devices <= there:
        raise ClusterError(
            f"this machine has {there} accelerators, {devices} were asked for; use --devices 1 to {there}"
        )
    own = device_memory(devices)
    _within(max(limits, default=own), own)
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else str(torch.accelerator.current_accelerator())
    known = presets.preset(presets.like(name), devices_per_node=devices)
    nodes = known.nodes[0]
    device = replace(nodes.device, name=name, memory_bytes=own)
    found = replace(known, name=f"{devices} x {name}", nodes=(replace(nodes, device=device),), calibration="preset")
    return found.with_memory(*limits)
