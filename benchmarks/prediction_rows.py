"""One plan predicted and measured, and the plans of one scenario side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any

from weft import Plan
from weft.estimate import Estimate


@dataclass(kw_only=True)
class Row:
    """One plan in one place: predicted, from the cluster as measured first and ``again`` before each other round, and
    measured in rounds; its memory, where that was measured, by itself."""

    model: str
    surroundings: str
    plan: Plan
    predicted: Estimate
    again_s: list[float] = field(default_factory=list)
    rounds_s: list[float] = field(default_factory=list)
    predicted_peak: float = 0.0
    peak: int = 0
    idle: list[float] = field(default_factory=list)
    failed: str | None = None

    @property
    def name(self) -> str:
        """The plan in a few words."""
        modes = "+".join(sorted(set(self.plan.recompute.values())))
        schedule = f" {self.plan.schedule}" if self.plan.pp > 1 else ""
        again = f" recompute {modes}" if modes else ""
        count = f" x{self.plan.microbatches}" if self.plan.microbatches > 1 else ""
        return self.plan.describe() + count + schedule + again

    @property
    def predicted_s(self) -> float:
        """Predicted."""
        return median([self.predicted.step_time_s, *self.again_s])

    @property
    def step_s(self) -> float:
        """Measured."""
        return median(self.rounds_s)

    @property
    def time_error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_s / self.step_s - 1

    @property
    def memory_error(self) -> float | None:
        """The same of peak memory."""
        return self.predicted_peak / self.peak - 1 if self.peak else None

    def describe(self) -> str:
        """Where it stands, in a line."""
        if self.failed is not None:
            return f"{self.model}, {self.name}: {self.failed}"
        return f"{self.model}, {self.name}: {self.rounds_s[-1]:.3f} s for {self.predicted_s:.3f} predicted"

    def describe_memory(self) -> str:
        """The same of memory."""
        return f"{self.model}, {self.name}: {self.peak / 2**20:.0f} MiB for {self.predicted_peak / 2**20:.0f} predicted"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "model": self.model,
            "surroundings": self.surroundings,
            "devices": self.plan.devices,
            "plan": self.name,
            "predicted_step_s": self.predicted_s,
            "predicted_rounds_s": [self.predicted.step_time_s, *self.again_s],
            "measured_step_s": self.step_s,
            "time_error": self.time_error,
            "predicted_peak_bytes": self.predicted_peak or None,
            "measured_peak_bytes": self.peak or None,
            "memory_error": self.memory_error,
            "rounds_s": self.rounds_s,
            "idle_share": median(self.idle),
            "predicted_idle_share": self.predicted.idle_share,
            "terms": self.predicted.to_json()["terms"],
        }


@dataclass(kw_only=True)
class Scenario:
    """The plans of one model in one place: what weft chose first, and how much slower it is than the fastest."""

    model: str
    surroundings: str
    devices: int
    rows: list[Row]

    @property
    def measured(self) -> list[Row]:
        """Those that ran, the chosen one first."""
        return [row for row in self.rows if row.rounds_s]

    @property
    def regret(self) -> float:
        """How much longer the chosen plan takes than the fastest, as a share; infinite if it did not run."""
        if not self.rows[0].rounds_s:
            return float("inf")
        return self.rows[0].step_s / self.fastest.step_s - 1

    @property
    def fastest(self) -> Row:
        """Of those measured."""
        return min(self.measured, key=lambda row: row.step_s)

    @property
    def times_faster(self) -> float | None:
        """The chosen plan's speed over that of equal copies; None where one of them did not run."""
        copies = [row.step_s for row in self.measured if row.plan.dp_replicate == self.devices]
        return copies[-1] / self.rows[0].step_s if copies and self.rows[0].rounds_s else None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "model": self.model,
            "surroundings": self.surroundings,
            "devices": self.devices,
            "chosen": self.rows[0].name,
            "fastest": self.fastest.name,
            "regret": self.regret,
            "times_faster_than_copies": self.times_faster,
            "measured": {row.name: row.step_s for row in self.measured},
            "failed": {row.name: row.failed for row in self.rows if row.failed},
        }
