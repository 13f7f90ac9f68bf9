"""What one candidate costs: the work of its stages is put on the timeline, their memory is added up.

    step time = end of the last stage on the timeline (timeline.simulate) of
        forward, backward    Σ calls (CallCosts.of), their all-reduces (Mesh), the gathers of fully_shard, accumulation
        transfers            Σ tensors that one stage makes and another reads (Evaluator.edges)
        reduce               gradients averaged over the replicas, once a step
        step                 optimizer, gradient norm and clipping (optimizer_s)
    memory    = memory.stage_memory of every stage (Stages.memory)

Where every device has its own core or is an accelerator, communication between replicas hides behind computation:
gathers behind the forward and backward of their microbatch, the reduction behind the last backward. Devices that share
cores hide nothing, since communication takes the same cores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from weft.capture.profile import Profile
from weft.cluster.topology import Cluster
from weft.estimate import Estimate
from weft.planner import timeline
from weft.planner.communication import Mesh, transfer_s
from weft.planner.compute import SHARDED_OPERATIONS, accumulate_s, dtensor_s, optimizer_s
from weft.planner.holdings import Holding
from weft.planner.space import Candidate, Degrees
from weft.planner.stages import Ends, Stages
from weft.schedule import Edge, actions

BUCKET_BYTES = 25 * 2**20
"""Gradients that ``replicate`` reduces at once."""

COPY_PASSES = 2.0
"""Bytes moved per byte copied: a read and a write."""

CONTROL_BYTES = 64.0
"""Size of the sums that every device exchanges once a step: the sample count, the loss, the gradient norm."""


class StageLoad(NamedTuple):
    """What a stage does, by term: seconds of one microbatch, and of the step's end."""

    work: timeline.Stage
    tensor_s: float  # of forward + backward, in collectives
    gather_s: float
    tied_s: float  # of reduce
    bytes_sent: float


class Flow(NamedTuple):
    """Bytes from one stage to another for one microbatch, and of the gradients that come back."""

    activation: float
    gradient: float


@dataclass(frozen=True)
class StageRow:
    """One stage for people: which calls, what it holds, how long it works, how full it gets, what it recomputes."""

    calls: tuple[str, ...]
    parameter_bytes: float
    busy_s: float
    idle_s: float
    memory_bytes: float
    recompute: Mapping[str, str] = field(default_factory=dict)


class Evaluator:
    """Costs of any candidate for one profile on one cluster; what candidates share is worked out once."""

    def __init__(self, profile: Profile, cluster: Cluster) -> None:
        self.profile, self.cluster = profile, cluster
        self.stages = Stages(profile, cluster)

    # -- estimating ---------------------------------------------------------------------------------------------------

    def estimate(self, candidate: Candidate, ends: Ends) -> Estimate:
        """Step time and memory of a candidate with its stages cut."""
        return self.evaluate(candidate, ends)[0]

    def evaluate(self, candidate: Candidate, ends: Ends) -> tuple[Estimate, list[StageRow]]:
        """The estimate, and what each stage contributes to it."""
        degrees = candidate.degrees
        flows = self.flows(candidate, ends)
        loads = [self._load(candidate, ends, stage, flows) for stage in range(degrees.pp)]
        spent = timeline.simulate(
            actions(
                candidate.schedule,
                degrees.pp,
                candidate.microbatches,
                [Edge(s, t, f.gradient > 0) for (s, t), f in flows.items()],
            ),
            [load.work for load in loads],
            self._transfers(degrees, flows),
            self.cluster.cores,
        )
        slowest = max(range(degrees.pp), key=lambda s: spent[s].end_s)
        time = self._terms(candidate, loads[slowest], spent[slowest])
        step = sum(time.values())
        assert math.isclose(step, spent[slowest].end_s, rel_tol=1e-9), "the terms do not add up to the timeline"
        memory = tuple(
            self.stages.memory(candidate, s, *stretch) for s, stretch in enumerate(self.stages.stretches(ends))
        )
        idle = [spent[slowest].end_s - stage.compute_s - stage.step_s for stage in spent]
        estimate = Estimate(
            step_time_s=step,
            time=time,
            memory=memory,
            bytes_sent=max(load.bytes_sent for load in loads),
            idle_share=sum(idle) / (degrees.pp * spent[slowest].end_s) if spent[slowest].end_s else 0.0,
            calibration=self.cluster.calibration,
        )
        rows = []
        for stage, (start, end) in enumerate(self.stages.stretches(ends)):
            holding = self.stages.holdings.of(start, end, degrees.tp, degrees.dp_shard)
            names = tuple(call.name for call in self.profile.calls[start:end])
            rows.append(
                StageRow(
                    names if stage < degrees.pp - 1 else names[:-1],
                    holding.trainable_shard + holding.frozen_shard,
                    spent[slowest].end_s - idle[stage],
                    idle[stage],
                    sum(memory[stage].values()),
                    {c.unit: m for c in self.profile.calls[start:end] if (m := candidate.recompute.get(c.unit))},
                )
            )
        return estimate, rows

    def flows(self, candidate: Candidate, ends: Ends) -> dict[tuple[int, int], Flow]:
        """Bytes of one microbatch from stage to stage: each tensor goes once to every later stage that reads it."""
        stage_of = [s for s, (start, end) in enumerate(self.stages.stretches(ends)) for _ in range(start, end)]
        samples = self.stages.samples(candidate)
        flows: dict[tuple[int, int], Flow] = {}
        for call, leaf, target in sorted(
            {(call, leaf, stage_of[reader]) for call, leaf, reader in self.stages.readers}
        ):
            source = stage_of[call]
            if source != target:
                output = self.profile.calls[call].outputs[leaf]
                size = output.bytes.at(samples)
                old = flows.get((source, target), Flow(0.0, 0.0))
                flows[source, target] = Flow(
                    old.activation + size, old.gradient + (size if output.requires_grad else 0.0)
                )
        return flows

    def _transfers(self, degrees: Degrees, flows: dict[tuple[int, int], Flow]) -> dict[tuple[int, int], float]:
        """Seconds of a microbatch's tensors between stages, both ways."""
        apart = degrees.devices // degrees.pp
        seconds = {}
        for (source, target), flow in flows.items():
            link = self.cluster.link_between(source * apart, target * apart)
            seconds[source, target] = transfer_s(flow.activation, link)
            seconds[target, source] = transfer_s(flow.gradient, link)
        return seconds

    def _terms(self, candidate: Candidate, load: StageLoad, spent: timeline.Spent) -> dict[str, float]:
        """A stage's seconds by term of TIME_TERMS."""
        tensor, gather = candidate.microbatches * load.tensor_s, candidate.microbatches * load.gather_s
        return {
            "compute": spent.compute_s,
            "tensor_parallel": tensor,
            "pipeline": spent.transfer_s + load.tied_s,
            "data_parallel": gather + spent.reduce_s - load.tied_s,
            "bubble": spent.bubble_s,
            "optimizer": spent.step_s,
        }

    # -- one stage ----------------------------------------------------------------------------------------------------

    def _load(self, candidate: Candidate, ends: Ends, stage: int, flows: dict[tuple[int, int], Flow]) -> StageLoad:
        """Work of one stage."""
        degrees, microbatches = candidate.degrees, candidate.microbatches
        start, end = self.stages.stretches(ends)[stage]
        mesh, device = self.stages.mesh(degrees), self.cluster.device
        calls = self.stages.calls(candidate, start, end)
        holding = self.stages.holdings.of(start, end, degrees.tp, degrees.dp_shard)
        on_node = min(degrees.devices, self.cluster.devices_per_node)
        hides = self.cluster.cores is None or self.cluster.cores >= on_node

        forward = sum(call.forward_s for call in calls)
        backward = sum(call.backward_s for call in calls)
        later = (microbatches - 1) / microbatches  # the first microbatch's gradients are kept as they are
        backward += later * accumulate_s(device, holding.trainable, holding.tensors)
        forward_tp = sum(mesh.collective_s("tp", "all_reduce", size) for call in calls for size in call.forward_reduced)
        backward_tp = sum(
            mesh.collective_s("tp", "all_reduce", size) for call in calls for size in call.backward_reduced
        )
        sent = microbatches * sum(
            mesh.bytes("tp", "all_reduce", size)
            for call in calls
            for size in (*call.forward_reduced, *call.backward_reduced)
        )
        sent += microbatches * sum(
            flow.activation * (source == stage) + flow.gradient * (target == stage)
            for (source, target), flow in flows.items()
        )

        gather_forward = gather_backward = 0.0
        if degrees.dp_shard > 1:
            units = list(holding.units.values())
            gathers = [mesh.collective_s("dp_shard", "all_gather", size) for size in units]
            copies = sum(device.seconds("copy", 0.0, COPY_PASSES * size) for size in units)
            copies += dtensor_s(device, len(units) * SHARDED_OPERATIONS)
            forward, backward = forward + copies, backward + copies
            gather_forward = _exposed(gathers, forward) if hides else sum(gathers)
            gather_backward = _exposed(gathers, backward) if hides else sum(gathers)
            sent += 2 * microbatches * sum(mesh.bytes("dp_shard", "all_gather", size) for size in units)

        reduce, reduce_sent = self._reduce(degrees, holding, mesh, backward if hides else 0.0)
        tied = self._tied_bytes(ends, stage, degrees)
        tied_s = 2 * transfer_s(tied, mesh.pipeline) if tied and mesh.pipeline else 0.0
        dtensors = holding.tensors if degrees.uses_fsdp else 0
        step = timeline.Work(
            optimizer_s(
                device, holding.trainable_shard, holding.tensors, self.profile.optimizer_passes, dtensors=dtensors
            ),
            mesh.everyone_s(CONTROL_BYTES),
        )
        apart = degrees.devices // degrees.pp
        work = timeline.Stage(
            forward=timeline.Work(forward, forward_tp + gather_forward),
            backward=timeline.Work(backward, backward_tp + gather_backward),
            reduce=timeline.Work(reduce.compute_s, reduce.collective_s + tied_s),
            step=step,
            node=stage * apart // self.cluster.devices_per_node,
            devices=min(apart, self.cluster.devices_per_node),
        )
        return StageLoad(
            work, forward_tp + backward_tp, gather_forward + gather_backward, tied_s, sent + reduce_sent + tied
        )

    def _reduce(self, degrees: Degrees, holding: Holding, mesh: Mesh, hidden_s: float) -> tuple[timeline.Work, float]:
        """Averaging the gradients over the replicas, what ``hidden_s`` does not hide of it; and the bytes sent."""
        device = self.cluster.device
        if degrees.replicas == 1 or not holding.trainable:
            return timeline.Work(0.0), 0.0
        if degrees.dp_shard > 1:
            parts = [size for size in holding.units.values() if size]
            seconds = [mesh.collective_s("dp_shard", "reduce_scatter", size) for size in parts]
            sent = sum(mesh.bytes("dp_shard", "reduce_scatter", size) for size in parts)
            shards = [size / degrees.dp_shard for size in parts]
        else:
            count = max(1, round(holding.trainable / BUCKET_BYTES))
            parts = shards = [holding.trainable / count] * count
            seconds, sent = [0.0] * count, 0.0
        seconds = [
            s + mesh.collective_s("dp_replicate", "all_reduce", shard) for s, shard in zip(seconds, shards, strict=True)
        ]
        sent += sum(mesh.bytes("dp_replicate", "all_reduce", shard) for shard in shards)
        copies = sum(device.seconds("copy", 0.0, COPY_PASSES * size) for size in parts)
        return timeline.Work(copies, _exposed(seconds, hidden_s) if hidden_s else sum(seconds)), sent

    def _tied_bytes(self, ends: Ends, stage: int, degrees: Degrees) -> float:
        """Gradients of parameters that another stage reads too, which the two must sum."""
        if degrees.pp == 1:
            return 0.0
        stretches = self.stages.stretches(ends)
        start, end = stretches[stage]
        mine = {name for call in self.profile.calls[start:end] for name in call.parameters}
        others = {
            name
            for s, e in (*stretches[:stage], *stretches[stage + 1 :])
            for call in self.profile.calls[s:e]
            for name in call.parameters
        }
        parameters = (self.profile.parameters[name] for name in mine & others)
        return sum(p.bytes for p in parameters if p.trainable) / degrees.dp_shard


def _exposed(parts: Sequence[float], hidden_s: float) -> float:
    """What remains of communication in parts that overlaps ``hidden_s`` of computation: never less than one part."""
    return max(max(parts, default=0.0), sum(parts) - hidden_s)
