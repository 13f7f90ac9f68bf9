"""The search: the fastest plan that fits, what stands next to it, what cannot be and why.

What is looked through, and why nothing faster is overlooked, stands in ``frontier``. Plans that weft cannot run yet are
variants of the best of each kind (``space.later``); they are told of, never chosen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Unpack

from weft.capture.isolation import seldom_collecting
from weft.capture.profile import Profile
from weft.cluster.topology import Cluster
from weft.errors import MemoryLimitError, PlanError
from weft.estimate import Estimate
from weft.plan import RECOMPUTE, Plan, lowest
from weft.planner import space
from weft.planner.evaluate import Evaluator, StageRow
from weft.planner.explain import explain, remarks, unequal
from weft.planner.fitting import Cut
from weft.planner.frontier import Costed, Frontier, title
from weft.planner.later import Later, later_of
from weft.planner.prices import Cost
from weft.planner.recompute import pruned
from weft.planner.space import Candidate, Constraints, Degrees, Keywords, Refused, everywhere
from weft.planner.spans import candidate_of
from weft.planner.stages import Ends
from weft.quantity import format_bytes

ALTERNATIVES = 5
"""Plans of other kinds that stand next to the choice."""

FAMILIES = 64
"""Choices of degrees up to which each that does not fit is refused by itself; beyond, the kinds of which none fits."""


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
        later: what would be faster once weft can run it, fastest first.
        refused: what was left out and what bound it.
        capture_s, search_s: seconds spent.
        cost: of the plan, where there is a price.
    """

    plan: Plan
    estimate: Estimate
    stages: tuple[StageRow, ...]
    alternatives: tuple[Alternative, ...]
    later: tuple[Later, ...]
    refused: tuple[Refused, ...]
    capture_s: float
    search_s: float
    cost: Cost | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "plan": self.plan.to_json(),
            "estimate": self.estimate.to_json(),
            "alternatives": [{"plan": a.plan.to_json(), "estimate": a.estimate.to_json()} for a in self.alternatives],
            "later": [{"what": x.what, "estimate": x.estimate.to_json(), "lacks": x.lacks} for x in self.later],
            "refused": [r._asdict() for r in self.refused],
            "capture_s": self.capture_s,
            "search_s": self.search_s,
            "cost": None if self.cost is None else self.cost.to_json(),
        }


@seldom_collecting()
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
    free, compiled = constraints.recompute is None, bool(constraints.compile)
    refused: list[Refused] = _one_device(evaluator, constraints) if cluster.devices > 1 else []
    possible, illegal = space.possible(profile, cluster.devices, constraints)
    refused += illegal
    if not possible:
        raise PlanError(_impossible(constraints, refused))
    frontier = Frontier(evaluator, constraints, possible)
    best: list[Costed] = []
    for costed in frontier:
        best.append(_prune(evaluator, costed) if free else costed)
        if len(best) > ALTERNATIVES:
            break
    tight = _without_room(frontier, possible, {costed.candidate.degrees.kind for costed in best})
    if not best:
        raise MemoryLimitError(_too_large(min(tight.values(), key=lambda cut: cut.full.order), cluster))
    refused += [Refused(what, cut.needs) for what, cut in tight.items()]
    best.sort(key=lambda c: c.order)
    chosen, others = best[0], best[1:]
    later = later_of(evaluator, best)
    estimate, stages = evaluator.evaluate(chosen.candidate, chosen.ends)
    plain = chosen.candidate._replace(recompute={}) if free and chosen.candidate.recompute else None
    reasons = explain(
        title=_title(chosen, profile.precision, compiled=compiled),
        estimate=estimate,
        stages=stages,
        cluster=cluster.name,
        batch_size=profile.batch_size,
        alternatives=[(c.title, c.estimate) for c in others],
        refused=refused,
        without_recompute=evaluator.stages.fullest(plain, chosen.ends)[:2] if plain else None,
        notes=[*remarks(profile, chosen.candidate), *_unequal(evaluator, chosen)],
        later=[(x.what, x.estimate, x.lacks) for x in later],
    )

    def made(costed: Costed) -> Plan:
        return as_plan(profile, costed.candidate, costed.ends, compiled=compiled)

    return Choice(
        plan=replace(made(chosen), reasons=reasons),
        estimate=estimate,
        stages=tuple(stages),
        alternatives=tuple(Alternative(made(c), c.estimate) for c in others),
        later=tuple(later),
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
    zero: int = 3,
    shares: Sequence[int] = (),
    recompute: str | None = None,
    compile: bool = False,
) -> Plan:
    """The plan with exactly these degrees and shares, its stages balanced; memory binds only how they are cut.

    ``recompute`` is the mode of every unit; the precision is the profile's.

    Raises:
        PlanError: the model cannot be divided so, or the batch by these shares.
    """
    degrees = Degrees(pp, dp_replicate, dp_shard, tp)
    if reason := space.refuse(profile, degrees, microbatches):
        raise PlanError(f"{degrees.describe()}: {reason}")
    if recompute not in (None, "none", *RECOMPUTE):
        raise PlanError(f"recompute {recompute!r} is unknown; choose from none, {', '.join(RECOMPUTE)}")
    lengths = lowest(shares, degrees.replicas, profile.batch_size, microbatches)
    candidate = Candidate(degrees, microbatches, schedule, everywhere(profile, recompute), zero, shares=lengths)
    return as_plan(profile, candidate, Evaluator(profile, cluster).stages.cut(candidate), compiled=compile)


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
    return Evaluator(profile, cluster).estimate(*candidate_of(plan))


def _prune(evaluator: Evaluator, costed: Costed) -> Costed:
    candidate = pruned(evaluator.stages, costed.candidate, costed.ends)
    if candidate == costed.candidate:
        return costed
    return Costed(candidate, costed.ends, evaluator.estimate(candidate, costed.ends))


def _without_room(frontier: Frontier, possible: list[Degrees], known: set[frozenset[str]]) -> dict[str, Cut]:
    """What does not fit, by its name, and the least it would take: degrees one by one if they are few, else kinds."""
    found: dict[str, Cut] = {}
    if len(possible) <= FAMILIES:
        for degrees in possible:
            if degrees not in frontier.fits and not (least := frontier.least(degrees)).full.fits:
                found[degrees.describe()] = least
        return found
    kinds: dict[frozenset[str], list[Degrees]] = {}
    for degrees in possible:
        kinds.setdefault(degrees.kind, []).append(degrees)
    fitting = {degrees.kind for degrees in frontier.fits} | known
    for kind, members in kinds.items():
        if kind in fitting:
            continue
        members.sort(key=lambda degrees: frontier.fitting.standing(degrees, 3))
        least = frontier.least(members[0])
        for degrees in members[1:]:
            if not least.full.fits and frontier.fitting.standing(degrees, 3) <= 1:
                least = min(least, frontier.least(degrees), key=lambda cut: cut.full.order)
        if not least.full.fits:
            names = " x ".join(name for name in space.DEGREES if name in kind)
            found[f"{names}, at best {least.candidate.degrees.describe()}"] = least
    return found


def _one_device(evaluator: Evaluator, constraints: Constraints) -> list[Refused]:
    """Why one of these devices would not do, if it would not: the first thing one wants to know of a plan for many."""
    one = Constraints(recompute=constraints.recompute, microbatches=constraints.microbatches)
    cluster = evaluator.cluster
    if len(cluster.kinds) > 1:  # of unequal ones the one with most memory
        roomy = max(cluster.nodes, key=lambda nodes: nodes.device.memory_bytes)
        alone = (replace(roomy, count=1, devices=1),)
        evaluator = Evaluator(evaluator.profile, replace(cluster, nodes=alone, links=()))
    least = Frontier(evaluator, one, [Degrees()]).least(Degrees())
    return [] if least.full.fits else [Refused(Degrees().describe(), least.needs)]


def _unequal(evaluator: Evaluator, chosen: Costed) -> list[str]:
    """What shares by speed are worth, where the choice has any."""
    candidate = chosen.candidate
    if not candidate.shares:
        return []
    stages, equal = evaluator.stages, candidate._replace(shares=())
    other = evaluator.estimate(equal, stages.cut(equal))
    return [unequal(stages.layout(candidate).lines, stages.kinds, chosen.estimate, other)]


def _title(chosen: Costed, precision: str, *, compiled: bool) -> str:
    """The plan in a line."""
    extras = ([precision] if precision != "float32" else []) + (["compiled"] if compiled else [])
    return ", ".join([chosen.title, *extras])


def as_plan(profile: Profile, candidate: Candidate, ends: Ends, *, compiled: bool) -> Plan:
    """The plan that a candidate with its stages cut is."""
    names = [call.name for call in profile.calls[:-1]]
    degrees = candidate.degrees
    groups = [group for group in profile.tensor_groups if degrees.tp > 1 and group.divisible_by(degrees.tp)]
    return Plan(
        **{name: getattr(degrees, name) for name in space.DEGREES},
        zero=candidate.zero,
        microbatches=candidate.microbatches,
        schedule=candidate.schedule,
        stages=tuple(tuple(names[start:end]) for start, end in zip((0, *ends), ends, strict=False)),
        tensor={module: style for group in groups for module, style in group.styles},
        batch_size=profile.batch_size,
        recompute=candidate.recompute,
        precision=profile.precision,
        shares=candidate.shares,
        compile=compiled,
    )


def _too_large(least: Cut, cluster: Cluster) -> str:
    whole = -(-int(least.full.bytes) // 2**20)
    if len(cluster.kinds) > 1:
        return (
            f"nothing fits; at best, with {title(least.candidate)}, the fullest device needs {whole}MiB of its "
            f"{format_bytes(least.full.limit)}; give devices more memory or use more of them"
        )
    return (
        f"nothing fits in {format_bytes(cluster.memory_bytes)} per device; the least that would do is {whole}MiB, "
        f"with {title(least.candidate)}; give each device {whole}MiB or use more devices"
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
