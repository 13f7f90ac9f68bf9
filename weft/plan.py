"""Plan: the contract between planner and runtime. Frozen, plain data, JSON in and out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from weft.errors import PlanError

VERSION = 1
SCHEDULES = ("gpipe", "1f1b")
DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Mesh dimensions, outermost first: neighbours in rank order differ in the innermost, the chattiest."""
STYLES = (
    "colwise",
    "rowwise",
    "colwise_gather",
    "embedding_rowwise",
    "colwise_transposed",
    "rowwise_transposed",
)
"""How tensor parallelism divides a module: over its outputs, over its inputs, over its outputs which are then
gathered, over the rows of an embedding table. ``_transposed``: the weight is stored [in, out] instead of [out, in]."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which part of a workload runs where, and in which order.

    Attributes:
        pp, dp_replicate, dp_shard, cp, tp: mesh degrees; their product is the number of devices.
        ep: expert-parallel degree, laid over the data-parallel dimensions.
        microbatches: microbatches each replica cuts its part of the batch into, per step.
        schedule: ``"gpipe"`` or ``"1f1b"``: the order of a pipeline's actions.
        stages: per pipeline stage the calls placed on it, in order of the forward; ``"h.0"`` is the first call
            of unit ``h.0``, ``"h.0@2"`` its second.
        tensor: module name to the style tensor parallelism divides it by (see STYLES); others are replicated.
        batch_size: global batch size, in samples.
        recompute: ``"none"``: activations are kept.
        precision: ``"float32"``: the parameters' own dtype is used throughout.
        reasons: why the planner chose it, for people; not part of the plan itself, neither saved nor compared.

    Raises:
        PlanError: degrees below one, stages that are not ``pp`` many or empty, unknown schedule or style.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    microbatches: int = 1
    schedule: str = "1f1b"
    stages: tuple[tuple[str, ...], ...]
    tensor: Mapping[str, str] = field(default_factory=dict)
    batch_size: int
    recompute: str = "none"
    precision: str = "float32"
    reasons: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in (*DIMENSIONS, "ep", "microbatches", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PlanError(f"plan: {name} must be a whole number of at least 1, got {value!r}")
        for name in ("cp", "ep"):
            if getattr(self, name) != 1:
                raise PlanError(f"plan: {name}={getattr(self, name)} cannot run yet; use {name}=1")
        if self.schedule not in SCHEDULES:
            raise PlanError(f"plan: schedule {self.schedule!r} is unknown; choose from {', '.join(SCHEDULES)}")
        if self.recompute != "none":
            raise PlanError(f"plan: recompute {self.recompute!r} is unknown; use 'none'")
        if self.precision != "float32":
            raise PlanError(f"plan: precision {self.precision!r} is unknown; use 'float32'")
        if len(self.stages) != self.pp or not all(self.stages):
            raise PlanError(f"plan: pp={self.pp} needs {self.pp} non-empty stages, got {len(self.stages)}")
        calls = [call for stage in self.stages for call in stage]
        if len(set(calls)) != len(calls):
            raise PlanError("plan: a call stands on two stages; each call of a unit is placed once")
        for module, style in self.tensor.items():
            if style not in STYLES:
                raise PlanError(f"plan: tensor style {style!r} of {module} is unknown; choose from {', '.join(STYLES)}")
        if self.tensor and self.tp == 1:
            raise PlanError("plan: tensor styles are given but tp=1; remove them or raise tp")
        if self.batch_size < self.replicas * self.microbatches:
            raise PlanError(
                f"plan: a batch of {self.batch_size} samples cannot be divided over {self.replicas} replicas x "
                f"{self.microbatches} microbatches; raise batch_size to {self.replicas * self.microbatches} "
                "or lower one of them"
            )
        object.__setattr__(self, "tensor", dict(sorted(self.tensor.items())))  # own copy; a plain dict, so plans pickle

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
    def samples_per_microbatch(self) -> int:
        """Samples in the largest microbatch of a full batch."""
        return -(-self.batch_size // (self.replicas * self.microbatches))

    def describe(self) -> str:
        """The degrees above one, as the command line takes them: ``pp=2 dp_shard=2``; ``one device`` if none."""
        return " ".join(f"{k}={v}" for k, v in self.degrees.items() if v > 1) or "one device"

    def explain(self) -> str:
        """Why this plan, as the planner found it; a plan that was loaded or written by hand tells what it does."""
        if self.reasons is not None:
            return self.reasons
        lines = [f"{self.describe()}, {self.microbatches} microbatches, schedule {self.schedule}"]
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
            "tensor": dict(self.tensor),
        }

    @classmethod
    def from_json(cls, data: Any, *, source: str = "plan") -> Plan:
        """The plan that ``to_json`` wrote.

        Raises:
            PlanError: not an object, an unknown or missing key, a value that cannot be.
        """
        if not isinstance(data, dict):
            raise PlanError(f"{source}: expected a JSON object, got {type(data).__name__}")
        expected = {"version", *_saved()}
        if unknown := sorted(set(data) - expected):
            raise PlanError(f"{source}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(expected))}")
        if missing := sorted(expected - set(data)):
            raise PlanError(f"{source}: key {missing[0]!r} is missing")
        if data["version"] != VERSION:
            raise PlanError(
                f"{source}: version {data['version']!r} is not {VERSION}; make the plan again with `weft plan`"
            )
        stages, tensor = data["stages"], data["tensor"]
        if not isinstance(stages, list) or not all(
            isinstance(stage, list) and all(isinstance(call, str) for call in stage) for stage in stages
        ):
            raise PlanError(f"{source}: stages must be a list of lists of call names")
        if not isinstance(tensor, dict) or not all(isinstance(style, str) for style in tensor.values()):
            raise PlanError(f"{source}: tensor must map module names to styles")
        values = {k: v for k, v in data.items() if k != "version"}
        return cls(**{**values, "stages": tuple(map(tuple, stages))})

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
            data = json.loads(Path(path).read_text())
        except OSError as error:
            raise PlanError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise PlanError(f"{path}: is not JSON: {error}") from error
        return cls.from_json(data, source=str(path))


def _saved() -> list[str]:
    """Fields that are saved: those that are compared."""
    return [f.name for f in fields(Plan) if f.compare]
