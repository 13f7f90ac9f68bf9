"""The search where nothing is trained: the plan that is best at an objective, and what stands next to it.

    throughput  the most tokens, or predictions, in a second: the batch that is done first
    latency     the least time from token to token, or of a prediction
    memory      the fastest batch among the plans whose fullest device needs least
    cost        at a price, the number of devices on which a token, or a prediction, is cheapest

All degrees and numbers of groups are looked at, best first (``ranking``). Sharded copies are looked at where they are
asked for, or where nothing else fits: they gather all weights for every token.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any, Unpack

from weft.capture.isolation import seldom_collecting
from weft.capture.profile import Generation, Profile
from weft.cluster.topology import Cluster
from weft.errors import MemoryLimitError, PlanError
from weft.estimate import InferenceEstimate
from weft.plan import Plan
from weft.planner import space
from weft.planner.answers import Answer, answer
from weft.planner.forwards import Forwards, Task
from weft.planner.objectives import sizes_of
from weft.planner.prices import Cost
from weft.planner.ranking import Search, Weighed, candidates
from weft.planner.search import as_plan
from weft.planner.space import Candidate, Constraints, Degrees, Keywords, Refused
from weft.planner.stages import Ends
from weft.quantity import format_bytes

INFERENCE_OBJECTIVES = ("throughput", "latency", "memory", "cost")

ALTERNATIVES = 5
"""Plans of other kinds that stand next to the choice."""

NOT_HERE = {"schedule": "1f1b or gpipe", "recompute": "what a backward computes again", "zero": "what dp_shard shards"}
"""What may be fixed of a plan for training only."""


@dataclass(frozen=True, kw_only=True)
class InferenceChoice:
    """What a search found.

    Attributes:
        plan: the best that fits.
        estimate: of it.
        alternatives: the best of other kinds, best first.
        refused: what was left out and what bound it.
        objective: one of INFERENCE_OBJECTIVES.
        prompt, new_tokens: of each sequence; 0 where none are generated.
        capture_s, search_s: seconds spent.
        cost: of the plan, where there is a price.
    """

    plan: Plan
    estimate: InferenceEstimate
    alternatives: tuple[tuple[Plan, InferenceEstimate], ...]
    refused: tuple[Refused, ...]
    objective: str
    prompt: int
    new_tokens: int
    capture_s: float
    search_s: float
    cost: Cost | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "purpose": "inference",
            "objective": self.objective,
            "request": {"batch": self.plan.batch_size, "prompt": self.prompt, "new_tokens": self.new_tokens},
            "plan": self.plan.to_json(),
            "estimate": self.estimate.to_json(),
            "alternatives": [{"plan": p.to_json(), "estimate": e.to_json()} for p, e in self.alternatives],
            "refused": [r._asdict() for r in self.refused],
            "capture_s": self.capture_s,
            "search_s": self.search_s,
            "cost": None if self.cost is None else self.cost.to_json(),
        }


def choose_inference(
    what: Profile | Generation,
    cluster: Cluster,
    *,
    objective: str | None = None,
    price: float | None = None,
    **keywords: Unpack[Keywords],
) -> InferenceChoice:
    """The plan that is best at an objective.

    Args:
        what: predictions' profile, or what generating costs.
        cluster: to plan for; all its devices are used, but for ``"cost"``.
        objective: one of INFERENCE_OBJECTIVES; None is ``"throughput"``.
        price: of one device for an hour, in any currency. What the plan costs is told with it; ``"cost"`` needs it.
        keywords: degrees, ``microbatches`` (groups in flight) and ``compile`` to keep; ``precision`` must be the
            profile's.

    Raises:
        PlanError: an objective or a price that is none; what is fixed cannot be.
        MemoryLimitError: nothing fits.
    """
    objective = objective or "throughput"
    if objective not in INFERENCE_OBJECTIVES:
        raise PlanError(
            f"objective {objective!r} is unknown for inference; choose from {', '.join(INFERENCE_OBJECTIVES)}"
        )
    if price is not None and not (price > 0 and math.isfinite(price)):
        raise PlanError(f"price must be a positive number, of one device for an hour, got {price!r}")
    if objective != "cost":
        found = search_inference(what, cluster, objective=objective, **keywords)
        return found if price is None else _priced(found, price, [])
    if price is None:
        raise PlanError("objective cost needs a price of one device for an hour; add --price 2.5, or price=2.5")
    sizes: list[tuple[float, int, InferenceChoice]] = []
    refused: MemoryLimitError | PlanError | None = None
    for devices in sizes_of(cluster):
        try:
            found = search_inference(what, cluster.with_devices(devices), objective="cost", **keywords)
        except (MemoryLimitError, PlanError) as error:
            refused = error
        else:
            sizes.append((devices * found.estimate.batch_s, devices, found))
    if not sizes:
        assert refused is not None
        raise refused
    best = min(sizes, key=lambda size: size[:2])
    others = [
        f"  {devices} device{'s' * (devices > 1)}: {_cost(found, price).describe()}, {found.plan.describe()}"
        for _, devices, found in sizes
        if found is not best[2]
    ]
    return _priced(best[2], price, ["On other numbers of devices:", *others] if others else [])


def _cost(choice: InferenceChoice, price: float) -> Cost:
    estimate = choice.estimate
    return Cost(
        devices=estimate.devices,
        price=price,
        step_time_s=estimate.batch_s,
        samples=estimate.samples,
        tokens=estimate.tokens,
        unit="batch",
    )


def _priced(choice: InferenceChoice, price: float, lines: list[str]) -> InferenceChoice:
    cost = _cost(choice, price)
    told = [choice.plan.explain(), "", f"It costs {cost.describe()} at {price:g} for a device and hour.", *lines]
    return replace(choice, plan=replace(choice.plan, reasons="\n".join(told)), cost=cost)


@seldom_collecting()
def search_inference(
    what: Profile | Generation, cluster: Cluster, *, objective: str = "throughput", **keywords: Unpack[Keywords]
) -> InferenceChoice:
    """The best plan that fits, of those that keep what the keywords fix. As ``choose_inference``."""
    began = time.perf_counter()
    constraints, task = Constraints.parse(keywords), Task.of(what)
    _check(constraints, task.first)
    forwards = Forwards(task, cluster)
    every, refused = space.possible(task.first, cluster.devices, constraints)
    if not every:
        reasons = "; ".join(f"{r.what}: {r.reason}" for r in refused[:3])
        raise PlanError(f"no plan with {constraints.describe() or 'these devices'} is possible: {reasons}")
    whole = [degrees for degrees in every if degrees.dp_shard == 1]
    ranked: list[Weighed] = []
    searched: list[Degrees] = []
    for degrees in (every,) if constraints.dp_shard is not None else (whole, [d for d in every if d not in whole]):
        search = Search(forwards, constraints, degrees, objective)
        searched += degrees
        ranked = search.best(ALTERNATIVES + 1)
        if ranked:
            break
    tight = {degrees: least for degrees in searched if not (least := _least(forwards, constraints, degrees)).full.fits}
    if not ranked:
        raise MemoryLimitError(_too_large(min(tight.values(), key=lambda w: w.full.order), cluster))
    alone = _alone(forwards, constraints) if cluster.devices > 1 else None
    refused = [
        *([] if alone is None or alone.full.fits else [Refused("one device", _needs(alone))]),
        *(Refused(degrees.describe(), _needs(least)) for degrees, least in tight.items()),
        *refused,
    ]
    chosen, compiled = ranked[0], bool(constraints.compile)
    assert chosen.estimate is not None
    generation = task.generation
    reasons = answer(
        Answer(
            titles=[weighed.title for weighed in ranked],
            estimates=[w.estimate for w in ranked if w.estimate is not None],
            kinds=[weighed.candidate.degrees.kind for weighed in ranked],
            names=[names(task.first, chosen.ends, stage) for stage in range(len(chosen.ends))],
            limits=[r.held.limit for r in forwards.holder.rooms(chosen.candidate, chosen.ends)],
            cluster=cluster.name,
            objective=objective,
            fits_one=alone is None or alone.full.fits,
            one=None if alone is None or not alone.full.fits else _one(forwards, constraints, objective),
            fixed=constraints.describe(),
            refused=refused,
            prompt=0 if generation is None else generation.prompt,
            new_tokens=0 if generation is None else generation.new_tokens,
        )
    )

    def made(weighed: Weighed) -> Plan:
        return as_plan(task.first, weighed.candidate, weighed.ends, compiled=compiled)

    return InferenceChoice(
        plan=replace(made(chosen), reasons=reasons),
        estimate=chosen.estimate,
        alternatives=tuple((made(w), w.estimate) for w in ranked[1:] if w.estimate is not None),
        refused=tuple(refused),
        objective=objective,
        prompt=0 if generation is None else generation.prompt,
        new_tokens=0 if generation is None else generation.new_tokens,
        capture_s=task.first.capture_s,
        search_s=time.perf_counter() - began,
    )


def estimate_inference(what: Profile | Generation, cluster: Cluster, plan: Plan) -> InferenceEstimate:
    """What a plan will do, whoever made it.

    Raises:
        PlanError: it is not a plan of this model, or needs more devices than there are.
    """
    task = Task.of(what)
    names = [call.name for call in task.first.calls[:-1]]
    if plan.devices > cluster.devices:
        raise PlanError(f"the plan needs {plan.devices} devices ({plan.describe()}), the cluster has {cluster.devices}")
    if [name for stage in plan.stages for name in stage] != names:
        raise PlanError("the plan's stages do not hold this model's calls in their order; make it again, `weft plan`")
    task = replace(task, first=replace(task.first, batch_size=plan.batch_size))
    degrees = Degrees(plan.pp, plan.dp_replicate, plan.dp_shard, plan.tp)
    candidate = Candidate(degrees, plan.microbatches, "gpipe", shares=plan.shares)
    ends = tuple(sum(map(len, plan.stages[: stage + 1])) for stage in range(plan.pp))
    return Forwards(task, cluster).estimate(candidate, ends)


def names(profile: Profile, ends: Ends, stage: int) -> list[str]:
    """Names of the calls of a stage."""
    return [call.name for call in profile.calls[ends[stage - 1] if stage else 0 : ends[stage]]]


def _check(constraints: Constraints, profile: Profile) -> None:
    for name, meaning in NOT_HERE.items():
        if getattr(constraints, name) is not None:
            raise PlanError(f"{name} is for training ({meaning}); leave it out of a plan for inference")
    if constraints.precision not in (None, profile.precision):
        raise PlanError(
            f"precision {constraints.precision} was asked for but the profile is of {profile.precision}; capture the "
            f"workload with precision={constraints.precision!r}"
        )


def _least(forwards: Forwards, constraints: Constraints, degrees: Degrees) -> Weighed:
    """The candidate of some degrees that needs least: with the most groups, of the fewest sequences each."""
    return Search(forwards, constraints, [], "throughput").cut(candidates(forwards, degrees, constraints)[-1])


def _alone(forwards: Forwards, constraints: Constraints) -> Weighed:
    """All of it on one device, in the least memory."""
    return _least(_on_one(forwards), Constraints(microbatches=constraints.microbatches), Degrees())


def _one(forwards: Forwards, constraints: Constraints, objective: str) -> InferenceEstimate | None:
    """The best that one device does by itself; None if it cannot hold what is asked of it."""
    found = Search(_on_one(forwards), Constraints(microbatches=constraints.microbatches), [Degrees()], objective)
    return next((weighed.estimate for weighed in found), None)


def _on_one(forwards: Forwards) -> Forwards:
    """The same task on one device, of unequal ones on that with most memory."""
    cluster = forwards.cluster
    roomy = max(cluster.nodes, key=lambda nodes: nodes.device.memory_bytes)
    return Forwards(forwards.task, replace(cluster, nodes=(replace(roomy, count=1, devices=1),), links=()))


def _needs(weighed: Weighed) -> str:
    return f"needs {format_bytes(weighed.full.bytes)} of {format_bytes(weighed.full.limit)}"


def _too_large(least: Weighed, cluster: Cluster) -> str:
    whole = -(-int(least.full.bytes) // 2**20)
    return (
        f"nothing fits in {format_bytes(least.full.limit)} per device; the least that would do is {whole}MiB, with "
        f"{least.title}; give each device {whole}MiB, use more devices, or fewer sequences at once (--batch)"
    )
