"""Planned: the plan that a training job runs: the one it was given, the one it ran before its processes were started
again, or one for the devices that there are now.

A job that goes on with as many devices as before keeps its plan, so that its numbers stay the same to the bit, unless
another is asked for. With others it plans again; the batch and the precision stay, so the trajectory does too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from weft.capture import capture
from weft.checkpoint.folder import complete
from weft.checkpoint.index import Index
from weft.cluster import Cluster, measure
from weft.errors import CheckpointError, ClusterError, InputError, PlanError
from weft.estimate import Estimate
from weft.fixed import WITHOUT_DEGREES
from weft.plan import DIMENSIONS, Plan
from weft.planner import Refused, estimate, search
from weft.precision import dtypes_of
from weft.runtime.logbook import JOB, Logbook
from weft.runtime.worker import limit_here
from weft.target import Target

MEASURED = "measured.toml"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of a plan; the same on every rank.

    Attributes:
        plan: what to run; None plans here, keeping ``constraints``.
        cluster: what to plan for; None measures the devices of the job.
        memory_bytes: limit of each device, or of one after the other; empty: none.
        goes_on: the directory of checkpoints of a job that may have run before, with other devices; None: it has not.
    """

    plan: Plan | None
    cluster: Cluster | None
    constraints: Mapping[str, Any]
    memory_bytes: tuple[int, ...] = ()
    goes_on: Path | None = None


@dataclass(frozen=True)
class Planned:
    """A plan, what it should cost (None for one that was given without a cluster), and what was left out."""

    plan: Plan
    estimate: Estimate | None
    refused: tuple[Refused, ...] = ()


def make_plan(target: Target, wanted: Wanted, say: Callable[[str], None]) -> Planned:
    """The plan to run, on every rank; rank 0 plans, and tells people.

    Raises:
        InputError: there is none.
    """
    logbook = Logbook.here()
    wanted = _agreed(logbook, lambda: fitting(wanted, dist.get_world_size(), say))
    limits = limits_of(wanted.memory_bytes)
    cluster = wanted.cluster
    if cluster is None and wanted.plan is None:
        cluster = _agreed(logbook, lambda: measured_before(dist.get_world_size()))
        if cluster is None:
            if dist.get_rank() == 0:
                say(f"measuring {dist.get_world_size()} devices")
            logbook.note("measuring the devices")
            precision = wanted.constraints.get("precision", "float32")
            cluster = measure(memory_bytes=limits, dtypes=dtypes_of(precision))
            keep(cluster)
    if cluster is not None and len(limits) == cluster.devices > 1:  # of several, those that are there
        cluster = cluster.with_memory(*limits)
    return _agreed(logbook, lambda: plan_alone(target, wanted, cluster, say))


def _agreed(logbook: Logbook, make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank; and what it raises: all must, or they would wait for rank 0."""
    made: list[Any] = [None]
    if dist.get_rank() == 0:
        logbook.note("planning")
        try:
            made = [make()]
        except InputError as error:
            made = [error]
    logbook.note("learning from rank 0 what it planned", waiting=True)
    dist.broadcast_object_list(made, src=0)
    logbook.note("")
    if isinstance(made[0], InputError):
        raise made[0]
    found: T = made[0]
    return found


def limits_of(asked: Sequence[int]) -> tuple[int, ...]:
    """Of the memory of the ranks that there are; ``asked`` are those of all devices. All ranks call it."""
    if len(asked) < 2:
        return tuple(asked)
    every: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, limit_here())
    return tuple(limit for limit in every if limit is not None) if None not in every else tuple(asked)


def measured_before(devices: int) -> Cluster | None:
    """The devices of this job as they were measured before its processes were started again, where there are no more
    of them now: measuring again would keep training waiting."""
    job = os.environ.get(JOB)
    if job is None or not Path(job, MEASURED).exists():
        return None
    return _part(Cluster.load(Path(job, MEASURED)), devices)


def _part(cluster: Cluster, devices: int) -> Cluster | None:
    """So many devices of a cluster, where it can be cut so."""
    try:
        return cluster.with_devices(devices)
    except ClusterError:
        return None


def keep(cluster: Cluster) -> None:
    """Keep what was measured for as long as the job lasts."""
    job = os.environ.get(JOB)
    if job is not None and dist.get_rank() == 0:
        cluster.save(Path(job, MEASURED))


def fitting(wanted: Wanted, devices: int, say: Callable[[str], None]) -> Wanted:
    """What is asked, for as many devices as there are: those that were lost, or have come back, leave another number
    than what was given is for."""
    if wanted.goes_on is None:
        return wanted
    if wanted.plan is not None and wanted.plan.devices == devices:
        return wanted
    before, asked = newest_plan(wanted.goes_on), wanted.constraints
    if before is not None and before.devices == devices:
        if _is_as_asked(before, asked):
            return replace(wanted, plan=before)
        say("the checkpoint's plan is not what is asked for: planning again")
    if wanted.plan is not None:
        say(f"the plan is for {wanted.plan.devices} devices and {devices} are there: planning again")
    if (known := wanted.plan or before) is not None:  # numbers are to stay what they would have been
        asked = {"precision": known.precision, "compile": known.compile, **asked}
    cluster = wanted.cluster
    if cluster is not None and cluster.devices > devices:
        cluster = _part(cluster, devices)
    return replace(wanted, plan=None, constraints=asked, cluster=cluster)


def _is_as_asked(plan: Plan, asked: Mapping[str, Any]) -> bool:
    """Whether a plan has what options of ``weft.fixed`` ask for. Degrees that its devices cannot have do not count, nor
    does recomputing, of which a plan has the units."""
    whole = math.prod(asked.get(name, 1) for name in DIMENSIONS)
    names = [name for name in asked if plan.devices % whole == 0 or name in WITHOUT_DEGREES]
    return all(name == "recompute" or getattr(plan, name) == asked[name] for name in names)


def newest_plan(directory: Path) -> Plan | None:
    """The plan of the newest checkpoint whose index can be read."""
    for path in complete(directory):
        try:
            return Index.load(path).plan
        except CheckpointError:
            continue
    return None


def plan_alone(target: Target, wanted: Wanted, cluster: Cluster | None, say: Callable[[str], None]) -> Planned:
    """Capture and search, in one process."""
    if wanted.plan is not None and cluster is None:
        return Planned(wanted.plan, None)
    assert cluster is not None
    if wanted.plan is not None:
        profile = capture(target.load(), wanted.plan.precision)
        return Planned(wanted.plan, estimate(profile, cluster, wanted.plan))
    profile = capture(target.load(), wanted.constraints.get("precision", "float32"))
    try:
        choice = search(profile, cluster, **wanted.constraints)
    except PlanError as error:
        kept = {name: value for name, value in wanted.constraints.items() if name in WITHOUT_DEGREES}
        if wanted.goes_on is None or kept == wanted.constraints:
            raise
        say(f"{error}: planning with what these {cluster.devices} devices allow")
        choice = search(profile, cluster, **kept)
    return Planned(choice.plan, choice.estimate, choice.refused)
