"""What the devices of a pipeline do when, under a plan: the timeline that its estimate was read from, in parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from weft.capture.profile import Profile
from weft.cluster.topology import Cluster
from weft.plan import Plan
from weft.planner.evaluate import Evaluator, latest
from weft.planner.space import Candidate, Degrees
from weft.planner.stages import Ends
from weft.planner.work import Event
from weft.schedule import Kind

PARTS = ("forward", "backward", "weight", "recompute", "communication", "optimizer")
"""What a device may do. Between spans it waits for other stages: the bubble."""

PART = {Kind.FORWARD: "forward", Kind.BACKWARD: "backward", Kind.WEIGHT: "weight", Kind.STEP: "optimizer"}


class Span(NamedTuple):
    """A stretch of time in which a device does one of PARTS, in seconds from the beginning of the step;
    ``microbatch`` is -1 where there is none."""

    device: int
    part: str
    microbatch: int
    begin_s: float
    end_s: float


def candidate_of(plan: Plan) -> tuple[Candidate, Ends]:
    """A plan as the search sees it: the candidate, and where each stage's calls end."""
    ends, end = [], 0
    for stage in plan.stages:
        end += len(stage)
        ends.append(end)
    degrees = Degrees(plan.pp, plan.dp_replicate, plan.dp_shard, plan.tp)
    candidate = Candidate(degrees, plan.microbatches, plan.schedule, plan.recompute, plan.zero, shares=plan.shares)
    return candidate, tuple(ends)


def spans(profile: Profile, cluster: Cluster, plan: Plan) -> list[Span]:
    """The timeline of a plan, of the replicas that are done last; its end is the step's.

    What is computed again stands at the beginning of its backward, and communication inside a stage at the end of what
    it belongs to; the runtime does either unit by unit.
    """
    (candidate, ends), evaluator = candidate_of(plan), Evaluator(profile, cluster)
    runs = evaluator.runs(candidate, ends)
    every = evaluator.simulate(candidate, runs, watched=True)
    last = latest(every)
    works = [load.work for load in runs[last].loads]
    plain = [load.work for load in evaluator.runs(candidate._replace(recompute={}), ends)[last].loads]

    def parts(event: Event) -> Iterator[tuple[str, float]]:
        """What an event consists of, with its seconds."""
        kind, seconds = event.action.kind, event.end_s - event.begin_s
        if kind is Kind.STEP:
            gathering = min(runs[last].loads[event.device].whole_s, seconds)
            yield PART[kind], seconds - gathering
            yield "communication", gathering
            return
        if kind not in PART:
            yield "communication", seconds
            return
        stage = event.device + event.action.chunk * plan.pp
        work = works[stage].work(kind)
        computing = max(0.0, seconds - work.collective_s - work.sending_s)
        again = max(0.0, work.compute_s - plain[stage].work(kind).compute_s)
        again *= computing / work.compute_s if work.compute_s else 0.0
        yield "recompute", again
        yield PART[kind], computing - again
        yield "communication", seconds - computing

    found = []
    for event in every[last][1]:
        begin = event.begin_s
        for part, seconds in parts(event):
            if seconds > 0:
                found.append(Span(event.device, part, event.action.microbatch, begin, begin + seconds))
            begin += seconds
    return found
