"""What a plan costs where nothing is trained: forwards alone, of batches to predict or of tokens one by one.

    first   a forward of a group of samples, or of their prompts                    Evaluator.runs, its forwards
    then    a forward of one more token for each sequence, which reads the cache    likewise, of the decode profile
    batch   all groups through ``first`` and through every ``then``                 rounds.simulate
    memory  weights + cache + activations + buffers + slack                         Holder.held

The calls of a step of decoding are on the stages where those of the prompts are, by their names: of an encoder-decoder
they are the decoder's alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from weft.capture.profile import Generation, Profile
from weft.cluster.topology import Cluster
from weft.estimate import InferenceEstimate
from weft.planner import balance
from weft.planner.communication import transfer_s
from weft.planner.eager import forward_s
from weft.planner.evaluate import Evaluator, Run
from weft.planner.holder import Holder
from weft.planner.rounds import Ended, Lap, Pipe, least_s, least_token_s, simulate
from weft.planner.sites import Site, at
from weft.planner.space import Candidate
from weft.planner.stages import Ends
from weft.planner.system import INFERENCE

ID_BYTES = 8.0
"""Of a token's number, as the last stage sends it to the others."""


@dataclass(frozen=True)
class Task:
    """What is computed: batches of a profile, or what a Generation says."""

    first: Profile
    generation: Generation | None = None

    @classmethod
    def of(cls, what: Profile | Generation) -> Task:
        """The task that a profile or a Generation is."""
        return cls(what.prefill, what) if isinstance(what, Generation) else cls(what)

    @property
    def rounds(self) -> int:
        """Forwards of each sample: one, or one for each new token."""
        return self.generation.new_tokens if self.generation is not None else 1

    @property
    def then(self) -> Profile | None:
        """The profile of a step of decoding, where there are any."""
        return self.generation.decode if self.generation is not None and self.rounds > 1 else None


class Forwards:
    """Costs of any candidate for one task on one cluster; what candidates share is worked out once."""

    def __init__(self, task: Task, cluster: Cluster) -> None:
        self.task, self.cluster = task, cluster
        self.first = Evaluator(task.first, cluster, INFERENCE)
        self.then = Evaluator(task.then, cluster, INFERENCE) if task.then is not None else None
        later = self.then.stages if self.then is not None else None
        self.holder = Holder(self.first.stages, later, task.generation)
        self._pipes: dict[object, list[Pipe]] = {}
        self._rows: dict[object, tuple[list[float], list[float]]] = {}
        self._cuts: dict[object, Ends] = {}

    # -- cutting ------------------------------------------------------------------------------------------------------

    def cut(self, candidate: Candidate) -> Ends:
        """Where each stage ends: balanced by the time of a whole batch, and by memory too if that does not fit."""
        rows = [self._row(candidate, stage) for stage in range(candidate.degrees.pp)]
        rows = rows[:1] if len(set(rows)) == 1 else rows
        key = tuple(rows), candidate.stages
        if key not in self._cuts:
            found = balance.ends(rows, candidate.stages)
            assert found is not None, "more stages than calls were refused before"
            self._cuts[key] = tuple(found)
        fastest = self._cuts[key]
        if candidate.stages == 1 or all(room.held.fits for room in self.holder.rooms(candidate, fastest)):
            return fastest

        def allowed(stage: int, start: int, end: int) -> bool:
            end = len(self.task.first.calls) if end == len(rows[0]) else end
            return self.holder.room(candidate, stage, (start, end)).held.fits

        return tuple(balance.packed(rows, candidate.stages, allowed) or fastest)

    def _row(self, candidate: Candidate, stage: int) -> tuple[float, ...]:
        """Seconds of every call of a batch on the slowest devices of a stage, LOSS with the last."""
        stages = self.first.stages
        site = stages.slowest(candidate, at(stages.layout(candidate).sites, stage))
        row = [own / site.speed for own in self._seconds(candidate, site)[0]]
        return (*row[:-2], sum(row[-2:]))

    def floor(self, candidate: Candidate, *, token: bool) -> float:
        """Seconds that a batch takes at least, or where a ``token`` is asked for from token to token, before its stages
        are cut: a group goes through all of them, and the slowest does its part of all groups."""
        stages, pp = self.first.stages, candidate.degrees.pp
        least: list[float] = []
        for line in stages.layout(candidate).lines:
            rows = [self._seconds(candidate, site) for sites in line.sites for site in sites]
            total = sum(min(own) for own in zip(*(row[1] if token else row[0] for row in rows), strict=True))
            share = 1 - 1 / (self.task.rounds - 1) if token and self.task.rounds > 1 else 1
            least.append(max(total, candidate.microbatches * share * total / pp))
        return max(least)

    def _seconds(self, candidate: Candidate, site: Site) -> tuple[list[float], list[float]]:
        """Seconds of every call on a site alone: in all rounds, and in a step of decoding (or the only round)."""
        stages = self.first.stages
        key = (site.kind, stages.division(candidate, site.samples), candidate.degrees)
        if key not in self._rows:
            row = step = stages.row(candidate, site)
            if self.then is not None:
                later = zip(self.then.stages.profile.calls, self.then.stages.row(candidate, site), strict=True)
                seconds = {call.name: own for call, own in later}
                step = [seconds.get(call.name, 0.0) for call in self.task.first.calls]
                row = [a + (self.task.rounds - 1) * b for a, b in zip(row, step, strict=True)]
            self._rows[key] = row, step
        return self._rows[key]

    # -- estimating ---------------------------------------------------------------------------------------------------

    def bound(self, candidate: Candidate, ends: Ends) -> float:
        """Seconds that a batch takes at least."""
        groups, rounds = candidate.microbatches, self.task.rounds
        pipes = self._lines(candidate, ends)
        least = max(least_s(pipe, groups, rounds) for pipe in pipes)
        if self.cluster.cores is not None and len(self.cluster.node_starts) == 1:
            seconds = sum(self._core_seconds(pipe, rounds) for pipe in pipes) * groups
            least = max(least, seconds / self.cluster.cores)
        return least

    def token_bound(self, candidate: Candidate, ends: Ends) -> float:
        """Seconds from token to token at least; of a prediction, or of one token, those of the batch."""
        if self.then is None:
            return self.bound(candidate, ends)
        pipes = self._lines(candidate, ends)
        return max(least_token_s(pipe, candidate.microbatches, self.task.rounds) for pipe in pipes)

    def estimate(self, candidate: Candidate, ends: Ends) -> InferenceEstimate:
        """What a candidate with its stages cut does."""
        groups, rounds, degrees = candidate.microbatches, self.task.rounds, candidate.degrees
        pipes, cores = self._lines(candidate, ends), None
        if self.cluster.cores is not None:
            starts = range(len(self.cluster.node_starts))
            cores = {node: self.cluster.nodes_of(self.cluster.node_starts[node]).cores or 1.0 for node in starts}
        every = simulate(pipes, groups, rounds, cores)
        last = max(range(len(every)), key=lambda line: every[line].end_s)
        ended, batch_s = every[last], every[last].end_s
        rooms = self.holder.rooms(candidate, ends)
        requests = self.holder.requests(candidate, rooms)
        weights = [len(line.replicas) / degrees.replicas for line in self.first.stages.layout(candidate).lines]
        busy = [
            sum(w * (e.spent[s].compute_s + e.spent[s].collective_s) for w, e in zip(weights, every, strict=True))
            for s in range(degrees.pp)
        ]
        generation, first_s = self.task.generation, max(own.first_s for own in every)
        return InferenceEstimate(
            batch_s=batch_s,
            first_token_s=None if generation is None else first_s,
            token_s=(batch_s - first_s) / (rounds - 1) if rounds > 1 else None,
            samples=self.task.first.batch_size,
            tokens=0 if generation is None else generation.new_tokens,
            time=self._terms(candidate, ends, last, ended),
            busy=tuple(seconds / batch_s for seconds in busy),
            memory=tuple(dict(room.held.terms) for room in rooms),
            cache_tokens=None if requests is None or generation is None else int(requests * generation.length),
            cache_requests=None if requests is None else int(requests),
            devices=degrees.devices,
            calibration=self.cluster.calibration,
        )

    def _terms(self, candidate: Candidate, ends: Ends, line: int, ended: Ended) -> dict[str, float]:
        """Seconds of the last stage's device by term of INFERENCE_TIME_TERMS."""
        spent, groups = ended.spent[-1], candidate.microbatches
        tensor = groups * self.first.runs(candidate, ends)[line].loads[-1].tensor_s
        if self.then is not None:
            later = self.then.runs(candidate, self._then_ends(ends))[line].loads[-1].tensor_s
            tensor += groups * (self.task.rounds - 1) * later
        tensor = min(tensor, spent.collective_s)
        return {
            "compute": spent.compute_s,
            "tensor_parallel": tensor,
            "pipeline": spent.transfer_s,
            "data_parallel": spent.collective_s - tensor,
            "bubble": spent.bubble_s,
        }

    def _lines(self, candidate: Candidate, ends: Ends) -> list[Pipe]:
        """Every line of a candidate, ready to be simulated."""
        key = (candidate.degrees, candidate.microbatches, candidate.shares, ends)
        if key not in self._pipes:
            runs = self.first.runs(candidate, ends)
            later = self.then.runs(candidate, self._then_ends(ends)) if self.then is not None else [None] * len(runs)
            self._pipes[key] = [self._pipe(candidate, run, then) for run, then in zip(runs, later, strict=True)]
        return self._pipes[key]

    def _pipe(self, candidate: Candidate, run: Run, then: Run | None) -> Pipe:
        stages, degrees = range(candidate.degrees.pp), candidate.degrees
        kinds, back = self.first.stages.kinds, dict[int, float]()
        own_s = [max(forward_s(kinds[site.kind], degrees.pp) for site in at(run.line.sites, stage)) for stage in stages]
        lap = lap_of(run, own_s)
        later = lap_of(then, own_s) if then is not None else None
        if later is not None and degrees.pp > 1:
            apart, first = degrees.devices // degrees.pp, run.line.replicas[0] * degrees.tp * degrees.cp
            last = (degrees.pp - 1) * apart + first
            size = ID_BYTES * run.line.samples
            back = {
                s: transfer_s(size, self.cluster.link_between(last, s * apart + first, senders=apart))
                for s in stages[:-1]
            }
            link = self.first.stages.mesh(degrees).link("pp")
            busy_s = link.busy_s if link is not None else 0.0
            works = list(later.works)
            for s in stages:  # chosen tokens are messages too
                count = degrees.pp - 1 if s == stages[-1] else 1
                works[s] = works[s]._replace(compute_s=works[s].compute_s + count * busy_s)
            later = later._replace(works=tuple(works))
        places = tuple(
            (load.work.node, load.work.devices, load.work.core_share) for load in run.loads[: candidate.degrees.pp]
        )
        return Pipe(lap, later, back, places)

    def _then_ends(self, ends: Ends) -> Ends:
        """Where the stages end in the calls of a step of decoding, LOSS left out as in ``ends``."""
        assert self.then is not None
        calls = self.task.first.calls
        stage_of = {
            call.name: stage for stage, (start, end) in enumerate(pairwise((0, *ends))) for call in calls[start:end]
        }
        homes = [stage_of[call.name] for call in self.then.stages.profile.calls[:-1]]
        return tuple(sum(home <= stage for home in homes) for stage in range(len(ends)))

    def _core_seconds(self, pipe: Pipe, rounds: int) -> float:
        """Seconds of processor cores that a group takes on a line's devices."""
        later = pipe.then.works if pipe.then is not None else ()
        total = sum(w.compute_s * n * share for w, (_, n, share) in zip(pipe.first.works, pipe.places, strict=True))
        steps = sum(w.compute_s * n * share for w, (_, n, share) in zip(later, pipe.places, strict=False))
        return total + (rounds - 1) * steps


def lap_of(run: Run, more: Sequence[float]) -> Lap:
    """The forwards of a run, each that computes anything with so many seconds more."""
    works = tuple(
        load.work.forward._replace(compute_s=load.work.forward.compute_s + own * (load.work.forward.compute_s > 0))
        for load, own in zip(run.loads, more, strict=True)
    )
    onward: Mapping[tuple[int, int], float] = {pair: s for pair, s in run.transfers.items() if pair in run.flows}
    return Lap(works, onward)
