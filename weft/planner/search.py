"""The search: every legal candidate is costed, the fastest that fits is chosen.

Exhaustive over degrees, microbatch counts (divisors of a replica's batch and powers of two) and schedules; stages are
cut by exact dynamic programming (balance). Nothing is pruned yet, so nothing can be lost.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Unpack

from weft.capture.profile import Profile
from weft.cluster.topology import Cluster
from weft.errors import MemoryLimitError, PlanError
from weft.estimate import Estimate
from weft.plan import Plan
from weft.planner import space
from weft.planner.evaluate import Ends, Evaluator, StageRow
from weft.planner.explain import explain
from weft.planner.space import Candidate, Constraints, Degrees, Keywords, Refused
from weft.quantity import format_bytes

ALTERNATIVES = 5


class Alternative(NamedTuple):
    """A plan that was not chosen, and its estimate."""

    plan: Plan
    estimate: Estimate


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a search found.

    Attributes:
        plan: the fastest that fits.
        estimate: of it.
        stages: what each of its stages contributes.
        alternatives: the best of other kinds, fastest first.
        refused: what was left out and what bound it.
        capture_s, search_s: seconds spent.
    """

    plan: Plan
    estimate: Estimate
    stages: tuple[StageRow, ...]
    alternatives: tuple[Alternative, ...]
    refused: tuple[Refused, ...]
    capture_s: float
    search_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "plan": self.plan.to_json(),
            "estimate": self.estimate.to_json(),
            "alternatives": [{"plan": a.plan.to_json(), "estimate": a.estimate.to_json()} for a in self.alternatives],
            "refused": [r._asdict() for r in self.refused],
            "capture_s": self.capture_s,
            "search_s": self.search_s,
        }


class _Costed(NamedTuple):
    candidate: Candidate
    ends: Ends
    estimate: Estimate

    @property
    def peak(self) -> float:
        return max(self.estimate.peak_memory_bytes)

    @property
    def title(self) -> str:
        degrees, count = self.candidate.degrees, self.candidate.microbatches
        schedule = f", {self.candidate.schedule}" if degrees.pp > 1 else ""
        return f"{degrees.describe()}, {count} microbatch{'es' if count > 1 else ''}{schedule}"

    @property
    def order(self) -> tuple[float, float]:
        return self.estimate.step_time_s, self.peak


def search(profile: Profile, cluster: Cluster, **keywords: Unpack[Keywords]) -> Choice:
    """The fastest plan that fits, of those that keep what the keywords fix.

    Args:
        profile: of the workload.
        cluster: to plan for; all its devices are used.
        keywords: degrees, ``microbatches`` and ``schedule`` to keep.

    Raises:
        PlanError: what is fixed cannot be.
        MemoryLimitError: nothing fits; the message says the least that would do.
    """
    began = time.perf_counter()
    constraints = Constraints.parse(keywords)
    evaluator = Evaluator(profile, cluster)
    refused: list[Refused] = _one_device(evaluator) if cluster.devices > 1 else []
    best: list[_Costed] = []
    smallest: list[_Costed] = []
    for degrees in space.products(cluster.devices, constraints):
        if reason := space.refuse(profile, degrees, constraints.microbatches):
            refused.append(Refused(degrees.describe(), reason))
            continue
        costed = [_cost(evaluator, candidate) for candidate in space.candidates(profile, degrees, constraints)]
        fitting = [c for c in costed if c.peak <= cluster.memory_bytes]
        fitting = _whole_batches(profile, fitting)
        least = min(costed, key=lambda c: c.peak)
        smallest.append(least)
        if fitting:
            best.append(min(fitting, key=lambda c: c.order))
        else:
            reason = f"needs {_needs(least.peak, cluster)}"
            refused.append(Refused(degrees.describe(), reason))
    if not smallest:
        raise PlanError(_impossible(constraints, refused))
    if not best:
        raise MemoryLimitError(_too_large(min(smallest, key=lambda c: c.peak), cluster))
    best.sort(key=lambda c: c.order)
    chosen, others = best[0], _different(best[1:])
    estimate, stages = evaluator.evaluate(chosen.candidate, chosen.ends)
    reasons = explain(
        title=chosen.title,
        estimate=estimate,
        stages=stages,
        memory_bytes=cluster.memory_bytes,
        cluster=cluster.name,
        batch_size=profile.batch_size,
        alternatives=[(c.title, c.estimate) for c in others],
        refused=refused,
        notes=_notes(profile, chosen.candidate),
    )
    return Choice(
        plan=replace(_plan(profile, chosen.candidate, chosen.ends), reasons=reasons),
        estimate=estimate,
        stages=tuple(stages),
        alternatives=tuple(Alternative(_plan(profile, c.candidate, c.ends), c.estimate) for c in others),
        refused=tuple(refused),
        capture_s=profile.capture_s,
        search_s=time.perf_counter() - began,
    )


def make_plan(
    profile: Profile,
    cluster: Cluster,
    *,
    pp: int = 1,
    dp_replicate: int = 1,
    dp_shard: int = 1,
    tp: int = 1,
    microbatches: int = 1,
    schedule: str = "1f1b",
) -> Plan:
    """The plan with exactly these degrees, its stages balanced; memory binds only how they are cut.

    Raises:
        PlanError: the model cannot be divided so.
    """
    degrees = Degrees(pp, dp_replicate, dp_shard, tp)
    if reason := space.refuse(profile, degrees, microbatches):
        raise PlanError(f"{degrees.describe()}: {reason}")
    candidate = Candidate(degrees, microbatches, schedule)
    return _plan(profile, candidate, Evaluator(profile, cluster).cut(candidate))


def estimate(profile: Profile, cluster: Cluster, plan: Plan) -> Estimate:
    """What a plan will cost, whoever made it.

    Raises:
        PlanError: it is not a plan of this workload, or needs more devices than there are.
    """
    if plan.devices > cluster.devices:
        raise PlanError(f"the plan needs {plan.devices} devices ({plan.describe()}), the cluster has {cluster.devices}")
    if plan.batch_size != profile.batch_size:
        raise PlanError(f"the plan is for a batch of {plan.batch_size} samples, the workload has {profile.batch_size}")
    names = [call.name for call in profile.calls[:-1]]
    placed = [name for stage in plan.stages for name in stage]
    if placed != names:
        raise PlanError(_misplaced(placed, names))
    degrees = Degrees(plan.pp, plan.dp_replicate, plan.dp_shard, plan.tp)
    ends, end = [], 0
    for stage in plan.stages:
        end += len(stage)
        ends.append(end)
    return Evaluator(profile, cluster).estimate(Candidate(degrees, plan.microbatches, plan.schedule), tuple(ends))


def _cost(evaluator: Evaluator, candidate: Candidate) -> _Costed:
    ends = evaluator.cut(candidate)
    return _Costed(candidate, ends, evaluator.estimate(candidate, ends))


def _whole_batches(profile: Profile, fitting: list[_Costed]) -> list[_Costed]:
    """Plans that do not cut the batch, where cutting would change the statistics taken over it and no pipeline asks
    for it; all of them if there is none."""
    whole = [c for c in fitting if c.candidate.microbatches == 1 and c.candidate.degrees.pp == 1]
    return whole if profile.batch_statistics and whole else fitting


def _notes(profile: Profile, candidate: Candidate) -> list[str]:
    """What the user should know of a plan besides its cost."""
    count = candidate.microbatches
    if not profile.batch_statistics or count == 1:
        return []
    samples = profile.batch_size / count
    return [
        f"The model normalises over the batch: with {count} microbatches it takes its statistics from about "
        f"{samples:.0f} samples at a time, those of one microbatch on all replicas, not from all {profile.batch_size}; "
        "--microbatches 1 takes them from all."
    ]


def _one_device(evaluator: Evaluator) -> list[Refused]:
    """Why one of these devices would not do, if it would not: the first thing one wants to know of a plan for many."""
    candidates = space.candidates(evaluator.profile, Degrees(), Constraints())
    least = min(_cost(evaluator, candidate).peak for candidate in candidates)
    if least <= evaluator.cluster.memory_bytes:
        return []
    return [Refused(Degrees().describe(), f"needs {_needs(least, evaluator.cluster)}")]


def _plan(profile: Profile, candidate: Candidate, ends: Ends) -> Plan:
    names = [call.name for call in profile.calls[:-1]]
    degrees = candidate.degrees
    groups = [group for group in profile.tensor_groups if degrees.tp > 1 and group.divisible_by(degrees.tp)]
    return Plan(
        **degrees._asdict(),
        microbatches=candidate.microbatches,
        schedule=candidate.schedule,
        stages=tuple(tuple(names[start:end]) for start, end in zip((0, *ends), ends, strict=False)),
        tensor={module: style for group in groups for module, style in group.styles},
        batch_size=profile.batch_size,
    )


def _different(costed: Iterable[_Costed]) -> list[_Costed]:
    """The fastest of each other kind first, then others, ALTERNATIVES at most, fastest first."""
    kinds: set[frozenset[str]] = set()
    firsts: list[_Costed] = []
    rest: list[_Costed] = []
    for c in costed:
        (rest if c.candidate.degrees.kind in kinds else firsts).append(c)
        kinds.add(c.candidate.degrees.kind)
    return sorted([*firsts, *rest][:ALTERNATIVES], key=lambda c: c.order)


def _needs(peak: float, cluster: Cluster) -> str:
    return f"{format_bytes(peak)} of {format_bytes(cluster.memory_bytes)}"


def _too_large(least: _Costed, cluster: Cluster) -> str:
    whole = -(-int(least.peak) // 2**20)
    return (
        f"nothing fits in {format_bytes(cluster.memory_bytes)} per device; the least that would do is {whole}MiB, "
        f"with {least.title}; give each device {whole}MiB or use more devices"
    )


def _impossible(constraints: Constraints, refused: list[Refused]) -> str:
    reasons = "; ".join(f"{r.what}: {r.reason}" for r in refused[:3])
    return f"no plan with {constraints.describe() or 'these devices'} is possible: {reasons}"


def _misplaced(placed: list[str], names: list[str]) -> str:
    missing = [name for name in names if name not in placed]
    unknown = [name for name in placed if name not in names]
    what = (
        f"{missing[0]!r} is missing"
        if missing
        else f"{unknown[0]!r} is not a call of it"
        if unknown
        else "they are out of order"
    )
    return (
        f"the plan's stages do not hold this workload's calls in their order: {what}; make the plan again with "
        "`weft plan`"
    )
