"""Options that verbs of the command line share, and what they say."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from weft.cluster import Cluster
from weft.errors import InputError, PlanError, TargetError, WeftError
from weft.plan import Plan
from weft.planner import Constraints
from weft.quantity import parse_sizes
from weft.runtime.launch import device_count
from weft.runtime.meeting import Nodes
from weft.runtime.worker import device_type
from weft.target import Target

TargetText = Annotated[
    str, typer.Argument(metavar="TARGET", help="file.py, file.py:name, package.module:name or a directory of weights")
]
Arguments = Annotated[list[str] | None, typer.Argument(metavar="[name=value]...", help="for the workload function")]
Devices = Annotated[int | None, typer.Option(min=1, help="how many; default: all accelerators, or all cores")]
Memory = Annotated[
    str | None, typer.Option(help="of each device, as in 2GiB, or one by one: 2GiB,1GiB; CPU processes are held to it")
]
ClusterText = Annotated[str | None, typer.Option("--cluster", metavar="FILE|PRESET:NODESxDEVICES")]
PlanFile = Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="run this plan instead of a search")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
Verbose = Annotated[bool, typer.Option("--verbose", help="with the traceback of the process that failed first")]


def target_of(text: str, arguments: Sequence[str] | None) -> Target:
    """The target and its ``name=value`` arguments."""
    values = {}
    for argument in arguments or []:
        name, equals, value = argument.partition("=")
        if not equals or not name.isidentifier():
            raise TargetError(f"{argument!r} is not of the form name=value, as in layers=4")
        values[name] = value
    return Target.parse(text, values)


def cluster_of(text: str | None, devices: int | None, memory: str | None) -> Cluster:
    """What to plan for: a file or a preset, or this machine as it is known without measuring."""
    if text is None:
        return Cluster.local(devices, memory)
    found = Cluster.parse(text)
    if devices is not None:
        found = found.with_devices(devices)
    return found.with_memory(*parse_sizes(memory))


def plan_of(path: Path, fixed: dict[str, Any]) -> Plan:
    """A plan file; it fixes everything, so nothing else may."""
    if fixed:
        name, value = next(iter(fixed.items()))
        option = "--" + name.replace("_", "-")
        raise PlanError(f"--plan {path} fixes everything and {option} {value} was given too; leave one of them out")
    return Plan.load(path)


def check_place(path: Path | None, read: Callable[[Path], object]) -> None:
    """Look whether a file can be written, before anything is computed for it.

    Args:
        path: of the file; None: none is written.
        read: raises a WeftError for a file that is none of its kind: only what it reads is written over, as a typing
            error must not cost anyone a model's source.

    Raises:
        InputError: there is no folder for it, or a folder or a file of another kind has its name.
    """
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{path}: cannot be written; name a file in a folder there is")
    if path.is_file() and path.stat().st_size:
        try:
            read(path)
        except WeftError as error:
            raise InputError(f"{path}: is there, and something else; name another file, or remove it") from error


def precision_of(fixed: dict[str, Any]) -> str:
    """The precision that was asked for, checked."""
    return Constraints(precision=fixed.get("precision")).precision or "float32"


def devices_of(
    devices: int | None, plan: Plan | None = None, cluster: Cluster | None = None, nodes: Nodes | None = None
) -> int:
    """How many devices a job takes here: as asked, as the plan or the cluster says, or all there are; those of several
    machines are no plan's or cluster's."""
    if nodes is not None and nodes.most > 1:
        return devices or device_count(device_type())
    if plan is None:
        return devices or (device_count(device_type()) if cluster is None else cluster.devices)
    if devices not in (None, plan.devices):
        raise PlanError(f"the plan is for {plan.devices} devices and --devices is {devices}; leave --devices out")
    return plan.devices


def nodes_of(text: str, rendezvous: str | None) -> Nodes:
    """The machines of a job: ``4``, or ``2:4`` for as many as are there.

    Raises:
        InputError: that is no number of machines, or there is no place where they meet.
    """
    parts = text.split(":")
    if len(parts) > 2 or not all(re.fullmatch(r"[1-9][0-9]{0,6}", part) for part in parts):
        raise InputError(f"--nodes {text}: write a number of machines, or the least and the most, as in 2:4")
    least, most = int(parts[0]), int(parts[-1])
    if least > most:
        raise InputError(f"--nodes {text}: the least is more than the most; write {most}:{least}")
    if most > 1 and rendezvous is None:
        raise InputError(f"{most} nodes need a place to meet; add --rendezvous HOST:PORT of one of them")
    return Nodes(least=least, most=most, rendezvous=rendezvous)
