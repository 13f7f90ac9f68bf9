"""The plans that could be, and why others cannot.

    degrees        every product of pp, dp_replicate, dp_shard and tp that equals the number of devices
    microbatches   divisors of a replica's share of the batch, and powers of two
    zero           every stage of the sharded optimizer, where dp_shard is above one
    schedule       every order of weft.schedule where there is a pipeline; one name for it where there is none
    recompute      none, or as much as memory asks for (recompute.py)
    shares         equal, and in proportion to the speed of replicas where it differs (sites.py)

What the user fixed is kept; what cannot be for this model is refused with its reason, before any cost is worked out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import NamedTuple, TypedDict

from weft.capture.profile import Profile
from weft.errors import PlanError
from weft.plan import PRECISIONS, RECOMPUTE, SCHEDULES
from weft.planner.experts import Experts


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
    zero: int | None
    recompute: str | None
    precision: str | None
    compile: bool | None


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
    zero: int | None = None
    recompute: str | None = None
    precision: str | None = None
    compile: bool | None = None

    def __post_init__(self) -> None:
        for name in (*DEGREES, "cp", "ep", "microbatches"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise PlanError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("cp", "ep"):
            if getattr(self, name) not in (None, 1):
                raise PlanError(f"{name}={getattr(self, name)} cannot run yet; leave {name} out")
        if self.zero not in (None, 1, 2, 3):
            raise PlanError(f"zero must be 1, 2 or 3, got {self.zero!r}")
        if self.schedule not in (None, *SCHEDULES):
            raise PlanError(f"schedule {self.schedule!r} is unknown; choose from {', '.join(SCHEDULES)}")
        for name, choices in (("recompute", ("none", *RECOMPUTE)), ("precision", PRECISIONS)):
            if getattr(self, name) not in (None, *choices):
                raise PlanError(f"{name} {getattr(self, name)!r} is unknown; choose from {', '.join(choices)}")
        if self.compile not in (None, True, False):
            raise PlanError(f"compile must be True or False, got {self.compile!r}")

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
    """Degrees of the searched dimensions, and of those that are only planned: ``cp``; ``ep``, which are among the
    replicas and the ranks of ``tp`` and ``cp`` and divide experts, each of them over ``etp`` ranks (0: as ``tp``)."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 0

    @property
    def devices(self) -> int:
        """How many they take."""
        return math.prod(self[:5])

    @property
    def parts(self) -> int:
        """Into how many parts experts are divided."""
        return self.ep * (self.etp or self.tp)

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
    """A plan before its stages are cut.

    Attributes:
        degrees, microbatches: as in Plan.
        schedule: a key of ``schedule.ORDERS``.
        recompute, zero: as in Plan.
        chunks: stages on each device of a pipeline.
        sequence: what tensor parallelism does not divide is divided along the sequence.
        shares: as in Plan.
    """

    degrees: Degrees
    microbatches: int
    schedule: str
    recompute: Mapping[str, str] = MappingProxyType({})
    zero: int = 3
    chunks: int = 1
    sequence: bool = False
    shares: tuple[int, ...] = ()

    @property
    def stages(self) -> int:
        """How many stages the model is cut into."""
        return self.degrees.pp * self.chunks


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


def possible(profile: Profile, devices: int, constraints: Constraints) -> tuple[list[Degrees], list[Refused]]:
    """The products that this model can be divided by, and why it cannot by the others. Raises as ``products``."""
    found, refused = [], []
    for degrees in products(devices, constraints):
        if reason := refuse(profile, degrees, constraints.microbatches):
            refused.append(Refused(degrees.describe(), reason))
        else:
            found.append(degrees)
    return found, refused


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
    if degrees.ep > 1 and (reason := refuse_experts(profile, degrees)):
        return reason
    needed = degrees.replicas * (microbatches or 1)
    if profile.batch_size < needed:
        parts = f"{degrees.replicas} replicas" + (f" x {microbatches} microbatches" if microbatches else "")
        return f"a batch of {profile.batch_size} samples cannot be divided over {parts}; raise batch_size to {needed}"
    return None


def refuse_experts(profile: Profile, degrees: Degrees) -> str | None:
    """Why the experts cannot be divided by ``ep``; None if they can."""
    ranks = degrees.devices // degrees.pp
    if ranks % degrees.parts:
        return f"{degrees.parts} parts of experts for {ranks} devices of a stage"
    return Experts.of(profile).refuse(degrees.ep)


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


def counts(profile: Profile, degrees: Degrees, constraints: Constraints) -> list[int]:
    """Every number of microbatches for these degrees, at least one sample for each."""
    if constraints.microbatches is not None:
        return [constraints.microbatches]
    samples, largest = profile.batch_size // degrees.replicas, -(-profile.batch_size // degrees.replicas)
    powers = [1 << i for i in range(samples.bit_length())]
    return sorted({count for count in (*divisors(largest), *powers) if count <= samples})


def candidates(profile: Profile, degrees: Degrees, constraints: Constraints) -> Iterator[Candidate]:
    """Every number of microbatches, schedule and stage of the sharded optimizer for these degrees."""
    schedules = [constraints.schedule] if constraints.schedule else ["1f1b"] if degrees.pp == 1 else list(SCHEDULES)
    zeros = [constraints.zero] if constraints.zero else [3, 2, 1] if degrees.dp_shard > 1 else [3]
    again = everywhere(profile, constraints.recompute)
    for count in counts(profile, degrees, constraints):
        for schedule in schedules:
            for zero in zeros:
                if zero != 2 or count > 1:  # with one microbatch stages 1 and 2 are the same
                    yield Candidate(degrees, count, schedule, again, zero)


def later(profile: Profile, candidate: Candidate) -> Iterator[tuple[Candidate, str]]:
    """Variants of a candidate that weft cannot run yet, and what it lacks for each."""
    degrees = candidate.degrees
    variants = [candidate]
    if degrees.tp > 1:
        variants.append(candidate._replace(sequence=True))
    holders = sum(1 for call in profile.calls[:-1] if call.parameters)
    for variant in variants:
        lacks = ["sequence parallelism"] if variant.sequence else []
        if lacks:
            yield variant, lacks[0]
        if degrees.pp == 1:
            continue
        yield variant._replace(schedule="zero_bubble"), " and ".join([*lacks, "the zero-bubble schedule"])
        for chunks in (2, 3, 4, 6, 8, 12):
            if candidate.microbatches % degrees.pp == 0 and degrees.pp * chunks <= holders:
                interleaved = variant._replace(schedule="interleaved", chunks=chunks)
                yield interleaved, " and ".join([*lacks, "interleaved stages"])


def elsewise(profile: Profile, candidate: Candidate) -> Iterator[tuple[Candidate, str]]:
    """Variants of a candidate on as many devices that divide sequences or experts, and what weft lacks for each: ``cp``
    instead of another dimension, with as many microbatches or smaller ones; ``ep`` beside the others. Each recomputing
    as the candidate does, or nothing."""
    degrees = candidate.degrees
    others: list[tuple[Degrees, int, str]] = []
    for cp in (2, 4, 8):
        for name in ("dp_shard", "dp_replicate", "tp"):
            own = getattr(degrees, name)
            if own % cp == 0 and profile.sample_tokens and profile.sample_tokens % cp == 0:
                divided = degrees._replace(**{name: own // cp}, cp=cp)
                others += [(divided, candidate.microbatches * times, "context parallelism") for times in (1, cp)]
    others += [
        (divided, candidate.microbatches, "expert parallelism")
        for ep in divisors(max(Experts.of(profile).counts.values(), default=1))[1:]
        if refuse_experts(profile, divided := degrees._replace(ep=ep)) is None
    ]
    for divided, count, lacks in others:
        if refuse(profile, divided, count) is None:
            for again in [candidate.recompute, *([{}] if candidate.recompute else [])]:
                shares = () if divided.replicas != degrees.replicas else candidate.shares
                yield candidate._replace(degrees=divided, microbatches=count, recompute=again, shares=shares), lacks


def everywhere(profile: Profile, mode: str | None) -> dict[str, str]:
    """The recomputation of every unit in one mode; of none for ``"none"`` and None."""
    if mode in (None, "none"):
        return {}
    assert mode is not None
    return {call.unit: mode for call in profile.calls if mode in call.recompute}
