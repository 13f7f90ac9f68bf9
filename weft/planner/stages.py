"""Stages: a candidate's sequence of calls, cut into consecutive stretches, and what each needs of memory."""

from __future__ import annotations

from itertools import pairwise

from weft.capture.profile import Profile
from weft.cluster.topology import Cluster
from weft.planner import balance
from weft.planner.communication import Mesh
from weft.planner.compute import CallCost, CallCosts
from weft.planner.holdings import Holdings
from weft.planner.memory import alive, stage_memory
from weft.planner.space import Candidate, Degrees

Ends = tuple[int, ...]


class Stages:
    """Stages of any candidate for one profile on one cluster; what candidates share is worked out once.

    Attributes:
        holdings: what stretches of calls hold.
        readers: (call, leaf, reader) for every output that a later call reads.
    """

    def __init__(self, profile: Profile, cluster: Cluster) -> None:
        self.profile, self.cluster = profile, cluster
        self._calls = CallCosts(profile, cluster.device)
        self.holdings = Holdings(profile)
        self.readers: list[tuple[int, int, int]] = sorted(
            {(source.call, source.leaf, reader) for reader, call in enumerate(profile.calls) for source in call.inputs}
        )
        self._read: list[list[tuple[int, int]]] = [[] for _ in profile.calls]
        self._last: list[dict[int, int]] = [{} for _ in profile.calls]  # the last reader of each output
        for source, leaf, reader in self.readers:
            self._read[reader].append((source, leaf))
            self._last[source][leaf] = max(reader, self._last[source].get(leaf, 0))

    def calls(self, candidate: Candidate, start: int, end: int) -> list[CallCost]:
        """Costs of calls ``start`` to ``end`` (exclusive), as the candidate recomputes them."""
        samples, tp = self.samples(candidate), candidate.degrees.tp
        names = self.profile.calls
        return [self._calls.of(i, samples, tp, candidate.recompute.get(names[i].unit)) for i in range(start, end)]

    # -- cutting ------------------------------------------------------------------------------------------------------

    def cut(self, candidate: Candidate) -> Ends:
        """Where each stage ends, LOSS left out: balanced by time, and by memory too if the fastest cut does not fit."""
        fastest = self.fastest(candidate)
        if candidate.degrees.pp == 1 or max(self.peaks(candidate, fastest)) <= self.cluster.memory_bytes:
            return fastest
        costs = self._costs(candidate)

        def fits(stage: int, start: int, end: int) -> bool:
            end = len(self.profile.calls) if end == len(costs) else end
            return sum(self.memory(candidate, stage, start, end).values()) <= self.cluster.memory_bytes

        return tuple(balance.ends(costs, candidate.degrees.pp, fits) or fastest)

    def fastest(self, candidate: Candidate) -> Ends:
        """Where each stage ends, balanced by time alone."""
        fastest = balance.ends(self._costs(candidate), candidate.degrees.pp)
        assert fastest is not None, "more stages than calls were refused before"
        return tuple(fastest)

    def _costs(self, candidate: Candidate) -> list[float]:
        """Seconds of every call, LOSS with the last."""
        mesh = self.mesh(candidate.degrees)
        costs = [self._call_s(call, mesh) for call in self.calls(candidate, 0, len(self.profile.calls))]
        costs[-2:] = [sum(costs[-2:])]
        return costs

    @staticmethod
    def _call_s(call: CallCost, mesh: Mesh) -> float:
        reduced = (*call.forward_reduced, *call.backward_reduced)
        return call.forward_s + call.backward_s + sum(mesh.collective_s("tp", "all_reduce", size) for size in reduced)

    def samples(self, candidate: Candidate) -> int:
        """Samples of the largest microbatch."""
        return -(-self.profile.batch_size // (candidate.degrees.replicas * candidate.microbatches))

    def stretches(self, ends: Ends) -> list[tuple[int, int]]:
        """Call numbers of every stage, start and end; LOSS is the last of the last."""
        return list(pairwise((0, *ends[:-1], len(self.profile.calls))))

    def mesh(self, degrees: Degrees) -> Mesh:
        """The links that the degrees span."""
        return Mesh(
            self.cluster, pp=degrees.pp, dp_replicate=degrees.dp_replicate, dp_shard=degrees.dp_shard, tp=degrees.tp
        )

    def memory(self, candidate: Candidate, stage: int, start: int, end: int) -> dict[str, float]:
        """Memory of calls ``start`` to ``end`` as a stage."""
        degrees, samples = candidate.degrees, self.samples(candidate)
        arriving = {tensor for read in self._read[start:end] for tensor in read if tensor[0] < start}
        leaving = {(call, leaf) for call in range(start, end) for leaf, last in self._last[call].items() if last >= end}

        def size(tensors: set[tuple[int, int]]) -> float:
            return sum(self.profile.calls[call].outputs[leaf].bytes.at(samples) for call, leaf in tensors)

        batch = self.profile.sample_bytes * -(-self.profile.batch_size // degrees.replicas)
        return stage_memory(
            self.calls(candidate, start, end),
            self.holdings.of(start, end, degrees.tp, degrees.dp_shard),
            alive=alive(candidate.schedule, stage, degrees.pp, candidate.microbatches),
            degrees=degrees,
            device=self.cluster.device,
            optimizer_state=self.profile.optimizer_state_bytes,
            boundary_bytes=2 * (size(arriving) + size(leaving)) + batch,
            kept_output_bytes=size(leaving),
        )

    def peaks(self, candidate: Candidate, ends: Ends) -> list[float]:
        """Bytes of every stage at its fullest."""
        return [sum(self.memory(candidate, s, *stretch).values()) for s, stretch in enumerate(self.stretches(ends))]
