"""Estimate and Measurement: step time and memory in the same named terms, so that every run compares them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

TIME_TERMS = ("compute", "tensor_parallel", "pipeline", "data_parallel", "bubble", "optimizer")
"""Seconds of the slowest device's step. They add up to the step."""

MEMORY_TERMS = ("parameters", "gradients", "optimizer", "activations", "buffers", "slack")
"""Bytes on one device, per stage. ``buffers``: communication and gather buffers; ``slack``: workspace and allocator."""


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
    """

    step_time_s: float
    peak_memory_bytes: list[int]
    bytes_sent: float | None
    idle_share: float
    samples_per_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)
