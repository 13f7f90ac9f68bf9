"""The plans that could be, and why others cannot.

    degrees        every product of pp, dp_replicate, dp_shard and tp that equals the number of devices
    microbatches   divisors of a replica's share of the batch, and powers of two
    schedule       every order of weft.schedule where there is a pipeline; one name for it where there is none

What the user fixed is kept; what cannot be for this model is refused with its reason, before any cost is worked out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple, TypedDict

from weft.capture.profile import Profile
from weft.errors import PlanError
from weft.plan import SCHEDULES


class Keywords(TypedDict, total=False):
    """What a user may fix; None leaves it to the search."""

    pp: int | None
    dp_replicate: int | None
    dp_shard: int | None
    cp: int | None
    tp: int | None
    ep: int | None
    microbatches: int | None
    schedule: str | None
    recompute: str | None


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """Keywords, checked.

    Raises:
        PlanError: a degree that is not a whole number of at least 1, or a choice that weft does not have.
    """

    pp: int | None = None
    dp_replicate: int | None = None
    dp_shard: int | None = None
    cp: int | None = None
    tp: int | None = None
    ep: int | None = None
    microbatches: int | None = None
    schedule: str | None = None
    recompute: str | None = None

    def __post_init__(self) -> None:
        for name in (*DEGREES, "cp", "ep", "microbatches"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise PlanError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("cp", "ep"):
            if getattr(self, name) not in (None, 1):
                raise PlanError(f"{name}={getattr(self, name)} cannot run yet; leave {name} out")
        if self.schedule not in (None, *SCHEDULES):
            raise PlanError(f"schedule {self.schedule!r} is unknown; choose from {', '.join(SCHEDULES)}")
        if self.recompute not in (None, "none"):
            raise PlanError(f"recompute {self.recompute!r} is unknown; use 'none' or leave it out")

    @classmethod
    def parse(cls, keywords: Keywords) -> Constraints:
        """The constraints that keywords name.

        Raises:
            PlanError: also for a keyword that does not exist.
        """
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(keywords) - set(known)):
            raise PlanError(f"cannot fix {unknown[0]!r}; what can be fixed is {', '.join(known)}")
        return cls(**keywords)

    def describe(self) -> str:
        """What is fixed, as the command line takes it: ``pp=2 schedule=gpipe``; empty if nothing is."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return " ".join(f"{name}={value}" for name, value in values if value is not None)


DEGREES = ("pp", "dp_replicate", "dp_shard", "tp")
"""Dimensions that are searched, in the order of plan.DIMENSIONS."""


class Degrees(NamedTuple):
    """Degrees of the searched dimensions."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @property
    def devices(self) -> int:
        """Their product."""
        return math.prod(self)

    @property
    def replicas(self) -> int:
        """Groups that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def uses_fsdp(self) -> bool:
        """Whether the runtime meets replicas through fully_shard."""
        return self.dp_shard > 1

    @property
    def kind(self) -> frozenset[str]:
        """Which dimensions are used at all."""
        return frozenset(name for name, degree in self._asdict().items() if degree > 1)

    def describe(self) -> str:
        """``pp=2 dp_shard=2``; ``one device`` if none is above one."""
        return " ".join(f"{name}={degree}" for name, degree in self._asdict().items() if degree > 1) or "one device"


class Candidate(NamedTuple):
    """A plan before its stages are cut."""

    degrees: Degrees
    microbatches: int
    schedule: str


class Refused(NamedTuple):
    """Plans that were left out, and what bound them."""

    what: str
    reason: str


def divisors(number: int) -> list[int]:
    """Every divisor, in order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def products(devices: int, constraints: Constraints) -> list[Degrees]:
    """Every choice of degrees whose product is ``devices`` and that keeps what is fixed.

    Raises:
        PlanError: there is none; the message says which numbers would do.
    """
    choices = [
        Degrees(pp, dp_replicate, dp_shard, devices // (pp * dp_replicate * dp_shard))
        for pp in divisors(devices)
        for dp_replicate in divisors(devices // pp)
        for dp_shard in divisors(devices // pp // dp_replicate)
    ]
    fixed = {name: value for name in DEGREES if (value := getattr(constraints, name)) is not None}
    kept = [d for d in choices if all(getattr(d, name) == value for name, value in fixed.items())]
    if kept:
        return kept
    said, product = " ".join(f"{name}={value}" for name, value in fixed.items()), math.prod(fixed.values())
    free = [name for name in DEGREES if name not in fixed]
    if devices % product == 0:  # all four are fixed, and some devices are left over
        name = next((n for n in ("dp_replicate", "dp_shard", "pp", "tp") if fixed[n] == 1), "dp_replicate")
        remedy = f"use {name}={fixed[name] * devices // product}, or {product} devices"
    elif free:
        numbers = ", ".join(map(str, divisors(devices)))
        remedy = f"use degrees whose product divides {devices} ({numbers}), or {product} devices"
    else:
        remedy = f"use degrees whose product is {devices}, or {product} devices"
    number = "1 device" if devices == 1 else f"{devices} devices"
    raise PlanError(f"{said} multiply to {product}, which does not make {number}; {remedy}")


def refuse(profile: Profile, degrees: Degrees, microbatches: int | None) -> str | None:
    """Why this model cannot be divided by these degrees; None if it can.

    Args:
        profile: of the workload.
        degrees: to check.
        microbatches: the number the user fixed, or None.
    """
    holders = sum(1 for call in profile.calls[:-1] if call.parameters)
    if degrees.pp > max(holders, 1):
        return f"{degrees.pp} stages for {holders} calls of units that hold parameters"
    if degrees.tp > 1 and (reason := refuse_tensor(profile, degrees.tp)):
        return reason
    needed = degrees.replicas * (microbatches or 1)
    if profile.batch_size < needed:
        parts = f"{degrees.replicas} replicas" + (f" x {microbatches} microbatches" if microbatches else "")
        return f"a batch of {profile.batch_size} samples cannot be divided over {parts}; raise batch_size to {needed}"
    return None


def refuse_tensor(profile: Profile, tp: int) -> str | None:
    """Why no module can be divided by ``tp``; None if one can."""
    if any(group.divisible_by(tp) for group in profile.tensor_groups):
        return None
    for group in profile.tensor_groups:
        for what, size in group.sizes:
            if size % tp:
                return f"{size} {what} are not divisible by {tp}"
    if profile.tensor_refused:
        module, reason = profile.tensor_refused[0]
        return f"{module}: {reason}"
    return "no module of this model can be divided"


def candidates(profile: Profile, degrees: Degrees, constraints: Constraints) -> Iterator[Candidate]:
    """Every number of microbatches and schedule for these degrees."""
    samples = profile.batch_size // degrees.replicas  # at least one sample for each microbatch
    if constraints.microbatches is not None:
        counts = [constraints.microbatches]
    else:
        largest = -(-profile.batch_size // degrees.replicas)
        powers = [1 << i for i in range(samples.bit_length())]
        counts = sorted({count for count in (*divisors(largest), *powers) if count <= samples})
    schedules = [constraints.schedule] if constraints.schedule else ["1f1b"] if degrees.pp == 1 else list(SCHEDULES)
    for count in counts:
        for schedule in schedules:
            yield Candidate(degrees, count, schedule)
