"""Stages: a candidate's sequence of calls, cut into consecutive stretches, and what each needs of memory.

A model's blocks repeat, so most stretches are the same again: what a stretch costs and holds is worked out once for its
*content*: the kinds of its calls, their parameters, and where, relative to it, tensors come from and go to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

from weft.capture.profile import Profile
from weft.cluster.topology import Cluster
from weft.planner import balance
from weft.planner.communication import Mesh
from weft.planner.compute import CallCost, CallCosts, Division
from weft.planner.holdings import Holding, Holdings
from weft.planner.memory import Alive, alive, stage_memory
from weft.planner.space import Candidate, Degrees
from weft.planner.system import WEFT, System

Ends = tuple[int, ...]
Stretch = tuple[int, int]

MODES_KEPT = 4096
"""Ways of recomputing that are remembered call by call."""

EVEN = 200
"""Calls times stages up to which a cut that memory asks for is as even as it can be beside its slowest stage."""


class Stages:
    """Stages of any candidate for one profile on one cluster; what candidates share is worked out once.

    Attributes:
        holdings: what stretches of calls hold.
        readers: (call, leaf, reader) for every output that a later call reads.
        item_bytes: of an element of a trainable parameter, on average.
    """

    def __init__(self, profile: Profile, cluster: Cluster, system: System = WEFT) -> None:
        self.profile, self.cluster, self.system = profile, cluster, system
        self._calls = CallCosts(profile, cluster.device, system)
        self.holdings = Holdings(profile)
        self.readers: list[tuple[int, int, int]] = sorted(
            {(source.call, source.leaf, reader) for reader, call in enumerate(profile.calls) for source in call.inputs}
        )
        self._read: list[list[tuple[int, int]]] = [[] for _ in profile.calls]
        self._last: list[dict[int, int]] = [{} for _ in profile.calls]  # the last reader of each output
        for source, leaf, reader in self.readers:
            self._read[reader].append((source, leaf))
            self._last[source][leaf] = max(reader, self._last[source].get(leaf, 0))
        trainable = [p for p in profile.parameters.values() if p.trainable]
        elements = sum(p.elements for p in trainable)
        self.item_bytes = sum(p.bytes for p in trainable) / elements if elements else 4.0
        self._content = self._contents()
        self._modes: dict[int, tuple[Mapping[str, str], tuple[str | None, ...]]] = {}
        self._tables: dict[tuple[Division, str | None], list[CallCost]] = {}
        self._memories: dict[tuple[object, ...], dict[str, float]] = {}
        self._cuts: dict[tuple[object, ...], Ends] = {}
        self.mesh = lru_cache(maxsize=None)(self._mesh)

    def _contents(self) -> list[int]:
        """A number for every call, equal for calls that are alike in all that a stretch of them depends on."""
        numbers: dict[tuple[object, ...], int] = {}
        found = []
        for index, call in enumerate(self.profile.calls):
            own = self.holdings.own(index)
            inputs = tuple(sorted((index - source, leaf) for source, leaf in self._read[index]))
            outputs = tuple(sorted((leaf, last - index) for leaf, last in self._last[index].items()))
            shared = self.holdings.shared_by(index)
            content = (call.kind, own, inputs, outputs, shared and index)
            found.append(numbers.setdefault(content, len(numbers)))
        return found

    def content(self, stretch: Stretch, recompute: object = None) -> tuple[object, ...]:
        """What a stretch is made of."""
        return (*self._content[slice(*stretch)], recompute)

    def modes(self, candidate: Candidate, stretch: Stretch) -> tuple[str | None, ...] | None:
        """How the candidate recomputes each call of a stretch; None where it recomputes nothing at all."""
        if not candidate.recompute:
            return None
        known = self._modes.get(id(candidate.recompute))
        if known is None:
            if len(self._modes) > MODES_KEPT:
                self._modes.clear()
            modes = tuple(candidate.recompute.get(call.unit) for call in self.profile.calls)
            # With the mapping itself, so that no other one gets its identity.
            self._modes[id(candidate.recompute)] = known = candidate.recompute, modes
        return known[1][slice(*stretch)]

    def calls(self, candidate: Candidate, start: int, end: int) -> list[CallCost]:
        """Costs of calls ``start`` to ``end`` (exclusive), as the candidate recomputes them."""
        division = self.division(candidate)
        plain = self._table(division, None)
        modes = self.modes(candidate, (start, end))
        if modes is None:
            return plain[start:end]
        return [self._table(division, mode)[i] for i, mode in enumerate(modes, start)]

    def _table(self, division: Division, mode: str | None) -> list[CallCost]:
        if (division, mode) not in self._tables:
            self._tables[division, mode] = [self._calls.of(i, division, mode) for i in range(len(self.profile.calls))]
        return self._tables[division, mode]

    def division(self, candidate: Candidate) -> Division:
        """What part of every call a rank computes."""
        degrees = candidate.degrees
        return Division(self.samples(candidate), degrees.tp, candidate.sequence and degrees.tp > 1, degrees.cp)

    # -- cutting ------------------------------------------------------------------------------------------------------

    def cut(self, candidate: Candidate) -> Ends:
        """Where each stage ends, LOSS left out: balanced by time, and by memory too if the fastest cut does not fit."""
        fastest = self.fastest(candidate)
        fits = max(self.peaks(candidate, fastest)) <= self.cluster.memory_bytes
        if fits or candidate.stages == 1 or candidate.chunks > 1:
            return fastest
        costs = self._costs(candidate)

        def allowed(stage: int, start: int, end: int) -> bool:
            end = len(self.profile.calls) if end == len(costs) else end
            return sum(self.memory(candidate, stage, [(start, end)]).values()) <= self.cluster.memory_bytes

        by_memory = balance.ends if len(costs) * candidate.stages <= EVEN else balance.packed
        return tuple(by_memory(costs, candidate.stages, allowed) or fastest)

    def fastest(self, candidate: Candidate) -> Ends:
        """Where each stage ends, balanced by time alone."""
        again = tuple(candidate.recompute.items())
        key = (candidate.stages, self.division(candidate), again)
        if key not in self._cuts:
            fastest = balance.ends(self._costs(candidate), candidate.stages)
            assert fastest is not None, "more stages than calls were refused before"
            self._cuts[key] = tuple(fastest)
        return self._cuts[key]

    def _costs(self, candidate: Candidate) -> list[float]:
        """Seconds of every call, LOSS with the last."""
        mesh = self.mesh(candidate.degrees)
        known: dict[int, float] = {}
        costs = []
        for call in self.calls(candidate, 0, len(self.profile.calls)):
            if id(call) not in known:
                known[id(call)] = call_s(call, mesh)
            costs.append(known[id(call)])
        costs[-2:] = [sum(costs[-2:])]
        return costs

    def samples(self, candidate: Candidate) -> int:
        """Samples of the largest microbatch."""
        return -(-self.profile.batch_size // (candidate.degrees.replicas * candidate.microbatches))

    def stretches(self, ends: Ends) -> list[Stretch]:
        """Call numbers of every stage, start and end; LOSS is the last of the last."""
        return list(pairwise((0, *ends[:-1], len(self.profile.calls))))

    def chunks(self, candidate: Candidate, ends: Ends, device: int) -> list[Stretch]:
        """The stretches of one device of a pipeline."""
        return self.stretches(ends)[device :: candidate.degrees.pp]

    def _mesh(self, degrees: Degrees) -> Mesh:
        """The links that the degrees span."""
        return Mesh(self.cluster, **degrees._asdict())

    # -- memory -------------------------------------------------------------------------------------------------------

    def holding(self, degrees: Degrees, stretches: Sequence[Stretch]) -> Holding:
        """The parameters of a device."""
        shards = degrees.dp_shard * degrees.cp if degrees.dp_shard > 1 else 1
        return self.holdings.joined(stretches, degrees.tp, shards)

    def memory(self, candidate: Candidate, device: int, stretches: Sequence[Stretch]) -> dict[str, float]:
        """Memory of a device with these stretches as its chunks."""
        degrees, division = candidate.degrees, self.division(candidate)
        kept = alive(candidate.schedule, device, degrees.pp, candidate.microbatches, candidate.chunks)
        content = tuple(self.content(stretch, self.modes(candidate, stretch)) for stretch in stretches)
        key = (content, kept, division, degrees.dp_shard, degrees.dp_replicate > 1, candidate.zero)
        if key not in self._memories:
            self._memories[key] = self._memory(candidate, stretches, kept)
        known = self._memories[key]
        batch = self.profile.sample_bytes * -(-self.profile.batch_size // degrees.replicas)
        slack = self.cluster.device.allocator_share * batch
        return {**known, "buffers": known["buffers"] + batch, "slack": known["slack"] + slack}

    def _memory(self, candidate: Candidate, stretches: Sequence[Stretch], kept: Sequence[Alive]) -> dict[str, float]:
        arriving, leaving = 0.0, []
        for start, end in stretches:
            came = {tensor for read in self._read[start:end] for tensor in read if tensor[0] < start}
            goes = {(c, leaf) for c in range(start, end) for leaf, last in self._last[c].items() if last >= end}
            arriving += self._bytes(came, candidate)
            leaving.append(self._bytes(goes, candidate))
        return stage_memory(
            [self.calls(candidate, *stretch) for stretch in stretches],
            self.holding(candidate.degrees, stretches),
            alive=kept,
            degrees=candidate.degrees,
            device=self.cluster.device,
            optimizer_state=self.profile.optimizer_state_bytes,
            boundary_bytes=2 * (arriving + sum(leaving)),
            kept_output_bytes=leaving,
            zero=candidate.zero,
            system=self.system,
            item_bytes=self.item_bytes,
        )

    def _bytes(self, tensors: set[tuple[int, int]], candidate: Candidate) -> float:
        return sum(self.output_bytes(call, leaf, candidate) for call, leaf in tensors)

    def output_bytes(self, call: int, leaf: int, candidate: Candidate) -> float:
        """Bytes of an output as a rank of the candidate has it."""
        division = self.division(candidate)
        samples = division.samples / division.cp / (division.tp if division.sequence else 1)
        return self.profile.calls[call].outputs[leaf].bytes.at(samples)

    def peaks(self, candidate: Candidate, ends: Ends) -> list[float]:
        """Bytes of every device of a pipeline at its fullest."""
        devices = range(candidate.degrees.pp)
        return [sum(self.memory(candidate, d, self.chunks(candidate, ends, d)).values()) for d in devices]


def call_s(call: CallCost, mesh: Mesh) -> float:
    """Seconds of a call, forward and backward, with what the ranks that divide it exchange."""
    return call.forward_s + call.backward_s + sum(exchange_s(call, mesh))


def exchange_s(call: CallCost, mesh: Mesh) -> tuple[float, float]:
    """Seconds that the ranks of ``tp`` and ``cp`` exchange in a call, in its forward and in its backward.

    Keys and values go around the ring of ``cp`` once in the forward; in the backward they and their gradients do (Liu
    et al. 2023, ring attention).
    """
    forward, backward = (
        sum(mesh.collective_s("tp", "all_reduce", size) for size in sizes)
        for sizes in (call.forward_reduced, call.backward_reduced)
    )
    ring = mesh.collective_s("cp", "all_gather", call.exchanged_bytes * mesh.ranks("cp"))
    return forward + ring, backward + 2 * ring
