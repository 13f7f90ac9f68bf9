"""What would change the answer: the search again with more memory, faster links, another batch size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, Unpack

from weft.capture.profile import Profile
from weft.cluster.links import Link
from weft.cluster.topology import Cluster
from weft.errors import WeftError
from weft.plan import Plan
from weft.planner.search import Choice, search
from weft.planner.space import Keywords

FACTOR = 2
"""How much more of each."""


class Change(NamedTuple):
    """What the plan would be under a change, and how many times as many samples a second it would compute.

    Attributes:
        what: the change.
        plan: the plan under it; None where there is none.
        speed: samples per second over those of the choice.
        differs: whether it is another plan than the choice, batch size apart.
    """

    what: str
    plan: Plan | None
    speed: float
    differs: bool

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return self._asdict() | {"plan": None if self.plan is None else self.plan.to_json()}

    def describe(self) -> str:
        """The change in a line."""
        if self.plan is None:
            return f"{self.what}: no plan"
        plan = self.plan
        how = f"{plan.describe()}, {plan.microbatches} microbatch{'es' if plan.microbatches > 1 else ''}"
        again = "" if not plan.recompute else ", recomputing"
        return f"{self.what}: {f'{how}{again}' if self.differs else 'the same plan'}, {self.speed:.2f} times as fast"


def changes(profile: Profile, cluster: Cluster, choice: Choice, **keywords: Unpack[Keywords]) -> list[Change]:
    """What a search finds under each change; each takes about as long as the first.

    Args:
        profile, cluster, keywords: as the choice was searched with.
        choice: what was found.
    """
    alike = len(cluster.kinds) == 1
    more = [FACTOR * cluster.device_of(device).memory_bytes for device in range(1 if alike else cluster.devices)]
    memory, links = cluster.with_memory(*more), tuple(_faster(link) for link in cluster.links)
    variants = [("twice the memory", profile, memory)]
    if links:
        variants.append(("links twice as fast", profile, replace(cluster, links=links)))
    variants.append(("twice the batch", replace(profile, batch_size=FACTOR * profile.batch_size), cluster))
    if profile.batch_size % FACTOR == 0:
        variants.append(("half the batch", replace(profile, batch_size=profile.batch_size // FACTOR), cluster))
    rate = profile.batch_size / choice.estimate.step_time_s
    return [_change(what, other, on, choice.plan, rate, keywords) for what, other, on in variants]


def _faster(link: Link) -> Link:
    collectives = tuple(replace(c, rates=c.rates.scaled(FACTOR)) for c in link.collectives)
    return replace(link, bytes_per_s=FACTOR * link.bytes_per_s, collectives=collectives)


def _change(what: str, profile: Profile, cluster: Cluster, plan: Plan, rate: float, keywords: Keywords) -> Change:
    try:
        found = search(profile, cluster, **keywords)
    except WeftError:  # half the batch may be too small for the devices
        return Change(what, None, 0.0, True)
    same = replace(found.plan, batch_size=plan.batch_size) == plan
    return Change(what, found.plan, profile.batch_size / found.estimate.step_time_s / rate, not same)
