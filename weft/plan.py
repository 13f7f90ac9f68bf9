"""Plan: the contract between planner and runtime. Frozen, plain data, JSON in and out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from weft.errors import PlanError
from weft.plain import UnreadableError, is_whole, read_json, shown
from weft.shares import apportion

VERSION = 3
SCHEDULES = ("gpipe", "1f1b")
DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Mesh dimensions, outermost first: neighbours in rank order differ in the innermost, the chattiest."""
PRECISIONS = ("float32", "bf16", "fp16")
RECOMPUTE = ("selective", "full")
STYLES = {
    "colwise": "a projection, over its outputs: what enters is whole, what leaves is this rank's share",
    "rowwise": "a projection, over its inputs: what enters is this rank's share, what leaves is summed",
    "colwise_gather": "a projection or convolution, over its outputs, which are gathered",
    "colwise_transposed": "as colwise, of a weight stored [in, out]",
    "rowwise_transposed": "as rowwise, of a weight stored [in, out]",
    "colwise_gather_transposed": "as colwise_gather, of a weight stored [in, out]",
    "embedding_rowwise": "an embedding, over the rows of its table; what leaves is summed",
    "reduce": "a module whose parameters have styles of their own: what enters is whole, what leaves is summed",
    "shard": "a parameter, over dimension ``dim``",
    "sum_gradient": "a whole parameter that works on divided values: its gradient is summed",
    "first_rank": "a whole parameter that is added to summands: zero on all ranks but the first",
    "share": "a whole number kept on a module (a count of heads): divided by tp",
}
"""What tensor parallelism does with a module, a parameter or a number, by name."""


@dataclass(frozen=True)
class TensorStyle:
    """How tensor parallelism divides one module, parameter or number.

    Attributes:
        name: one of STYLES.
        parts: where the divided dimension consists of several stretches (queries, keys and values in one matrix), their
            lengths: each is divided by itself. Empty: it is one.
        dim: the divided dimension of a parameter, for ``"shard"``.

    Raises:
        PlanError: an unknown style, a part below one, ``dim`` missing or out of place.
    """

    name: str
    parts: tuple[int, ...] = ()
    dim: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in STYLES:
            raise PlanError(f"plan: tensor style {shown(self.name)} is unknown; choose from {', '.join(STYLES)}")
        if not all(_is_count(part) for part in self.parts):
            raise PlanError(f"plan: parts of tensor style {self.name} must be whole numbers of at least 1")
        if (self.dim is not None) != (self.name == "shard"):
            raise PlanError("plan: tensor style 'shard' needs dim, the dimension to divide, and no other style has it")
        object.__setattr__(self, "parts", tuple(self.parts))

    def to_json(self) -> Any:
        """The name, or an object where there is more to say."""
        more = ({"dim": self.dim} if self.dim is not None else {}) | ({"parts": [*self.parts]} if self.parts else {})
        return {"style": self.name, **more} if more else self.name

    @classmethod
    def from_json(cls, data: Any, *, source: str = "plan") -> TensorStyle:
        """The style that ``to_json`` wrote.

        Raises:
            PlanError: neither a name nor an object with ``style`` and, where they apply, ``dim`` and ``parts``.
        """
        if isinstance(data, str):
            return cls(data)
        if not isinstance(data, dict) or "style" not in data or not set(data) <= {"style", "dim", "parts"}:
            raise PlanError(f"{source}: a tensor style is a name, or style, dim and parts, got {shown(data)}")
        parts, dim = data.get("parts", []), data.get("dim")
        if not isinstance(parts, list) or not (dim is None or is_whole(dim)):
            raise PlanError(f"{source}: a tensor style has parts, a list, and dim, a whole number; got {shown(data)}")
        return cls(data["style"], tuple(parts), dim)

    def __str__(self) -> str:
        dim = f" on dimension {self.dim}" if self.dim is not None else ""
        return f"{self.name}{dim}" + (f" in parts of {', '.join(map(str, self.parts))}" if self.parts else "")


def _is_count(value: Any) -> bool:
    return is_whole(value, least=1)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which part of a workload runs where, and in which order.

    Attributes:
        pp, dp_replicate, dp_shard, cp, tp: mesh degrees; their product is the number of devices.
        ep: expert-parallel degree, laid over the data-parallel dimensions.
        microbatches: what a batch is cut into, per step; every replica takes its part of each.
        shares: of every replica in each microbatch's samples, relative to the others', in the order of the replicas;
            empty where all are equal. Kept in lowest terms.
        schedule: ``"gpipe"`` or ``"1f1b"``: the order of a pipeline's actions.
        zero: what ``dp_shard`` shards, by the stages of ZeRO: 1 optimizer state, 2 gradients too, 3 parameters too.
        stages: per pipeline stage the calls placed on it, in order of the forward; ``"h.0"`` is the first call
            of unit ``h.0``, ``"h.0@2"`` its second.
        tensor: names of modules, parameters and numbers to how tensor parallelism divides them; others are replicated.
        batch_size: global batch size, in samples.
        recompute: names of units whose activations are computed again in the backward, to how much: ``"full"`` keeps
            what enters the unit only, ``"selective"`` also what is costly to compute. Other units keep everything.
        precision: ``"float32"``: the parameters' own dtype is used throughout; ``"bf16"`` or ``"fp16"``: parameters and
            gradients keep their dtype, and operations run in the lower one where autocast says so.
        compile: run every unit through ``torch.compile``.
        reasons: why the planner chose it, for people; not part of the plan itself, neither saved nor compared.

    Raises:
        PlanError: degrees below one, stages that are not ``pp`` many or empty, unknown schedule or style, shares that
            are not one for each replica or leave one without samples.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    microbatches: int = 1
    schedule: str = "1f1b"
    zero: int = 3
    stages: tuple[tuple[str, ...], ...]
    tensor: Mapping[str, TensorStyle] = field(default_factory=dict)
    batch_size: int
    shares: tuple[int, ...] = ()
    recompute: Mapping[str, str] = field(default_factory=dict)
    precision: str = "float32"
    compile: bool = False
    reasons: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in (*DIMENSIONS, "ep", "microbatches", "batch_size"):
            value = getattr(self, name)
            if not _is_count(value):
                raise PlanError(f"plan: {name} must be a whole number of at least 1, got {shown(value)}")
        for name in ("cp", "ep"):
            if getattr(self, name) != 1:
                raise PlanError(f"plan: {name}={getattr(self, name)} cannot run yet; use {name}=1")
        if self.schedule not in SCHEDULES:
            raise PlanError(f"plan: schedule {shown(self.schedule)} is unknown; choose from {', '.join(SCHEDULES)}")
        if not is_whole(self.zero, least=1) or self.zero > 3 or (self.zero < 3 and self.dp_shard == 1):
            wanted = "1, 2 or 3" if self.dp_shard > 1 else "left out, or dp_shard above 1"
            raise PlanError(f"plan: zero={shown(self.zero)} with dp_shard={self.dp_shard}; zero must be {wanted}")
        for unit, mode in self.recompute.items():
            if mode not in RECOMPUTE:
                known = ", ".join(RECOMPUTE)
                raise PlanError(f"plan: recompute {shown(mode)} of {shown(unit)} is unknown; choose from {known}")
        if self.precision not in PRECISIONS:
            raise PlanError(f"plan: precision {shown(self.precision)} is unknown; choose from {', '.join(PRECISIONS)}")
        if not isinstance(self.compile, bool):
            raise PlanError(f"plan: compile must be true or false, got {shown(self.compile)}")
        if len(self.stages) != self.pp or not all(self.stages):
            raise PlanError(f"plan: pp={self.pp} needs {self.pp} non-empty stages, got {len(self.stages)}")
        calls = [call for stage in self.stages for call in stage]
        if len(set(calls)) != len(calls):
            raise PlanError("plan: a call stands on two stages; each call of a unit is placed once")
        if odd := next((n for n, style in self.tensor.items() if not isinstance(style, TensorStyle)), None):
            raise PlanError(f"plan: tensor[{odd!r}] must be a TensorStyle, got {self.tensor[odd]!r}")
        if self.tensor and self.tp == 1:
            raise PlanError("plan: tensor styles are given but tp=1; remove them or raise tp")
        if self.batch_size < self.replicas * self.microbatches:
            raise PlanError(
                f"plan: a batch of {self.batch_size} samples cannot be divided over {self.replicas} replicas x "
                f"{self.microbatches} microbatches; raise batch_size to {self.replicas * self.microbatches} "
                "or lower one of them"
            )
        object.__setattr__(self, "shares", lowest(self.shares, self.replicas, self.batch_size, self.microbatches))
        for name in ("tensor", "recompute"):  # own copies; plain dicts, so plans pickle
            object.__setattr__(self, name, dict(sorted(getattr(self, name).items())))

    @property
    def devices(self) -> int:
        """Number of devices: the product of the mesh degrees."""
        return math.prod(self.degrees.values())

    @property
    def degrees(self) -> dict[str, int]:
        """Mesh degrees by dimension, outermost first."""
        return {name: getattr(self, name) for name in DIMENSIONS}

    @property
    def replicas(self) -> int:
        """Groups that see different samples: ``dp_replicate * dp_shard``."""
        return self.dp_replicate * self.dp_shard

    @property
    def portions(self) -> tuple[int, ...]:
        """``shares``, written out where they are equal."""
        return self.shares or (1,) * self.replicas

    @property
    def samples_per_microbatch(self) -> int:
        """Samples a replica has at most in a microbatch of a full batch."""
        whole = {self.batch_size // self.microbatches, -(-self.batch_size // self.microbatches)}
        return max(max(apportion(samples, self.portions)) for samples in whole)

    def describe(self) -> str:
        """The degrees above one, as the command line takes them, and unequal shares: ``pp=2 dp_shard=2 shares=3,1``;
        ``one device`` if there are none."""
        shares = [f"shares={listed(self.shares)}"] if self.shares else []
        return " ".join([*(f"{k}={v}" for k, v in self.degrees.items() if v > 1), *shares]) or "one device"

    def explain(self) -> str:
        """Why this plan, as the planner found it; a plan that was loaded or written by hand tells what it does."""
        if self.reasons is not None:
            return self.reasons
        lines = [f"{self.describe()}, {self.microbatches} microbatches, schedule {self.schedule}"]
        if self.shares:
            samples = apportion(-(-self.batch_size // self.microbatches), self.shares)
            lines.append(f"samples of a microbatch by replica: {listed(samples)}")
        lines += [f"stage {s}: {calls[0]} to {calls[-1]} ({len(calls)} calls)" for s, calls in enumerate(self.stages)]
        return "\n".join(lines)

    def stage_of(self, call: str) -> int:
        """Index of the stage that runs a call."""
        return next(s for s, calls in enumerate(self.stages) if call in calls)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as ``save`` writes it."""
        values = {name: getattr(self, name) for name in _saved()}
        return {
            "version": VERSION,
            **values,
            "stages": [list(calls) for calls in self.stages],
            "shares": list(self.shares),
            "tensor": {name: style.to_json() for name, style in self.tensor.items()},
            "recompute": dict(self.recompute),
        }

    @classmethod
    def from_json(cls, data: Any, *, source: str = "plan") -> Plan:
        """The plan that ``to_json`` wrote.

        Raises:
            PlanError: not an object, an unknown or missing key, a value that cannot be.
        """
        if not isinstance(data, dict):
            raise PlanError(f"{source}: expected a JSON object, got {type(data).__name__}")
        if data.get("version", VERSION) != VERSION:  # before its keys, which were others
            raise PlanError(
                f"{source}: version {shown(data['version'])} is not {VERSION}; make the plan again with `weft plan`"
            )
        expected = {"version", *_saved()}
        if unknown := sorted(set(data) - expected):
            raise PlanError(f"{source}: unknown key {shown(unknown[0])}; known keys are {', '.join(sorted(expected))}")
        if missing := sorted(expected - set(data)):
            raise PlanError(f"{source}: key {missing[0]!r} is missing")
        stages, tensor, recompute = data["stages"], data["tensor"], data["recompute"]
        if not isinstance(stages, list) or not all(
            isinstance(stage, list) and all(isinstance(call, str) for call in stage) for stage in stages
        ):
            raise PlanError(f"{source}: stages must be a list of lists of call names")
        if not isinstance(tensor, dict):
            raise PlanError(f"{source}: tensor must map names to styles")
        if not isinstance(data["shares"], list):
            raise PlanError(f"{source}: shares must be a list of whole numbers, empty where all are equal")
        if not isinstance(recompute, dict) or not all(isinstance(mode, str) for mode in recompute.values()):
            raise PlanError(f"{source}: recompute must map names of units to {' or '.join(RECOMPUTE)}")
        values = {k: v for k, v in data.items() if k != "version"}
        styles = {name: TensorStyle.from_json(style, source=source) for name, style in tensor.items()}
        return cls(**{**values, "stages": tuple(map(tuple, stages)), "tensor": styles})

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from JSON.

        Raises:
            PlanError: the file is missing, is not JSON, or is not a plan.
        """
        try:
            data = read_json(Path(path))
        except UnreadableError as error:
            raise PlanError(f"{path}: {error}") from error
        return cls.from_json(data, source=str(path))


def _saved() -> list[str]:
    """Fields that are saved: those that are compared."""
    return [f.name for f in fields(Plan) if f.compare]


def lowest(shares: Sequence[int], replicas: int, batch_size: int, microbatches: int) -> tuple[int, ...]:
    """Shares of replicas in lowest terms, none if they are equal.

    Raises:
        PlanError: they are not one for each replica, or leave one without samples.
    """
    if not shares:
        return ()
    if len(shares) != replicas or not all(map(_is_count, shares)):
        raise PlanError(
            f"plan: shares must be a whole number of at least 1 for each of {replicas} replicas, "
            f"got {shown(list(shares))}; leave them empty for equal ones"
        )
    smallest = batch_size // microbatches
    lengths = apportion(smallest, shares)
    if 0 in lengths:
        raise PlanError(
            f"plan: replica {lengths.index(0)} of shares {list(shares)} would get no sample of a microbatch of "
            f"{smallest}; raise batch_size, lower microbatches or make the shares more even"
        )
    divisor = math.gcd(*shares)
    return () if len(set(shares)) == 1 else tuple(share // divisor for share in shares)


def listed(counts: Sequence[int]) -> str:
    """Numbers for people: each of a few, the ends of many."""
    return ",".join(map(str, counts)) if len(counts) <= 16 else f"{min(counts)}..{max(counts)}"


def shard_dim(shape: Sequence[int], ranks: int) -> int:
    """The dimension of a parameter that ``dp_shard`` cuts.

    The first, as ``fully_shard`` does, whose parts may be of unequal length; but where that leaves a rank a tenth more
    than its share (three experts on two ranks), the first dimension that can be cut evenly.
    """
    if not shape or ranks * math.ceil(shape[0] / ranks) <= 1.1 * shape[0]:
        return 0
    return next((dim for dim, length in enumerate(shape) if length and length % ranks == 0), 0)
