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
from weft.planner.exchange import call_s
from weft.planner.holdings import Holding, Holdings
from weft.planner.memory import Footprint, Held, alive, footprint
from weft.planner.sites import Layout, Layouts, Site, at
from weft.planner.space import Candidate, Degrees
from weft.planner.system import WEFT, System

Ends = tuple[int, ...]
Stretch = tuple[int, int]

NEARLY = 1.1
"""How much more than its memory every stage of a cut needs where none can be changed to fit."""

FEWER_LATER = ("gpipe", "1f1b")
"""Schedules under which no stage keeps more microbatches than the one before."""

EVEN = 64
"""Calls times stages up to which a cut that memory asks for is as even as it can be beside its slowest stage."""


class Stages:
    """Stages of any candidate for one profile on one cluster; what candidates share is worked out once.

    Attributes:
        kinds: of devices, as sites number them.
        layouts: where candidates run.
        holdings: what stretches of calls hold.
        readers: (call, leaf, reader) for every output that a later call reads.
        item_bytes: of an element of a trainable parameter, on average.
    """

    def __init__(self, profile: Profile, cluster: Cluster, system: System = WEFT) -> None:
        self.profile, self.cluster, self.system = profile, cluster, system
        self.kinds = cluster.kinds
        self.layouts = Layouts(profile.batch_size, cluster)
        self._calls = [CallCosts(profile, kind, system) for kind in self.kinds]
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
        self._units = [call.unit for call in profile.calls]
        self._modes: tuple[Mapping[str, str] | None, tuple[str | None, ...] | None] = None, None  # asked for last
        self._tables: dict[tuple[int, Division, str | None], list[CallCost]] = {}
        self._shares: dict[tuple[Degrees, int], tuple[int, ...]] = {}
        self._rows_of: dict[tuple[object, ...], list[float]] = {}
        self._seconds: dict[tuple[int, Division], float] = {}
        self._footprints: dict[tuple[object, ...], Footprint] = {}
        self._memories: dict[tuple[object, ...], Held] = {}
        self._asked: tuple[Candidate | None, list[list[tuple[Site, object]]]] = None, []
        self._numbers: dict[tuple[int, ...], int] = {}
        self._stretches: dict[Stretch, int] = {}
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

    def content(self, stretch: Stretch, modes: tuple[str | None, ...] | None = None) -> object:
        """What a stretch is made of, and how its calls are recomputed."""
        if stretch not in self._stretches:
            numbers = tuple(self._content[slice(*stretch)])
            self._stretches[stretch] = self._numbers.setdefault(numbers, len(self._numbers))
        return (self._stretches[stretch], modes) if modes else self._stretches[stretch]

    def modes(self, candidate: Candidate, stretch: Stretch) -> tuple[str | None, ...] | None:
        """How the candidate recomputes each call of a stretch; None where it recomputes nothing at all."""
        if not candidate.recompute:
            return None
        mapping, known = candidate.recompute, self._modes[1]
        if self._modes[0] is not mapping:  # most are asked for one stretch only
            self._modes = mapping, None
            return tuple(map(mapping.get, self._units[slice(*stretch)]))
        if known is None:
            known = tuple(map(mapping.get, self._units))
            self._modes = mapping, known
        return known[slice(*stretch)]

    def calls(self, candidate: Candidate, start: int, end: int, site: Site) -> list[CallCost]:
        """Costs of calls ``start`` to ``end`` (exclusive) on a site, as the candidate recomputes them."""
        division = self.division(candidate, site.samples)
        plain = self._table(site.kind, division, None)
        modes = self.modes(candidate, (start, end))
        if modes is None:
            return plain[start:end]
        return [self._table(site.kind, division, mode)[i] for i, mode in enumerate(modes, start)]

    def _table(self, kind: int, division: Division, mode: str | None) -> list[CallCost]:
        key = (kind, division, mode)
        if key not in self._tables:
            self._tables[key] = [self._calls[kind].of(i, division, mode) for i in range(len(self.profile.calls))]
        return self._tables[key]

    def division(self, candidate: Candidate, samples: int) -> Division:
        """What part of every call a rank computes."""
        degrees = candidate.degrees
        return Division(samples, degrees.tp, candidate.sequence and degrees.tp > 1, *degrees[4:])

    # -- sites --------------------------------------------------------------------------------------------------------

    def layout(self, candidate: Candidate) -> Layout:
        """Where it runs."""
        return self.layouts.of(candidate)

    def with_shares(self, candidate: Candidate) -> Candidate:
        """The candidate with shares in proportion to the speed of its replicas."""
        key = (candidate.degrees, candidate.microbatches)
        if key not in self._shares:
            site = self.layout(candidate).sites[0][0]
            seconds = [self._alone_s(candidate, site._replace(kind=kind)) for kind in range(len(self.kinds))]
            self._shares[key] = self.layouts.shares(candidate, seconds)
        return candidate._replace(shares=self._shares[key])

    def slowest(self, candidate: Candidate, sites: Sequence[Site]) -> Site:
        """Of the sites of a stage the one that is slowest at the whole model."""
        if len(sites) == 1:
            return sites[0]
        return max(sites, key=lambda site: self._alone_s(candidate, site) / site.speed)

    def _alone_s(self, candidate: Candidate, site: Site) -> float:
        """Seconds of the whole model on a site, where nothing is recomputed and cores are free."""
        key = (site.kind, self.division(candidate, site.samples))
        if key not in self._seconds:
            self._seconds[key] = sum(self.row(candidate._replace(recompute={}), site))
        return self._seconds[key]

    def row(self, candidate: Candidate, site: Site) -> list[float]:
        """Seconds of every call on a site."""
        everything = 0, len(self.profile.calls)
        key = (site.kind, self.division(candidate, site.samples), self.modes(candidate, everything))
        if key not in self._rows_of:
            calls, mesh = self.calls(candidate, *everything, site), self.mesh(candidate.degrees)
            seconds = {id(call): call_s(call, mesh) for call in {id(call): call for call in calls}.values()}
            self._rows_of[key] = [seconds[id(call)] for call in calls]
        return self._rows_of[key]

    # -- cutting ------------------------------------------------------------------------------------------------------

    def cut(self, candidate: Candidate) -> Ends:
        """Where each stage ends, LOSS left out: balanced by time, and by memory too if the fastest cut does not fit.

        Of two cuts one gives some stage all that the other gives it: where no stage of the fastest fits, by more than
        what it exchanges at its ends, no cut does.
        """
        fastest = self.fastest(candidate)
        if candidate.stages == 1 or candidate.chunks > 1:
            return fastest
        telling = self.telling(candidate, fastest)
        if all(held.fits for held in telling) or all(held.bytes > NEARLY * held.limit for held in telling):
            return fastest
        rows = self._rows(candidate)

        def allowed(stage: int, start: int, end: int) -> bool:
            end = len(self.profile.calls) if end == len(rows[0]) else end
            return self.memory(candidate, stage, [(start, end)]).fits

        by_memory = balance.ends if len(rows[0]) * candidate.stages <= EVEN else balance.packed
        return tuple(by_memory(rows, candidate.stages, allowed) or fastest)

    def fastest(self, candidate: Candidate) -> Ends:
        """Where each stage ends, balanced by time alone."""
        again = self.modes(candidate, (0, len(self.profile.calls)))
        paces = tuple(
            (site.kind, site.speed, self.division(candidate, site.samples)) for site in self._paces(candidate)
        )
        key = (candidate.stages, paces, again)
        if key not in self._cuts:
            fastest = balance.ends(self._rows(candidate), candidate.stages)
            assert fastest is not None, "more stages than calls were refused before"
            self._cuts[key] = tuple(fastest)
        return self._cuts[key]

    def _paces(self, candidate: Candidate) -> list[Site]:
        """The slowest site of every stage, or the one of all."""
        return [self.slowest(candidate, sites) for sites in self.layout(candidate).sites]

    def _rows(self, candidate: Candidate) -> list[list[float]]:
        """Seconds of every call, LOSS with the last: for each stage, or one row for all of them."""
        known: dict[Site, list[float]] = {}
        for site in (paces := self._paces(candidate)):
            if site not in known:
                row = [seconds / site.speed for seconds in self.row(candidate, site)]
                known[site] = [*row[:-2], sum(row[-2:])]
        if len(known) == 1:
            return list(known.values())
        return [known[at(paces, stage)] for stage in range(candidate.stages)]

    def stretches(self, ends: Ends) -> list[Stretch]:
        """Call numbers of every stage, start and end; LOSS is the last of the last."""
        return list(pairwise((0, *ends[:-1], len(self.profile.calls))))

    def chunks(self, candidate: Candidate, ends: Ends, device: int) -> list[Stretch]:
        """The stretches of one device of a pipeline."""
        return self.stretches(ends)[device :: candidate.degrees.pp]

    def _mesh(self, degrees: Degrees) -> Mesh:
        """The links that the degrees span."""
        return Mesh(self.cluster, degrees, self.shards(degrees))

    def shards(self, degrees: Degrees) -> int:
        """Ranks that a parameter's state is divided over."""
        alone = degrees.dp_replicate == 1 and self.system.context_shards
        return degrees.dp_shard * degrees.cp if degrees.dp_shard > 1 or alone else 1

    # -- memory -------------------------------------------------------------------------------------------------------

    def holding(self, degrees: Degrees, stretches: Sequence[Stretch]) -> Holding:
        """The parameters of a device."""
        return self.holdings.joined(stretches, degrees, self.shards(degrees))

    def memory(self, candidate: Candidate, device: int, stretches: Sequence[Stretch]) -> Held:
        """Memory of a device with these stretches as its chunks; of several sites, of the fullest."""
        sites = at(self._sites(candidate), device)
        if len(sites) == 1:
            return self._held(candidate, device, stretches, *sites[0])
        return max((self._held(candidate, device, stretches, *each) for each in sites), key=lambda held: held.order)

    def _sites(self, candidate: Candidate) -> list[list[tuple[Site, object]]]:
        """The sites of every stage, each with what its memory depends on beside the stage; those that were asked for
        last are asked for again and again, with other recomputation."""
        last, degrees = self._asked[0], candidate.degrees
        if last is not candidate and (
            last is None or last.degrees is not degrees or last._replace(recompute=candidate.recompute) != candidate
        ):
            common = candidate.zero, degrees.dp_shard, degrees.dp_replicate > 1
            every: list[list[tuple[Site, object]]] = [
                [(site, (site.kind, site.batch, self.division(candidate, site.samples), common)) for site in sites]
                for sites in self.layout(candidate).sites
            ]
            self._asked = candidate, every
        return self._asked[1]

    def _held(
        self, candidate: Candidate, device: int, stretches: Sequence[Stretch], site: Site, depends: object
    ) -> Held:
        kept = alive(candidate.schedule, device, candidate.degrees.pp, candidate.microbatches, candidate.chunks)
        modes = candidate.recompute
        content = [self.content(stretch, self.modes(candidate, stretch) if modes else None) for stretch in stretches]
        key = (*content, kept, depends)
        if key not in self._memories:
            several, kind = any([of.later for of in kept]), self.kinds[site.kind]
            of_any = (*content, several, depends)
            if of_any not in self._footprints:
                self._footprints[of_any] = self._footprint(candidate, stretches, several, site)
            terms, batch = self._footprints[of_any].terms(kept), self.profile.sample_bytes * site.batch
            terms |= {"buffers": terms["buffers"] + batch, "slack": terms["slack"] + kind.allocator_share * batch}
            self._memories[key] = Held(sum(terms.values()), kind.memory_bytes, terms)
        return self._memories[key]

    def _footprint(self, candidate: Candidate, stretches: Sequence[Stretch], several: bool, site: Site) -> Footprint:
        arriving, leaving = 0.0, []
        for stretch in stretches:
            came, goes = self.crossing_bytes(candidate, stretch, site)
            arriving += came
            leaving.append(goes)
        return footprint(
            [self.calls(candidate, *stretch, site) for stretch in stretches],
            self.holding(candidate.degrees, stretches),
            several=several,
            sharded=self.shards(candidate.degrees) > 1,
            copied=candidate.degrees.dp_replicate > 1,
            device=self.kinds[site.kind],
            optimizer_state=self.profile.optimizer_state_bytes,
            boundary_bytes=2 * (arriving + sum(leaving)),
            kept_output_bytes=leaving,
            zero=candidate.zero,
            system=self.system,
            item_bytes=self.item_bytes,
        )

    def crossing_bytes(self, candidate: Candidate, stretch: Stretch, site: Site) -> tuple[float, float]:
        """Bytes of a microbatch that come to a stretch from calls before it, and that calls after it read."""
        start, end = stretch
        came = {tensor for read in self._read[start:end] for tensor in read if tensor[0] < start}
        goes = {(c, leaf) for c in range(start, end) for leaf, last in self._last[c].items() if last >= end}
        return self._bytes(came, candidate, site), self._bytes(goes, candidate, site)

    def _bytes(self, tensors: set[tuple[int, int]], candidate: Candidate, site: Site) -> float:
        return sum(self.output_bytes(call, leaf, candidate, site.samples) for call, leaf in tensors)

    def output_bytes(self, call: int, leaf: int, candidate: Candidate, samples: int) -> float:
        """Bytes of an output as a rank has it that so many samples of a microbatch come to."""
        division = self.division(candidate, samples)
        own = division.samples / division.cp / (division.tp if division.sequence else 1)
        return self.profile.calls[call].outputs[leaf].bytes.at(own)

    def fullest(self, candidate: Candidate, ends: Ends) -> Held:
        """What the fullest device of a pipeline holds."""
        return max(self.telling(candidate, ends), key=lambda held: held.order)

    def telling(self, candidate: Candidate, ends: Ends) -> list[Held]:
        """What devices of a pipeline hold, the fullest and the emptiest among them: of equal stages, each of which
        keeps no more microbatches than the one before, only the first and the last."""
        stretches, pp = self.stretches(ends), candidate.degrees.pp
        own = [stretches[device::pp] for device in range(pp)]
        devices = list(range(pp))
        if candidate.schedule in FEWER_LATER:
            sites = self._sites(candidate)
            alike = [
                (id(at(sites, device)), self.content(stretch, self.modes(candidate, stretch)))
                for device, (stretch,) in enumerate(own)
            ]
            last = {key: device for device, key in enumerate(alike)}
            first = {key: device for device, key in reversed(list(enumerate(alike)))}
            devices = sorted({*first.values(), *last.values()})
        return [self.memory(candidate, device, own[device]) for device in devices]
