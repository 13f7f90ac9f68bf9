"""What a plan costs at a price of one device for an hour."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a job costs, in the currency of the price.

    Attributes:
        devices: that are paid for.
        price: of one for an hour.
        step_time_s: of a step.
        samples: of a step.
        tokens: of a sample; 0 where it is no sequence of them.
        unit: what a step is called.
    """

    devices: int
    price: float
    step_time_s: float
    samples: int
    tokens: int
    unit: str = "step"

    @property
    def step(self) -> float:
        """Of a step."""
        return self.devices * self.price * self.step_time_s / 3600

    def describe(self) -> str:
        """In a line: for a million tokens, or a million samples."""
        what, count = ("tokens", self.samples * self.tokens) if self.tokens else ("samples", self.samples)
        return f"{1e6 * self.step / count:.4g} per million {what} ({self.step:.4g} a {self.unit})"

    def to_json(self) -> dict[str, float | int | None]:
        """Plain data."""
        return {
            "devices": self.devices,
            "price_per_device_hour": self.price,
            "per_step": self.step,
            "per_sample": self.step / self.samples,
            "per_token": self.step / (self.samples * self.tokens) if self.tokens else None,
        }
