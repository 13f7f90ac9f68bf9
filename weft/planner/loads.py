"""What every stage of a candidate does: seconds of one microbatch by term, and of the step's end.

forward, backward   its calls (CallCosts.of), what ranks exchange inside them (exchange_s), gathering sharded
                    parameters, adding gradients to those of earlier microbatches
reduce              averaging gradients over the replicas: after the last microbatch, from ``zero`` 2 on after each
step                optimizer, gradient norm and clipping, and up to ``zero`` 2 gathering parameters for the next step
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from weft.cluster.topology import Device
from weft.planner.communication import Mesh, transfer_s
from weft.planner.compute import ACCUMULATE_PASSES, SHARDED_OPERATIONS, accumulate_s, dtensor_s, optimizer_s
from weft.planner.exchange import exchange_s
from weft.planner.holdings import Holding
from weft.planner.sites import Line, Place, Site, at
from weft.planner.space import Candidate
from weft.planner.stages import Ends, Stages, Stretch
from weft.planner.work import Stage, Work

COPY_PASSES = 2.0
"""Bytes moved per byte copied: a read and a write. What is gathered is copied as a shard and as a whole."""

STATISTICS_BYTES = 1024.0
"""What replicas exchange where a normalisation takes statistics over the batch: a few numbers for every channel, so few
that only the latency counts."""

CONTROL_BYTES = 64.0
"""Size of the sums that every device exchanges once a step: the sample count, the loss, the gradient norm."""


class Load(NamedTuple):
    """What a stage does."""

    work: Stage
    tensor_s: float  # of forward + backward, in exchanges inside layers
    gather_s: float
    tied_s: float  # of reduce
    whole_s: float  # of step, in gathering parameters
    bytes_sent: float

    @property
    def microbatch_s(self) -> float:
        """Seconds of one microbatch."""
        return sum(sum(work) for work in (self.work.forward, self.work.backward, self.work.weight))

    @property
    def end_s(self) -> float:
        """Seconds after the last microbatch."""
        return sum(self.work.reduce) + sum(self.work.step)


class Flow(NamedTuple):
    """Bytes from one stage to another for one microbatch, and of the gradients that come back."""

    activation: float
    gradient: float


Flows = dict[tuple[int, int], Flow]


class Loads:
    """Loads of any candidate's stages, those of equal content worked out once."""

    def __init__(self, stages: Stages) -> None:
        self.stages, self.cluster, self.system = stages, stages.cluster, stages.system
        self._known: dict[tuple[object, ...], Load] = {}

    def of(
        self, candidate: Candidate, ends: Ends, line: Line, flows: Flows, sending: Mapping[tuple[int, int], float]
    ) -> list[Load]:
        """The load of every stage of a line; ``sending``: seconds a stage spends sending to another."""
        stretches, pp = self.stages.stretches(ends), candidate.degrees.pp
        mixed = {"recompute": None, "schedule": candidate.schedule == "zero_bubble"}
        common = tuple((candidate._asdict() | mixed).values())
        touching: dict[int, list[tuple[int, int]]] = {}
        for pair in flows:
            for end in pair:
                touching.setdefault(end, []).append(pair)
        found = []
        for stage, stretch in enumerate(stretches):
            own, pairs = stretches[stage % pp :: pp], touching.get(stage, [])
            tied = 0.0
            if pp > 1 and stage < pp:
                tied = self.stages.holdings.tied(stretches, set(range(stage, len(stretches), pp)))
            forward_s = sum(sending[s, t] for s, t in pairs if s == stage) if sending else 0.0
            backward_s = sum(sending[t, s] for s, t in pairs if t == stage) if sending else 0.0
            messages = len(pairs), sum(flows[pair].gradient > 0 for pair in pairs)
            content = tuple(self.stages.content(each, self.stages.modes(candidate, each)) for each in own)
            place, sites = at(line.places, stage % pp), at(line.sites, stage % pp)
            options = []
            for site in sites:
                key = (stage // pp, content, common, site, place[1:], tied, forward_s, backward_s, messages)
                if key not in self._known:
                    ending = own if stage < pp else []
                    self._known[key] = self._load(
                        candidate, stretch, ending, site, place, tied, (forward_s, backward_s), messages
                    )
                options.append(self._known[key])
            load = max(options, key=lambda load: load.microbatch_s) if len(options) > 1 else options[0]
            if place.node:
                load = load._replace(work=replace(load.work, node=place.node))
            crossing = sum(flows[pair].activation if stage == pair[0] else flows[pair].gradient for pair in pairs)
            found.append(load._replace(bytes_sent=load.bytes_sent + candidate.microbatches * crossing))
        return found

    def _load(
        self,
        candidate: Candidate,
        stretch: Stretch,
        ending: Sequence[Stretch],
        site: Site,
        place: Place,
        tied: float,
        sending: tuple[float, float],
        messages: tuple[int, int],
    ) -> Load:
        """Load of one stage. ``ending`` are all stretches of its device where it is the device's first, with which the
        end of the step stands; ``tied`` is what the device shares with others, in bytes; ``sending`` and ``messages``
        are seconds and number of what a forward and a backward exchange with other stages."""
        degrees, microbatches, system = candidate.degrees, candidate.microbatches, self.system
        mesh, device = self.stages.mesh(degrees), self.stages.kinds[site.kind]
        calls, holding = self.stages.calls(candidate, *stretch, site), self.stages.holding(degrees, [stretch])
        hides = device.accelerator  # a processor communicates in its own time
        hides_gather, hides_reduce = hides and system.hides_gather, hides and system.hides_reduce

        forward, backward = sum(call.forward_s for call in calls), sum(call.backward_s for call in calls)
        later = (microbatches - 1) / microbatches  # the first microbatch's gradients are kept as they are
        passes = ACCUMULATE_PASSES
        if system.accumulate_bytes is not None:
            passes = system.accumulate_bytes / self.stages.item_bytes
        backward += later * accumulate_s(device, holding.trainable, holding.tensors, passes)
        if (between := mesh.link("pp")) is not None:
            forward, backward = forward + messages[0] * between.busy_s, backward + messages[1] * between.busy_s
        forward_tp = backward_tp = sent = 0.0
        if degrees.tp * degrees.cp * degrees.ep > 1:
            exchanged = [exchange_s(call, mesh) for call in calls]
            forward_tp, backward_tp = (
                (1 - system.hides_tensor) * sum(pair[way] for pair in exchanged) for way in (0, 1)
            )
            sizes = [size for call in calls for size in (*call.forward_reduced, *call.backward_reduced)]
            sent = microbatches * sum(mesh.bytes("tp", "all_reduce", size) for size in sizes)
            routed = sum(call.forward_routed + call.backward_routed for call in calls)
            sent += microbatches * mesh.bytes("ep", "all_to_all", routed)

        if device.accelerator:  # which is not faster than the process that feeds it
            fed = system.dispatch_s * sum(call.forward_operations for call in calls)
            forward = max(forward, fed - forward_tp)
            fed = system.dispatch_s * sum(call.backward_operations for call in calls)
            backward = max(backward, fed - backward_tp)

        sharded, each_s, gather_forward, gather_backward = mesh.ranks("dp_shard") > 1, 0.0, 0.0, 0.0
        if sharded and candidate.zero == 3:
            gathers, copies, gathered = self._gathers(holding, mesh, device)
            forward, backward = forward + copies, backward + copies
            gather_forward = exposed(gathers, forward) if hides_gather else sum(gathers)
            gather_backward = exposed(gathers, backward) if hides_gather else sum(gathers)
            sent += 2 * microbatches * gathered
        # Sums of the forward are gathered, those of the backward reduced (runtime/statistics.py).
        for_statistics = [
            sum(getattr(call, which) for call in calls) * mesh.collective_s("replicas", kind, STATISTICS_BYTES)
            for which, kind in (("forward_statistics", "all_gather"), ("backward_statistics", "all_reduce"))
        ]
        gather_forward, gather_backward = gather_forward + for_statistics[0], gather_backward + for_statistics[1]
        if sharded and candidate.zero >= 2 and microbatches > 1:  # the last microbatch's are in ``reduce``
            each, size = self._reduce(holding, mesh, device, backward if hides_reduce else 0.0)
            each_s, sent = later * each.collective_s, sent + (microbatches - 1) * size
            backward += later * each.compute_s
        weight = sum(call.weight_s for call in calls) if candidate.schedule == "zero_bubble" else 0.0

        reduce, step, tied_s, whole_s = Work(0.0), Work(0.0), 0.0, 0.0
        if ending:
            whole, link = self.stages.holding(degrees, ending), mesh.link("pp")
            reduce, size = self._reduce(whole, mesh, device, len(ending) * backward if hides_reduce else 0.0)
            tied /= mesh.ranks("dp_shard")
            tied_s = 2 * transfer_s(tied, link) if tied and link else 0.0
            reduce = Work(reduce.compute_s, reduce.collective_s + tied_s)
            seconds = self._step(candidate, whole, device)
            sent += size + tied
            if sharded and candidate.zero < 3:
                gathers, copies, gathered = self._gathers(whole, mesh, device)
                whole_s = copies + (exposed(gathers, len(ending) * forward) if hides_gather else sum(gathers))
                sent += gathered
            step = Work(seconds + whole_s, mesh.collective_s("everyone", "all_reduce", CONTROL_BYTES))
        work = Stage(
            forward=Work(forward, forward_tp + gather_forward, sending[0]),
            backward=Work(backward - weight, backward_tp + gather_backward + each_s, sending[1]),
            weight=Work(weight),
            reduce=reduce,
            step=step,
            devices=place.devices,
            core_share=place.core_share,
        )
        gather_s = gather_forward + gather_backward + each_s
        return Load(work, forward_tp + backward_tp, gather_s, tied_s, whole_s, sent)

    def _gathers(self, holding: Holding, mesh: Mesh, device: Device) -> tuple[list[float], float, float]:
        """Gathering every unit's parameters: seconds of each, seconds of copying, bytes sent."""
        scale = 1.0 if self.system.gather_bytes is None else self.system.gather_bytes / self.stages.item_bytes
        units = [(name, scale * size) for name, size in sharded_units(holding)]
        copied = [(1 + 1 / mesh.ranks(f"{name}shard")) * size for name, size in units]
        copies = sum(device.seconds("copy", 0.0, COPY_PASSES * size) for size in copied)
        copies += dtensor_s(device, len(units) * SHARDED_OPERATIONS)
        seconds = [mesh.collective_s(f"{name}shard", "all_gather", size) for name, size in units]
        return seconds, copies, sum(mesh.bytes(f"{name}shard", "all_gather", size) for name, size in units)

    def _step(self, candidate: Candidate, holding: Holding, device: Device) -> float:
        """Seconds of a device's optimizer step."""
        passes = self.stages.profile.optimizer_passes
        if self.system.step_bytes is not None:
            passes = self.system.step_bytes / self.stages.item_bytes
        tensors = holding.tensors
        dtensors = tensors if candidate.degrees.uses_fsdp else 0
        seconds = optimizer_s(device, holding.trainable_shard, tensors, passes, dtensors=dtensors)
        return seconds + self.system.step_s

    def _reduce(self, holding: Holding, mesh: Mesh, device: Device, hidden_s: float) -> tuple[Work, float]:
        """Averaging the gradients over the replicas, what ``hidden_s`` does not hide of it; and the bytes sent."""
        if not holding.trainable:
            return Work(0.0), 0.0
        scale = 1.0 if self.system.reduce_bytes is None else self.system.reduce_bytes / self.stages.item_bytes
        if mesh.ranks("dp_shard") > 1 and not self.system.buckets_shards:
            parts = [(name, scale * size) for name, size in sharded_units(holding) if size]
        else:
            experts, whole, size = sum(holding.experts.values()), holding.trainable, self.system.bucket_bytes
            parts = [*bucketed("dp_", scale * (whole - experts), size), *bucketed("expert_", scale * experts, size)]
        parts = [(n, size) for n, size in parts if mesh.ranks(f"{n}shard") * mesh.ranks(f"{n}replicate") > 1]
        seconds, sent = [], 0.0
        for name, size in parts:
            shard = size / mesh.ranks(f"{name}shard")
            scattered = mesh.collective_s(f"{name}shard", "reduce_scatter", size)
            seconds.append(scattered + mesh.collective_s(f"{name}replicate", "all_reduce", shard))
            sent += mesh.bytes(f"{name}shard", "reduce_scatter", size)
            sent += mesh.bytes(f"{name}replicate", "all_reduce", shard)
        copies = sum(device.seconds("copy", 0.0, COPY_PASSES * size) for _, size in parts)
        return Work(copies, exposed(seconds, hidden_s) if hidden_s else sum(seconds)), sent


def sharded_units(holding: Holding) -> list[tuple[str, float]]:
    """Bytes that are gathered at once, by the beginning of the names of the dimensions that shard and copy them."""
    return [*(("dp_", size) for size in holding.units.values()), *(("expert_", s) for s in holding.experts.values())]


def bucketed(name: str, size: float, bucket_bytes: float) -> list[tuple[str, float]]:
    """So many bytes in equal parts of about ``bucket_bytes``; none of nothing."""
    count = max(1, round(size / bucket_bytes))
    return [(name, size / count)] * count if size > 0 else []


def exposed(parts: Sequence[float], hidden_s: float) -> float:
    """What remains of communication in parts that overlaps ``hidden_s`` of computation: never less than one part."""
    return max(max(parts, default=0.0), sum(parts) - hidden_s)
