"""What a device holds where nothing is trained, and how many sequences there is room for.

weights      parameters and buffers of its calls, as ``tp`` and ``dp_shard`` divide them
cache        keys and values of its own layers, of every sequence of its replica at its full length
activations  the largest moment of one forward: nothing is kept from call to call but what is passed on
buffers      tensors on their way from and to other stages, and what is gathered
slack        the room that a cache has to grow, libraries' memory, the allocator's share
"""

from __future__ import annotations

from typing import NamedTuple

from weft.capture.profile import NO_GROUP, Generation
from weft.cluster.topology import Device
from weft.inference.room import length_for
from weft.planner.memory import GATHER_COPIES, Held
from weft.planner.sites import Site, at
from weft.planner.space import Candidate
from weft.planner.stages import Ends, Stages, Stretch

SENDS = 2
"""Tensors of a forward that wait to be sent at once, while the next group computes."""


class Room(NamedTuple):
    """What a device holds, and how many sequences it could; None where none of its layers keeps anything."""

    held: Held
    sequences: float | None


class Holder:
    """What devices hold under any candidate.

    Args:
        first: stages of the profile of predictions or prompts.
        then: of a step of decoding.
        generation: what is kept between steps.
    """

    def __init__(self, first: Stages, then: Stages | None, generation: Generation | None) -> None:
        self.first, self.then, self.generation = first, then, generation
        self._known: dict[object, Room] = {}

    def rooms(self, candidate: Candidate, ends: Ends) -> list[Room]:
        """Of every stage's fullest device."""
        return [self.room(candidate, stage, stretch) for stage, stretch in enumerate(self.first.stretches(ends))]

    def room(self, candidate: Candidate, stage: int, stretch: Stretch) -> Room:
        """Of the fullest device of a stage with this stretch of calls."""
        sites = at(self.first.layout(candidate).sites, stage)
        every = [self._room(candidate, stretch, site) for site in sites]
        fullest = max(every, key=lambda room: room.held.order)
        return fullest._replace(sequences=min((r.sequences for r in every if r.sequences is not None), default=None))

    def requests(self, candidate: Candidate, rooms: list[Room]) -> float | None:
        """Sequences of full length that all replicas have room for; None where nothing is kept."""
        own = [room.sequences for room in rooms if room.sequences is not None]
        return candidate.degrees.replicas * max(0.0, min(own)) if own else None

    def cache_bytes(self, stretch: Stretch, tp: int) -> float:
        """Bytes that a device with this stretch keeps of a sequence of full length."""
        generation = self.generation
        if generation is None:
            return 0.0
        profile = self.first.profile
        units, groups = {call.unit for call in profile.calls[slice(*stretch)]}, profile.tensor_groups
        return sum(
            kept.bytes(generation.prompt, generation.length)
            / (tp if kept.group != NO_GROUP and groups[kept.group].divisible_by(tp) else 1)
            for kept in generation.kept
            if kept.unit in units
        )

    def _room(self, candidate: Candidate, stretch: Stretch, site: Site) -> Room:
        degrees = candidate.degrees
        key = (stretch, site, degrees.tp, degrees.dp_shard, degrees.cp, candidate.zero)
        if key not in self._known:
            self._known[key] = self._found(candidate, stretch, site)
        return self._known[key]

    def _found(self, candidate: Candidate, stretch: Stretch, site: Site) -> Room:
        stages, degrees = self.first, candidate.degrees
        device: Device = stages.kinds[site.kind]
        holding = stages.holding(degrees, [stretch])
        weights = holding.trainable_shard + holding.frozen_shard
        calls = stages.profile.calls[slice(*stretch)]
        work = [call.workspace_bytes for call in stages.calls(candidate, *stretch, site)]
        if self.then is not None:
            names = {call.name for call in calls}
            steps = [i for i, call in enumerate(self.then.profile.calls) if call.name in names]
            work += [self.then.calls(candidate, i, i + 1, site)[0].workspace_bytes for i in steps]
        arriving, leaving = stages.crossing_bytes(candidate, stretch, site)
        inside = max((self._output_bytes(candidate, i, site) for i in range(*stretch)), default=0.0)
        buffers = arriving + SENDS * leaving + stages.profile.sample_bytes * site.batch
        if stages.shards(degrees) > 1:
            buffers += GATHER_COPIES * max(holding.units.values(), default=0.0)
        own, spare = self.cache_bytes(stretch, degrees.tp), spare_share(self.generation)
        terms = {
            "weights": weights,
            "cache": own * site.batch,
            "activations": max(work, default=0.0) + inside,
            "buffers": buffers,
        }
        room = spare * terms["cache"]
        asked = sum(terms.values()) + room
        slack = room + device.reserved_bytes + device.allocator_share * asked
        held = Held(asked - room + slack, device.memory_bytes, {**terms, "slack": slack})
        if not own:
            return Room(held, None)
        free = (device.memory_bytes - device.reserved_bytes) / (1 + device.allocator_share)
        return Room(held, (free - (asked - room - terms["cache"])) / (own * (1 + spare)))

    def _output_bytes(self, candidate: Candidate, call: int, site: Site) -> float:
        """What a call gives to the next, which it is given while that runs."""
        outputs = range(len(self.first.profile.calls[call].outputs))
        return sum(self.first.output_bytes(call, leaf, candidate, site.samples) for leaf in outputs)


def spare_share(generation: Generation | None) -> float:
    """Room that a cache's buffers have at the end, as a share of what is kept in them."""
    if generation is None:
        return 0.0
    length = length_for(1 if generation.encodes else generation.prompt)
    while length < generation.length:
        length = length_for(length + 1)
    return length / generation.length - 1
