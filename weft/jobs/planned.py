"""Planned: the plan that a training job runs: the one it was given, the one it ran before its processes were started
again, or one for the devices that there are now.

A job that goes on with as many devices as before keeps its plan, so that its numbers stay the same to the bit. With
others it plans again; the batch stays as it is, so the trajectory does too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from weft.capture import capture
from weft.checkpoint.folder import complete
from weft.checkpoint.index import Index
from weft.cluster import Cluster, measure
from weft.errors import CheckpointError, InputError, PlanError
from weft.estimate import Estimate
from weft.fixed import WITHOUT_DEGREES
from weft.plan import Plan
from weft.planner import Refused, estimate, search
from weft.precision import dtypes_of
from weft.runtime.logbook import JOB, Logbook
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
    cluster = wanted.cluster
    if cluster is None and wanted.plan is None:
        cluster = _agreed(logbook, lambda: measured_before(dist.get_world_size()))
        if cluster is None:
            if dist.get_rank() == 0:
                say(f"measuring {dist.get_world_size()} devices")
            logbook.note("measuring the devices")
            precision = wanted.constraints.get("precision", "float32")
            cluster = measure(memory_bytes=wanted.memory_bytes, dtypes=dtypes_of(precision))
            keep(cluster)
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


def measured_before(devices: int) -> Cluster | None:
    """The devices of this job as they were measured before its processes were started again, where there are no more
    of them now: measuring again would keep training waiting."""
    job = os.environ.get(JOB)
    if job is None or not Path(job, MEASURED).exists():
        return None
    known = Cluster.load(Path(job, MEASURED))
    return known.with_devices(devices) if devices <= known.devices else None


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
    before = newest_plan(wanted.goes_on)
    if before is not None and before.devices == devices:
        return replace(wanted, plan=before)
    if wanted.plan is not None and wanted.plan.devices != devices:
        say(f"the plan is for {wanted.plan.devices} devices and {devices} are there: planning again")
        wanted = replace(wanted, plan=None)
    if wanted.cluster is not None and wanted.cluster.devices > devices:
        wanted = replace(wanted, cluster=wanted.cluster.with_devices(devices))
    return wanted


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
