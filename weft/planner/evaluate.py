"""What one candidate costs: the work of its stages is put on the timeline, their memory is added up.

    step time = end of the last device on the timeline (timeline.simulate) of
        forward, backward    sums over calls (CallCosts.of), their exchanges (Mesh), the gathers of shards, accumulation
        transfers            tensors that one stage makes and another reads (Evaluator.flows)
        reduce               gradients averaged over the replicas, once a step or after every microbatch
        step                 optimizer, gradient norm and clipping (optimizer_s), gathers of a whole step
    memory    = memory.Footprint of every device (Stages.memory)

Where devices are accelerators, communication between replicas hides behind computation: gathers behind the forward and
backward of their microbatch, the reduction behind the backward it follows. Processors hide nothing, since what
communicates takes their cores.

Where devices differ, every line of replicas (sites.Line) has a timeline of its own, on cores that it shares with the
others; the one that ends last is the step. The memory of a stage is that of the devices it fills most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from weft.capture.profile import Profile
from weft.cluster.topology import Cluster
from weft.estimate import TIME_TERMS, Estimate
from weft.planner import timeline
from weft.planner.communication import transfer_s
from weft.planner.loads import Flow, Flows, Load, Loads
from weft.planner.program import Program, follow, of_schedule
from weft.planner.sharing import Sharing
from weft.planner.sites import Line, at
from weft.planner.space import Candidate
from weft.planner.stages import Ends, Stages
from weft.planner.system import WEFT, System
from weft.planner.work import Event, Spent
from weft.schedule import Edge, actions


@dataclass(frozen=True)
class StageRow:
    """One device of a pipeline for people: which calls, what it holds, how long it works, how full it gets, and of how
    much, what it recomputes, and which kinds of devices do this, where there are several."""

    calls: tuple[str, ...]
    parameter_bytes: float
    busy_s: float
    idle_s: float
    memory_bytes: float
    limit_bytes: int
    recompute: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[str, ...] = ()


class Run(NamedTuple):
    """One line of a candidate: its stages' loads, and what goes from stage to stage."""

    line: Line
    flows: Flows
    loads: list[Load]
    transfers: Mapping[tuple[int, int], float]


def latest(every: Sequence[tuple[list[Spent], list[Event]]]) -> int:
    """Which of the simulated lines is done last."""
    return max(range(len(every)), key=lambda r: max(device.end_s for device in every[r][0]))


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

    def evaluate(self, candidate: Candidate, ends: Ends) -> tuple[Estimate, list[StageRow]]:
        """The estimate, and what each device of a pipeline contributes to it."""
        degrees, pp = candidate.degrees, candidate.degrees.pp
        runs = self.runs(candidate, ends)
        every = self.simulate(candidate, runs)
        last = latest(every)
        spent, loads = every[last][0], runs[last].loads
        slowest = max(range(pp), key=lambda d: spent[d].end_s)
        end_s = spent[slowest].end_s
        time = self._terms(candidate, loads[slowest::pp], spent[slowest])
        step = sum(time.values())
        assert math.isclose(step, end_s, rel_tol=1e-9), "the terms do not add up to the timeline"
        stretches = [self.stages.chunks(candidate, ends, d) for d in range(pp)]
        memory = [self.stages.memory(candidate, d, own) for d, own in enumerate(stretches)]
        idle = [[max(0.0, end_s - device.compute_s - device.step_s) for device in of] for of, _ in every]
        weights = [len(run.line.replicas) / degrees.replicas for run in runs]
        stage_time = tuple(self._stage_time(candidate, runs, every, weights, d) for d in range(pp))
        idle_s = sum(weight * sum(of) for weight, of in zip(weights, idle, strict=True))
        estimate = Estimate(
            step_time_s=step,
            time=time,
            stage_time=stage_time,
            memory=tuple(dict(held.terms) for held in memory),
            bytes_sent=max(sum(load.bytes_sent for load in run.loads[d::pp]) for run in runs for d in range(pp)),
            idle_share=idle_s / (pp * end_s) if end_s else 0.0,
            calibration=self.cluster.calibration,
        )
        rows = []
        for device, own in enumerate(stretches):
            holding = self.stages.holding(degrees, own)
            calls = [call for stretch in own for call in self.profile.calls[slice(*stretch)]]
            names = tuple(call.name for call in calls)
            kinds = sorted({site.kind for site in at(self.stages.layout(candidate).sites, device)})
            rows.append(
                StageRow(
                    names if device < pp - 1 else names[:-1],
                    holding.trainable_shard + holding.frozen_shard,
                    end_s - idle[last][device],
                    idle[last][device],
                    memory[device].bytes,
                    memory[device].limit,
                    {c.unit: m for c in calls if (m := candidate.recompute.get(c.unit))},
                    tuple(self.stages.kinds[kind].name for kind in kinds) if len(self.stages.kinds) > 1 else (),
                )
            )
        return estimate, rows

    def bound(self, candidate: Candidate, ends: Ends) -> float:
        """Seconds that a step takes at least: each device works through its microbatches; before its first one the
        stages before it did that one's forward, and after it they do the last one's backward and end their step."""
        pp, microbatches, most = candidate.degrees.pp, candidate.microbatches, 0.0
        for run in self.runs(candidate, ends):
            before = after = 0.0
            for device in range(pp):
                own = run.loads[device::pp]
                end_s, weight_s = own[0].end_s, sum(load.work.weight.compute_s for load in own)
                done = before + microbatches * sum(load.microbatch_s for load in own)
                most = max(most, done + end_s, done - microbatches * weight_s + after)  # weights' gradients can wait
                before += sum(own[0].work.forward)
                after = max(after, end_s) + sum(own[0].work.backward)
        return most

    def runs(self, candidate: Candidate, ends: Ends) -> list[Run]:
        """Every line of a candidate, ready to be simulated."""
        runs = []
        for line in self.stages.layout(candidate).lines:
            flows = self.flows(candidate, ends, line)
            transfers = self._transfers(candidate, line, flows)
            blocking, pairs = self.system.blocking, [pair for s, t in flows for pair in ((s, t), (t, s))]
            loads = self._loads.of(candidate, ends, line, flows, transfers if blocking else {})
            runs.append(Run(line, flows, loads, dict.fromkeys(pairs, 0.0) if blocking else transfers))
        return runs

    def simulate(
        self, candidate: Candidate, runs: Sequence[Run], *, watched: bool = False
    ) -> list[tuple[list[Spent], list[Event]]]:
        """What the devices of every line spend, and if it is ``watched`` what each does when."""
        degrees, flows, cores = candidate.degrees, runs[0].flows, self.cluster.cores
        edges = frozenset(Edge(s, t, f.gradient > 0) for (s, t), f in flows.items())
        pipelines = [([load.work for load in run.loads], run.transfers) for run in runs]

        def scheduled(microbatches: int) -> Program:
            return of_schedule(candidate.schedule, degrees.pp, microbatches, edges, candidate.chunks)

        count = candidate.microbatches
        if cores is not None:
            of_nodes = {place.node: place.cores for run in runs for place in run.line.places}
            lists = actions(candidate.schedule, degrees.pp, count, edges, candidate.chunks)
            together = Sharing(lists, pipelines, of_nodes)
            return list(zip(together.run(), together.events, strict=True))
        if not watched:
            return [(timeline.repeated(scheduled, count, *each, degrees.pp), []) for each in pipelines]
        events: list[list[Event]] = [[] for _ in runs]
        return [(follow(scheduled(count), *each, seen), seen) for each, seen in zip(pipelines, events, strict=True)]

    def flows(self, candidate: Candidate, ends: Ends, line: Line) -> Flows:
        """Bytes of one microbatch from stage to stage: each tensor goes once to every later stage that reads it."""
        if candidate.stages == 1:
            return {}
        stage_of = [s for s, (start, end) in enumerate(self.stages.stretches(ends)) for _ in range(start, end)]
        flows: Flows = {}
        crossing = {(call, leaf, stage_of[reader]) for call, leaf, reader in self.stages.readers}
        for call, leaf, target in sorted(c for c in crossing if stage_of[c[0]] != c[2]):
            source, output = stage_of[call], self.profile.calls[call].outputs[leaf]
            size = self.stages.output_bytes(call, leaf, candidate, line.samples)
            old = flows.get((source, target), Flow(0.0, 0.0))
            flows[source, target] = Flow(old.activation + size, old.gradient + (size if output.requires_grad else 0.0))
        return flows

    def _transfers(self, candidate: Candidate, line: Line, flows: Flows) -> dict[tuple[int, int], float]:
        """Seconds of a microbatch's tensors between stages, both ways."""
        degrees = candidate.degrees
        mesh, pp = self.stages.mesh(degrees), degrees.pp
        apart = degrees.devices // pp
        first = line.replicas[0] * degrees.tp * degrees.cp
        scatters = self.system.scatters and not candidate.sequence
        seconds: dict[tuple[int, int], float] = {}
        for (source, target), flow in flows.items():
            link = self.cluster.link_between(source % pp * apart + first, target % pp * apart + first, senders=apart)
            for pair, size in (((source, target), flow.activation), ((target, source), flow.gradient)):
                seconds[pair] = transfer_s(size / (degrees.tp if scatters else 1), link)
                if scatters:
                    seconds[pair] += mesh.collective_s("tp", "all_gather", size)
        return seconds

    def _stage_time(
        self,
        candidate: Candidate,
        runs: Sequence[Run],
        every: Sequence[tuple[list[Spent], list[Event]]],
        weights: Sequence[float],
        device: int,
    ) -> dict[str, float]:
        """Seconds of a device of the pipeline by term, the mean over its replicas (of each line this share of them),
        with what it idles until the step is over: they add up to the step."""
        end_s = max(spent.end_s for of, _ in every for spent in of)
        total = dict.fromkeys(TIME_TERMS, 0.0)
        for run, (of, _), weight in zip(runs, every, weights, strict=True):
            spent = of[device]
            terms = self._terms(candidate, run.loads[device :: candidate.degrees.pp], spent)
            terms["bubble"] += end_s - spent.end_s
            for term, seconds in terms.items():
                total[term] += weight * seconds
        return total

    def _terms(self, candidate: Candidate, loads: Sequence[Load], spent: Spent) -> dict[str, float]:
        """A device's seconds by term of TIME_TERMS."""
        tensor = candidate.microbatches * sum(load.tensor_s for load in loads)
        gather = candidate.microbatches * sum(load.gather_s for load in loads)
        tied, whole = sum(load.tied_s for load in loads), sum(load.whole_s for load in loads)
        return {
            "compute": spent.compute_s,
            "tensor_parallel": tensor,
            "pipeline": spent.transfer_s + tied,
            "data_parallel": gather + spent.reduce_s - tied + whole,
            "bubble": spent.bubble_s,
            "optimizer": spent.step_s - whole,
        }
