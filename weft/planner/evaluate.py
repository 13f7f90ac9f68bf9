"""What one candidate costs: the work of its stages is put on the timeline, their memory is added up.

    step time = end of the last device on the timeline (timeline.simulate) of
        forward, backward    sums over calls (CallCosts.of), their exchanges (Mesh), the gathers of shards, accumulation
        transfers            tensors that one stage makes and another reads (Evaluator.flows)
        reduce               gradients averaged over the replicas, once a step or after every microbatch
        step                 optimizer, gradient norm and clipping (optimizer_s), gathers of a whole step
    memory    = memory.stage_memory of every device (Stages.memory)

Where every device has its own core or is an accelerator, communication between replicas hides behind computation:
gathers behind the forward and backward of their microbatch, the reduction behind the backward it follows. Devices that
share cores hide nothing, since communication takes the same cores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weft.capture.profile import Profile
from weft.cluster.topology import Cluster
from weft.estimate import Estimate
from weft.planner import timeline
from weft.planner.communication import transfer_s
from weft.planner.loads import Flow, Flows, Load, Loads
from weft.planner.space import Candidate
from weft.planner.stages import Ends, Stages
from weft.planner.system import WEFT, System
from weft.planner.work import Event, Spent
from weft.schedule import Action, Edge, actions


@dataclass(frozen=True)
class StageRow:
    """One device of a pipeline for people: which calls, what it holds, how long it works, how full it gets, what it
    recomputes."""

    calls: tuple[str, ...]
    parameter_bytes: float
    busy_s: float
    idle_s: float
    memory_bytes: float
    recompute: Mapping[str, str] = field(default_factory=dict)


class Evaluator:
    """Costs of any candidate for one profile on one cluster; what candidates share is worked out once."""

    def __init__(self, profile: Profile, cluster: Cluster, system: System = WEFT) -> None:
        self.profile, self.cluster, self.system = profile, cluster, system
        self.stages = Stages(profile, cluster, system)
        self._loads = Loads(self.stages)

    # -- estimating ---------------------------------------------------------------------------------------------------

    def estimate(self, candidate: Candidate, ends: Ends) -> Estimate:
        """Step time and memory of a candidate with its stages cut."""
        return self.evaluate(candidate, ends)[0]

    def evaluate(
        self, candidate: Candidate, ends: Ends, events: list[Event] | None = None
    ) -> tuple[Estimate, list[StageRow]]:
        """The estimate, and what each device of a pipeline contributes to it; ``events`` is filled with what each does
        when."""
        degrees, pp = candidate.degrees, candidate.degrees.pp
        flows = self.flows(candidate, ends)
        loads = self._loads.of(candidate, ends, flows, self._sending(candidate, flows))
        spent = self._simulate(candidate, flows, loads, events)
        slowest = max(range(pp), key=lambda d: spent[d].end_s)
        time = self._terms(candidate, loads[slowest::pp], spent[slowest])
        step = sum(time.values())
        assert math.isclose(step, spent[slowest].end_s, rel_tol=1e-9), "the terms do not add up to the timeline"
        stretches = [self.stages.chunks(candidate, ends, d) for d in range(pp)]
        memory = tuple(self.stages.memory(candidate, d, own) for d, own in enumerate(stretches))
        idle = [spent[slowest].end_s - device.compute_s - device.step_s for device in spent]
        estimate = Estimate(
            step_time_s=step,
            time=time,
            memory=memory,
            bytes_sent=max(sum(load.bytes_sent for load in loads[d::pp]) for d in range(pp)),
            idle_share=sum(idle) / (pp * spent[slowest].end_s) if spent[slowest].end_s else 0.0,
            calibration=self.cluster.calibration,
        )
        rows = []
        for device, own in enumerate(stretches):
            holding = self.stages.holding(degrees, own)
            calls = [call for stretch in own for call in self.profile.calls[slice(*stretch)]]
            names = tuple(call.name for call in calls)
            rows.append(
                StageRow(
                    names if device < pp - 1 else names[:-1],
                    holding.trainable_shard + holding.frozen_shard,
                    spent[slowest].end_s - idle[device],
                    idle[device],
                    sum(memory[device].values()),
                    {c.unit: m for c in calls if (m := candidate.recompute.get(c.unit))},
                )
            )
        return estimate, rows

    def bound(self, candidate: Candidate, ends: Ends) -> float:
        """Seconds that a step takes at least: each device works through its microbatches; before its first one the
        stages before it did that one's forward, and they do the last one's backward after it."""
        flows = self.flows(candidate, ends)
        loads = self._loads.of(candidate, ends, flows, self._sending(candidate, flows))
        pp, most, before = candidate.degrees.pp, 0.0, 0.0
        for device in range(pp):
            own = loads[device::pp]
            most = max(most, candidate.microbatches * sum(load.microbatch_s for load in own) + before + own[0].end_s)
            before += sum(own[0].work.forward) + sum(own[0].work.backward)
        return most

    def _simulate(
        self, candidate: Candidate, flows: Flows, loads: Sequence[Load], events: list[Event] | None
    ) -> list[Spent]:
        degrees, edges = candidate.degrees, [Edge(s, t, f.gradient > 0) for (s, t), f in flows.items()]
        transfers = {} if self.system.blocking else self._transfers(candidate, flows)
        transfers = dict.fromkeys(self._pairs(flows), 0.0) | transfers
        work = [load.work for load in loads]

        def lists(microbatches: int) -> list[list[Action]]:
            return actions(candidate.schedule, degrees.pp, microbatches, edges, candidate.chunks)

        count = candidate.microbatches
        if events is None and self.cluster.cores is None:
            return timeline.repeated(lists, count, work, transfers, degrees.pp)
        return timeline.simulate(lists(count), work, transfers, self.cluster.cores, events)

    def flows(self, candidate: Candidate, ends: Ends) -> Flows:
        """Bytes of one microbatch from stage to stage: each tensor goes once to every later stage that reads it."""
        if candidate.stages == 1:
            return {}
        stage_of = [s for s, (start, end) in enumerate(self.stages.stretches(ends)) for _ in range(start, end)]
        flows: Flows = {}
        crossing = {(call, leaf, stage_of[reader]) for call, leaf, reader in self.stages.readers}
        for call, leaf, target in sorted(c for c in crossing if stage_of[c[0]] != c[2]):
            source, output = stage_of[call], self.profile.calls[call].outputs[leaf]
            size = self.stages.output_bytes(call, leaf, candidate)
            old = flows.get((source, target), Flow(0.0, 0.0))
            flows[source, target] = Flow(old.activation + size, old.gradient + (size if output.requires_grad else 0.0))
        return flows

    def _sending(self, candidate: Candidate, flows: Flows) -> dict[tuple[int, int], float]:
        """Seconds that a stage spends sending, where it can do nothing else meanwhile."""
        return self._transfers(candidate, flows) if self.system.blocking else {}

    def _pairs(self, flows: Flows) -> list[tuple[int, int]]:
        return [pair for s, t in flows for pair in ((s, t), (t, s))]

    def _transfers(self, candidate: Candidate, flows: Flows) -> dict[tuple[int, int], float]:
        """Seconds of a microbatch's tensors between stages, both ways."""
        degrees = candidate.degrees
        mesh, pp = self.stages.mesh(degrees), degrees.pp
        apart = degrees.devices // pp
        scatters = self.system.scatters and not candidate.sequence
        seconds: dict[tuple[int, int], float] = {}
        for (source, target), flow in flows.items():
            link = self.cluster.link_between(source % pp * apart, target % pp * apart)
            for pair, size in (((source, target), flow.activation), ((target, source), flow.gradient)):
                seconds[pair] = transfer_s(size / (degrees.tp if scatters else 1), link)
                if scatters:
                    seconds[pair] += mesh.collective_s("tp", "all_gather", size)
        return seconds

    def _terms(self, candidate: Candidate, loads: Sequence[Load], spent: Spent) -> dict[str, float]:
        """A device's seconds by term of TIME_TERMS."""
        tensor = candidate.microbatches * sum(load.tensor_s for load in loads)
        gather = candidate.microbatches * sum(load.gather_s for load in loads)
        tied = sum(load.tied_s for load in loads)
        return {
            "compute": spent.compute_s,
            "tensor_parallel": tensor,
            "pipeline": spent.transfer_s + tied,
            "data_parallel": gather + spent.reduce_s - tied,
            "bubble": spent.bubble_s,
            "optimizer": spent.step_s,
        }
