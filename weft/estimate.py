"""Estimate and Measurement: step time and memory in the same named terms, so that every run compares them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

TIME_TERMS = ("compute", "tensor_parallel", "pipeline", "data_parallel", "bubble", "optimizer")
"""Seconds of the slowest device's step. They add up to the step."""

MEMORY_TERMS = ("parameters", "gradients", "optimizer", "activations", "buffers", "slack")
"""Bytes on one device, per stage. ``buffers``: communication and gather buffers; ``slack``: workspace and allocator."""

INFERENCE_TIME_TERMS = ("compute", "tensor_parallel", "pipeline", "data_parallel", "bubble")
"""Seconds of the last device's share of a batch that is predicted or generated. They add up to the batch."""

INFERENCE_MEMORY_TERMS = ("weights", "cache", "activations", "buffers", "slack")
"""Bytes on one device, per stage, where nothing is trained. ``cache``: keys and values; ``slack`` as above, with the
room that a cache has to grow."""

MEASURED = {
    "compute": ("compute",),
    "communication": ("tensor_parallel", "data_parallel"),
    "waiting": ("pipeline", "bubble"),
    "optimizer": ("optimizer",),
}
"""What can be told apart of a step that runs, and what of TIME_TERMS that is."""

OFF, MATTERS = 0.15, 0.05
"""A term is off when predicted and measured differ by more than OFF of what was measured, and MATTERS of the step."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a plan is predicted to cost.

    Attributes:
        step_time_s: seconds per optimizer step.
        time: seconds by term of TIME_TERMS; they add up to ``step_time_s``.
        stage_time: the same of each stage, on average over its devices, idling to the end of the step included.
        memory: bytes by term of MEMORY_TERMS, one dict per stage, for the fullest rank of the stage.
        bytes_sent: bytes the busiest device sends per step.
        idle_share: mean share of the step in which a device waits, 0 to 1.
        calibration: ``"measured here"``, ``"preset"``, ``"datasheet"`` or ``"preset fitted on ..."``.
    """

    step_time_s: float
    time: dict[str, float]
    memory: tuple[dict[str, float], ...]
    bytes_sent: float
    idle_share: float
    calibration: str
    stage_time: tuple[dict[str, float], ...] = ()

    @property
    def peak_memory_bytes(self) -> list[float]:
        """Peak bytes on a device of each stage."""
        return [sum(stage.values()) for stage in self.memory]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "step_time_s": self.step_time_s,
            "peak_memory_bytes": self.peak_memory_bytes,
            "terms": {
                "time_s": self.time,
                "stage_time_s": list(self.stage_time),
                "memory_bytes": list(self.memory),
            },
            "bytes_sent": self.bytes_sent,
            "idle_share": self.idle_share,
            "calibration": self.calibration,
        }


@dataclass(frozen=True, kw_only=True)
class InferenceEstimate:
    """What a plan is predicted to do where nothing is trained.

    Attributes:
        batch_s: seconds of a batch: of predicting it, or of generating all new tokens of its sequences.
        first_token_s: seconds until every sequence has its first new token; None where none are generated.
        token_s: seconds from token to token afterwards, of every sequence.
        samples: of the batch: predictions, or sequences.
        tokens: new ones of each; 0 where none are generated.
        time: seconds by term of INFERENCE_TIME_TERMS, of the device that ends last; they add up to ``batch_s``.
        busy: share of the batch in which a device of each stage works, 0 to 1.
        memory: bytes by term of INFERENCE_MEMORY_TERMS, one dict per stage, for the fullest rank of the stage.
        cache_tokens, cache_requests: tokens that all caches have room for together, and sequences of full length.
        devices: that the plan takes.
        calibration: as of Estimate.
    """

    batch_s: float
    first_token_s: float | None
    token_s: float | None
    samples: int
    tokens: int
    time: dict[str, float]
    busy: tuple[float, ...]
    memory: tuple[dict[str, float], ...]
    cache_tokens: int | None
    cache_requests: int | None
    devices: int
    calibration: str

    @property
    def peak_memory_bytes(self) -> list[float]:
        """Peak bytes on a device of each stage."""
        return [sum(stage.values()) for stage in self.memory]

    @property
    def samples_per_s(self) -> float:
        """Predictions, or whole sequences, of all devices together."""
        return self.samples / self.batch_s

    @property
    def tokens_per_s(self) -> float | None:
        """New tokens of all devices together; None where none are generated."""
        return self.samples_per_s * self.tokens if self.tokens else None

    @property
    def rate(self) -> float:
        """What is made in a second: tokens, or else predictions."""
        return self.tokens_per_s or self.samples_per_s

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        tokens = self.tokens_per_s
        return {
            "batch_s": self.batch_s,
            "first_token_s": self.first_token_s,
            "token_s": self.token_s,
            "samples_per_s": self.samples_per_s,
            "tokens_per_s": tokens,
            "tokens_per_s_per_device": None if tokens is None else tokens / self.devices,
            "busy_share": list(self.busy),
            "peak_memory_bytes": self.peak_memory_bytes,
            "cache_tokens": self.cache_tokens,
            "cache_requests": self.cache_requests,
            "terms": {"time_s": self.time, "memory_bytes": list(self.memory)},
            "calibration": self.calibration,
        }


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a plan was seen to cost.

    Attributes:
        step_time_s: median seconds per step, on the slowest rank.
        peak_memory_bytes: per rank, above what a process needs before it has a model.
        bytes_sent: bytes a rank sent per step; None where it was not measured.
        idle_share: mean share of the step in which a rank waited, 0 to 1.
        samples_per_s: global samples over step time.
        time: seconds of a step by term of MEASURED, the mean over ranks; without ``"communication"`` where it cannot be
            told from computing.
    """

    step_time_s: float
    peak_memory_bytes: list[int]
    bytes_sent: float | None
    idle_share: float
    samples_per_s: float
    time: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """A term that came out otherwise than predicted: seconds of a step; of memory, the fullest device's bytes."""

    term: str
    predicted: float
    measured: float


def differences(estimate: Estimate, measurement: Measurement) -> list[Difference]:
    """The terms that are off, most seconds first, memory last. Seconds are means over all devices."""
    stages, seen = estimate.stage_time or (estimate.time,), measurement.time
    terms = {
        term: sum(stage.get(part, 0.0) for stage in stages for part in parts) / len(stages)
        for term, parts in MEASURED.items()
    }
    if "communication" not in seen:
        terms["compute"] += terms.pop("communication")
    found = [Difference(term, terms[term], seen[term]) for term in terms if term in seen]
    found = [d for d in found if abs(d.predicted - d.measured) > MATTERS * measurement.step_time_s]
    found.sort(key=lambda d: -abs(d.predicted - d.measured))
    found.append(Difference("memory", max(estimate.peak_memory_bytes), max(measurement.peak_memory_bytes)))
    return [d for d in found if abs(d.predicted - d.measured) > OFF * d.measured]
