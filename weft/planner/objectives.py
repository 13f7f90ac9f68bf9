"""What a plan should be best at: the time of a step, the memory of the fullest device, or the cost of a sample.

time      the fastest plan on all devices                                                  search
memory    the least that any plan needs (Frontier.least), and the fastest plan in so much
cost      of a price per device and hour: the fastest plan on one device, on a part of a node, on 1, 2, 4, ... nodes
          and on all of them; the one of these whose price times devices times step time is least
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple, Unpack

from weft.capture.profile import Profile
from weft.cluster.topology import Cluster
from weft.errors import MemoryLimitError, PlanError
from weft.planner.evaluate import Evaluator
from weft.planner.frontier import Frontier
from weft.planner.prices import Cost
from weft.planner.search import Choice, search
from weft.planner.space import Constraints, Keywords, divisors, possible

OBJECTIVES = ("time", "memory", "cost")


class Size(NamedTuple):
    """The fastest plan on so many devices and what it costs; None where nothing fits."""

    devices: int
    choice: Choice | None
    cost: Cost | None

    def describe(self) -> str:
        """In a line."""
        if self.choice is None or self.cost is None:
            return f"{self.devices} device{'s' * (self.devices > 1)}: no plan"
        how, seconds = self.choice.plan.describe(), self.choice.estimate.step_time_s
        return f"{self.devices} device{'s' * (self.devices > 1)}: {self.cost.describe()}, {seconds:.3g} s a step, {how}"


def choose(
    profile: Profile,
    cluster: Cluster,
    *,
    objective: str | None = None,
    price: float | None = None,
    **keywords: Unpack[Keywords],
) -> Choice:
    """The plan that is best at an objective.

    Args:
        profile: of the workload.
        cluster: to plan for.
        objective: one of OBJECTIVES; None is ``"time"``.
        price: of one device for an hour, in any currency. What the plan costs is told with it; ``"cost"`` needs it.
        keywords: what to keep, as for ``search``.

    Raises:
        PlanError: an objective or a price that is none; what is fixed cannot be.
        MemoryLimitError: nothing fits.
    """
    if objective not in (None, *OBJECTIVES):
        raise PlanError(f"objective {objective!r} is unknown; choose from {', '.join(OBJECTIVES)}")
    if price is not None and not (price > 0 and math.isfinite(price)):
        raise PlanError(f"price must be a positive number, of one device for an hour, got {price!r}")
    if objective == "cost":
        if price is None:
            raise PlanError("objective cost needs a price of one device for an hour; add --price 2.5, or price=2.5")
        return _cheapest(profile, cluster, price, keywords)
    tight = _least_memory(profile, cluster, Constraints.parse(keywords)) if objective == "memory" else cluster
    choice, lines, cost = search(profile, tight, **keywords), [], None
    if tight is not cluster:
        lines.append("That is the least memory any plan needs; nothing faster was looked for that needs more.")
    if price is not None:
        cost = _cost(profile, choice, cluster.devices, price)
        lines.append(f"It costs {cost.describe()} at {price:g} for a device and hour.")
    return _telling(choice, cost, lines) if lines else choice


def _cheapest(profile: Profile, cluster: Cluster, price: float, keywords: Keywords) -> Choice:
    """The plan on as many devices as make a sample cheapest."""
    sizes, refused = [], None
    for devices in sizes_of(cluster):
        try:
            choice = search(profile, cluster.with_devices(devices), **keywords)
        except (MemoryLimitError, PlanError) as error:
            sizes.append(Size(devices, None, None))
            refused = error
        else:
            sizes.append(Size(devices, choice, _cost(profile, choice, devices, price)))
    found = [(size.cost.step, size.devices, size) for size in sizes if size.cost]
    if not found:
        assert refused is not None
        raise refused
    best = min(found)[2]
    assert best.choice is not None
    assert best.cost is not None
    head = f"The cheapest at {price:g} for a device and hour: {best.cost.describe()}. On other numbers of devices:"
    return _telling(best.choice, best.cost, [head, *(f"  {size.describe()}" for size in sizes if size is not best)])


def sizes_of(cluster: Cluster) -> list[int]:
    """Numbers of devices that one would rent of a cluster: divisors of a node, then nodes by powers of two, and all."""
    within, nodes = cluster.devices_per_node, cluster.devices // cluster.devices_per_node
    return sorted({*divisors(within), *(within << i for i in range(nodes.bit_length())), cluster.devices})


def _least_memory(profile: Profile, cluster: Cluster, constraints: Constraints) -> Cluster:
    """The cluster with only as much memory as any plan needs."""
    degrees, _ = possible(profile, cluster.devices, constraints)
    if not degrees:
        return cluster  # the search says why
    frontier = Frontier(Evaluator(profile, cluster), constraints, degrees)
    room = min(frontier.least(each).full.order[0] for each in degrees)
    if room > 1:
        return cluster
    if len(cluster.kinds) == 1:
        return cluster.with_memory(math.ceil(room * cluster.memory_bytes))
    each = (cluster.device_of(device).memory_bytes for device in range(cluster.devices))
    return cluster.with_memory(*(math.ceil(room * own) for own in each))


def _cost(profile: Profile, choice: Choice, devices: int, price: float) -> Cost:
    return Cost(
        devices=devices,
        price=price,
        step_time_s=choice.estimate.step_time_s,
        samples=profile.batch_size,
        tokens=profile.sample_tokens,
    )


def _telling(choice: Choice, cost: Cost | None, lines: list[str]) -> Choice:
    """The choice with its cost, told at the end of its reasons."""
    reasons = "\n".join([choice.plan.explain(), "", *lines])
    return replace(choice, plan=replace(choice.plan, reasons=reasons), cost=cost)
