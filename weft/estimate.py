"""Estimate and Measurement: step time and memory in the same named terms, so that every run compares them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

TIME_TERMS = ("compute", "tensor_parallel", "pipeline", "data_parallel", "bubble", "optimizer")
"""Seconds of the slowest device's step. They add up to the step."""

MEMORY_TERMS = ("parameters", "gradients", "optimizer", "activations", "buffers", "slack")
"""Bytes on one device, per stage. ``buffers``: communication and gather buffers; ``slack``: workspace and allocator."""

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
