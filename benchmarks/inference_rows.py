"""Plans for inference in a race: what was predicted of each and measured, and which was chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import weft
from weft.estimate import InferenceEstimate


class Request(NamedTuple):
    """Sequences at once, tokens of each prompt, and new ones after it."""

    batch: int
    prompt: int
    new: int

    def describe(self) -> str:
        """In a few words."""
        return f"{self.batch} x {self.prompt} + {self.new}"


class Turn(NamedTuple):
    """Seconds of a plan's call of ``generate``: until all sequences have their first token, their last, and in all."""

    first_s: float
    last_s: float
    total_s: float


def typical(seconds: Iterable[float]) -> float:
    """The median of the faster half."""
    found = sorted(seconds)
    return median(found[: (len(found) + 1) // 2])


@dataclass(kw_only=True)
class Row:
    """A plan in a race, predicted and measured.

    Attributes:
        request: what was generated.
        surroundings: where.
        plan: it.
        predicted: of the cluster as measured first and before each other round.
        turns: of every round.
    """

    request: Request
    surroundings: str
    plan: weft.Plan
    predicted: list[InferenceEstimate]
    turns: list[Turn] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The plan in a few words."""
        groups = self.plan.microbatches
        return self.plan.describe() + (f" x{groups}" if groups > 1 else "")

    @property
    def tokens_per_s(self) -> float:
        """Measured."""
        return self.request.batch * self.request.new / typical(turn.total_s for turn in self.turns)

    @property
    def first_s(self) -> float:
        """Measured seconds to the first token."""
        return typical(turn.first_s for turn in self.turns)

    @property
    def token_s(self) -> float:
        """Measured seconds from token to token."""
        return typical((turn.last_s - turn.first_s) / max(1, self.request.new - 1) for turn in self.turns)

    @property
    def predicted_tokens_per_s(self) -> float:
        """Predicted."""
        return median(estimate.tokens_per_s or 0.0 for estimate in self.predicted)

    @property
    def predicted_first_s(self) -> float:
        """Predicted."""
        return median(estimate.first_token_s or 0.0 for estimate in self.predicted)

    @property
    def predicted_token_s(self) -> float:
        """Predicted."""
        return median(estimate.token_s or 0.0 for estimate in self.predicted)

    @property
    def rate_error(self) -> float:
        """Predicted tokens/s over measured, less one."""
        return self.predicted_tokens_per_s / self.tokens_per_s - 1

    @property
    def first_error(self) -> float:
        """The same of seconds to the first token."""
        return self.predicted_first_s / self.first_s - 1

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "request": self.request._asdict(),
            "surroundings": self.surroundings,
            "plan": self.name,
            "predicted_tokens_per_s": self.predicted_tokens_per_s,
            "measured_tokens_per_s": self.tokens_per_s,
            "tokens_per_s_error": self.rate_error,
            "predicted_first_token_s": self.predicted_first_s,
            "measured_first_token_s": self.first_s,
            "first_token_error": self.first_error,
            "predicted_token_s": self.predicted_token_s,
            "measured_token_s": self.token_s,
            "rounds": [turn._asdict() for turn in self.turns],
        }


VALUES: dict[str, Callable[[Row], float]] = {
    "throughput": lambda row: 1 / row.tokens_per_s,
    "latency": lambda row: row.token_s,
}
"""Seconds that are to be least, by objective."""


@dataclass(kw_only=True)
class Scenario:
    """A request in some surroundings, with every plan that could be chosen.

    Attributes:
        chosen: the name of weft's choice, by objective.
        alone: one process by itself, which is no plan of two: for comparison.
    """

    request: Request
    surroundings: str
    rows: list[Row]
    chosen: dict[str, str]
    alone: Row | None = None

    def row(self, objective: str) -> Row:
        """Weft's choice."""
        return next(row for row in self.rows if row.name == self.chosen[objective])

    def fastest(self, objective: str) -> Row:
        """Of those measured."""
        return min(self.rows, key=VALUES[objective])

    def regret(self, objective: str) -> float:
        """How much longer the choice takes than the fastest, as a share."""
        value = VALUES[objective]
        return value(self.row(objective)) / value(self.fastest(objective)) - 1

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        found = {
            objective: {
                "chosen": self.row(objective).name,
                "fastest": self.fastest(objective).name,
                "regret": self.regret(objective),
                "seconds": {row.name: VALUES[objective](row) for row in self.rows},
            }
            for objective in VALUES
        }
        alone = None if self.alone is None else self.alone.to_json()
        return {"request": self.request._asdict(), "surroundings": self.surroundings, **found, "one_process": alone}
