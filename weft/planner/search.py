"""The search: every legal candidate is costed, the fastest that fits is chosen.

Exhaustive over degrees, microbatch counts (divisors of a replica's batch and powers of two) and schedules; stages are
cut by exact dynamic programming (balance). What does not fit is tried again with recomputation, unless that is fixed.
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
from weft.plan import RECOMPUTE, Plan
from weft.planner import space
from weft.planner.evaluate import Evaluator, StageRow
from weft.planner.explain import explain, remarks
from weft.planner.recompute import pruned, recomputing
from weft.planner.space import Candidate, Constraints, Degrees, Keywords, Refused, everywhere
from weft.planner.stages import Ends
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
        again = ", recomputing" if self.candidate.recompute else ""
        return f"{degrees.describe()}, {count} microbatch{'es' if count > 1 else ''}{schedule}{again}"

    @property
    def order(self) -> tuple[float, float]:
        return self.estimate.step_time_s, self.peak


def search(profile: Profile, cluster: Cluster, **keywords: Unpack[Keywords]) -> Choice:
    """The fastest plan that fits, of those that keep what the keywords fix.

    Args:
        profile: of the workload.
        cluster: to plan for; all its devices are used.
        keywords: degrees, ``microbatches``, ``schedule`` and ``recompute`` to keep; ``precision`` must be the
            profile's.

    Raises:
        PlanError: what is fixed cannot be.
        MemoryLimitError: nothing fits; the message says the least that would do.
    """
    began = time.perf_counter()
    constraints = Constraints.parse(keywords)
    if constraints.precision not in (None, profile.precision):
        raise PlanError(
            f"precision {constraints.precision} was asked for but the profile is of {profile.precision}; capture the "
            f"workload with precision={constraints.precision!r}"
        )
    evaluator = Evaluator(profile, cluster)
    free = constraints.recompute is None
    compiled = bool(constraints.compile)
    refused: list[Refused] = _one_device(evaluator, constraints) if cluster.devices > 1 else []
    best: list[_Costed] = []
    smallest: list[_Costed] = []
    for degrees in space.products(cluster.devices, constraints):
        if reason := space.refuse(profile, degrees, constraints.microbatches):
            refused.append(Refused(degrees.describe(), reason))
            continue
        costed = [
            _cost(evaluator, candidate, free=free) for candidate in space.candidates(profile, degrees, constraints)
        ]
        fitting = [c for c in costed if c.peak <= cluster.memory_bytes]
        fitting = _whole_batches(profile, fitting)
        least = min(costed, key=lambda c: c.peak)
        smallest.append(least)
        if fitting:
            best.append(min(fitting, key=lambda c: c.order))
        else:
            refused.append(Refused(degrees.describe(), f"needs {_needs(least, cluster)}"))
    if not smallest:
        raise PlanError(_impossible(constraints, refused))
    if not best:
        raise MemoryLimitError(_too_large(min(smallest, key=lambda c: c.peak), cluster))
    if free:
        best = [_prune(evaluator, costed) for costed in best]
    best.sort(key=lambda c: c.order)
    chosen, others = best[0], _different(best[1:])
    estimate, stages = evaluator.evaluate(chosen.candidate, chosen.ends)
    without = chosen.candidate._replace(recompute={})
    reasons = explain(
        title=_title(chosen, profile.precision, compiled=compiled),
        estimate=estimate,
        stages=stages,
        memory_bytes=cluster.memory_bytes,
        cluster=cluster.name,
        batch_size=profile.batch_size,
        alternatives=[(c.title, c.estimate) for c in others],
        refused=refused,
        without_recompute=max(evaluator.stages.peaks(without, chosen.ends))
        if free and chosen.candidate.recompute
        else None,
        notes=remarks(profile, chosen.candidate),
    )

    def made(costed: _Costed) -> Plan:
        return _plan(profile, costed.candidate, costed.ends, compiled=compiled)

    return Choice(
        plan=replace(made(chosen), reasons=reasons),
        estimate=estimate,
        stages=tuple(stages),
        alternatives=tuple(Alternative(made(c), c.estimate) for c in others),
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
    recompute: str | None = None,
    compile: bool = False,
) -> Plan:
    """The plan with exactly these degrees, its stages balanced; memory binds only how they are cut.

    ``recompute`` is the mode of every unit; the precision is the profile's.

    Raises:
        PlanError: the model cannot be divided so.
    """
    degrees = Degrees(pp, dp_replicate, dp_shard, tp)
    if reason := space.refuse(profile, degrees, microbatches):
        raise PlanError(f"{degrees.describe()}: {reason}")
    if recompute not in (None, "none", *RECOMPUTE):
        raise PlanError(f"recompute {recompute!r} is unknown; choose from none, {', '.join(RECOMPUTE)}")
    candidate = Candidate(degrees, microbatches, schedule, everywhere(profile, recompute))
    return _plan(profile, candidate, Evaluator(profile, cluster).stages.cut(candidate), compiled=compile)


def estimate(profile: Profile, cluster: Cluster, plan: Plan) -> Estimate:
    """What a plan will cost, whoever made it.

    Raises:
        PlanError: it is not a plan of this workload, or needs more devices than there are.
    """
    if plan.devices > cluster.devices:
        raise PlanError(f"the plan needs {plan.devices} devices ({plan.describe()}), the cluster has {cluster.devices}")
    if plan.batch_size != profile.batch_size:
        raise PlanError(f"the plan is for a batch of {plan.batch_size} samples, the workload has {profile.batch_size}")
    if plan.precision != profile.precision:
        raise PlanError(
            f"the plan is in {plan.precision} but the profile is of {profile.precision}; capture the workload with "
            f"precision={plan.precision!r}"
        )
    names = [call.name for call in profile.calls[:-1]]
    placed = [name for stage in plan.stages for name in stage]
    if placed != names:
        raise PlanError(_misplaced(placed, names))
    degrees = Degrees(plan.pp, plan.dp_replicate, plan.dp_shard, plan.tp)
    ends, end = [], 0
    for stage in plan.stages:
        end += len(stage)
        ends.append(end)
    candidate = Candidate(degrees, plan.microbatches, plan.schedule, plan.recompute)
    return Evaluator(profile, cluster).estimate(candidate, tuple(ends))


def _cost(evaluator: Evaluator, candidate: Candidate, *, free: bool) -> _Costed:
    """The candidate as it is, or where that does not fit and is free to be, with as much recomputation as it takes."""

    def costed(candidate: Candidate, ends: Ends) -> _Costed:
        return _Costed(candidate, ends, evaluator.estimate(candidate, ends))

    stages, memory = evaluator.stages, evaluator.cluster.memory_bytes
    ends = stages.cut(candidate)
    found = costed(candidate, ends)
    if not free or (found.peak <= memory and ends == stages.fastest(candidate)):
        return found
    # The stages as they would be with memory for everything, and as they can be with everything recomputed.
    full = candidate._replace(recompute=everywhere(evaluator.profile, "full"))
    options = [found]
    for cut in dict.fromkeys([stages.fastest(candidate), stages.cut(full)]):
        options.append(costed(recomputing(stages, candidate, cut), cut))
    fitting = [option for option in options if option.peak <= memory]
    return min(fitting, key=lambda c: c.order) if fitting else min(options, key=lambda c: c.peak)


def _whole_batches(profile: Profile, fitting: list[_Costed]) -> list[_Costed]:
    """Plans that do not cut the batch, where cutting would change the statistics taken over it and no pipeline asks
    for it; all of them if there is none."""
    whole = [c for c in fitting if c.candidate.microbatches == 1 and c.candidate.degrees.pp == 1]
    return whole if profile.batch_statistics and whole else fitting


def _prune(evaluator: Evaluator, costed: _Costed) -> _Costed:
    candidate = pruned(evaluator.stages, costed.candidate, costed.ends)
    if candidate == costed.candidate:
        return costed
    return _Costed(candidate, costed.ends, evaluator.estimate(candidate, costed.ends))


def _one_device(evaluator: Evaluator, constraints: Constraints) -> list[Refused]:
    """Why one of these devices would not do, if it would not: the first thing one wants to know of a plan for many."""
    mode = constraints.recompute
    candidates = space.candidates(evaluator.profile, Degrees(), Constraints(recompute=mode))
    least = min((_cost(evaluator, c, free=mode is None) for c in candidates), key=lambda c: c.peak)
    if least.peak <= evaluator.cluster.memory_bytes:
        return []
    return [Refused(Degrees().describe(), f"needs {_needs(least, evaluator.cluster)}")]


def _title(chosen: _Costed, precision: str, *, compiled: bool) -> str:
    """The plan in a line."""
    extras = ([precision] if precision != "float32" else []) + (["compiled"] if compiled else [])
    return ", ".join([chosen.title, *extras])


def _plan(profile: Profile, candidate: Candidate, ends: Ends, *, compiled: bool) -> Plan:
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
        recompute=candidate.recompute,
        precision=profile.precision,
        compile=compiled,
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


def _needs(least: _Costed, cluster: Cluster) -> str:
    again = " with recomputation" if least.candidate.recompute else ""
    return f"{format_bytes(least.peak)} of {format_bytes(cluster.memory_bytes)}{again}"


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
