"""Grid: the ranks of a job as one named value, of which every process group is a slice.

Rank order is row-major over ``plan.DIMENSIONS``: neighbours differ in ``tp``, the chattiest dimension, and the
pipeline's stages are furthest apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from weft.errors import PlanError
from weft.plan import DIMENSIONS, Plan


@dataclass(frozen=True)
class Grid:
    """The ranks of a job, seen from one of them.

    Attributes:
        mesh: all ranks, one dimension per name of ``plan.DIMENSIONS``.
        device: the device of this rank.
        gradients: a second process group over this rank's pipeline, so that gradients going back never queue behind
            activations going forward (on one NCCL communicator they would, and could deadlock).
    """

    mesh: DeviceMesh
    device: torch.device
    gradients: dist.ProcessGroup | None

    @classmethod
    def make(cls, plan: Plan) -> Grid:
        """The grid of a plan. Every rank of the job calls this, in the same order.

        Raises:
            PlanError: the job has another number of processes than the plan has devices.
        """
        world = dist.get_world_size()
        if world != plan.devices:
            raise PlanError(
                f"the plan ({plan.describe()}) is for {plan.devices} devices but the job has {world} processes; "
                f"launch {plan.devices} processes or plan again for {world} devices"
            )
        device = current_device()
        mesh = init_device_mesh(device.type, tuple(plan.degrees.values()), mesh_dim_names=DIMENSIONS)
        gradients = None
        if plan.pp > 1:
            pipelines = mesh.mesh.reshape(plan.pp, -1).T.tolist()  # every column is one pipeline
            gradients, _ = dist.new_subgroups_by_enumeration(pipelines)  # type: ignore[no-untyped-call]  # torch's
        return cls(mesh, device, gradients)

    def degree(self, dimension: str) -> int:
        """Number of ranks along a dimension."""
        return self.mesh.size(DIMENSIONS.index(dimension))

    def index(self, dimension: str) -> int:
        """Position of this rank along a dimension."""
        return int(self.mesh.get_local_rank(dimension))

    def group(self, dimension: str) -> dist.ProcessGroup:
        """The ranks that differ from this one along one dimension only."""
        return self.mesh.get_group(dimension)

    @property
    def stage(self) -> int:
        """The pipeline stage of this rank."""
        return self.index("pp")

    @property
    def replica(self) -> int:
        """Which part of the batch this rank sees: 0 to ``plan.replicas - 1``."""
        return self.index("dp_replicate") * self.degree("dp_shard") + self.index("dp_shard")

    @property
    def pipeline(self) -> list[int]:
        """The ranks of this rank's pipeline, by stage."""
        return dist.get_process_group_ranks(self.group("pp"))

    def limit_waiting(self, timeout: timedelta, others: Iterable[dist.ProcessGroup] = ()) -> None:
        """Have this rank wait so long for peers, in all groups of the grid, the default one and some others.

        A group takes a new timeout for what begins after it (Gloo and NCCL, ``ProcessGroup`` of torch 2.13). Gloo's
        transfers between two ranks keep the one that the group was made with, unless ``wait`` is given another;
        NCCL's ``wait`` must not be given one: it would then block the processor until the transfer is over.
        """
        groups = {self.group(dimension) for dimension in DIMENSIONS} | set(others)
        if self.gradients is not None:
            groups.add(self.gradients)
        for group in (None, *groups):
            _set_pg_timeout(timeout, group)

    def across_stages(self, stages: tuple[int, ...]) -> dist.ProcessGroup | None:
        """The ranks of some stages that are at this rank's place in their stage; None if this rank is of another stage.

        Every rank of the job calls this for the same stages in the same order.
        """
        columns = self.mesh.mesh.reshape(self.degree("pp"), -1)[list(stages)].T.tolist()
        mine = None
        for ranks in columns:
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                mine = group
        return mine

    def __str__(self) -> str:
        shape = (
            " x ".join(f"{name}={self.degree(name)}" for name in DIMENSIONS if self.degree(name) > 1) or "one device"
        )
        place = ", ".join(f"{name} {self.index(name)}" for name in DIMENSIONS if self.degree(name) > 1)
        return f"rank {dist.get_rank()} of {dist.get_world_size()} on {self.device} ({shape}): {place or 'alone'}"


def current_device() -> torch.device:
    """The accelerator this process was given, or the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
