"""How good predictions are: errors, ranking and regret, by source."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from published_run import Run, Skipped
from published_systems import Prediction

RANKED = 3
"""Plans that one question needs for its ranking to count."""


@dataclass(frozen=True)
class Predicted:
    """A run and what weft expected of it."""

    run: Run
    prediction: Prediction

    @property
    def time_error(self) -> float | None:
        """Predicted over measured step time, minus 1; None where it was not measured."""
        measured = self.run.step_time_s
        return self.prediction.step_time_s / measured - 1 if measured else None

    @property
    def memory_error(self) -> float | None:
        """The same of peak memory."""
        measured = self.run.peak_memory_bytes
        return self.prediction.peak_memory_bytes / measured - 1 if measured else None


@dataclass(frozen=True)
class Summary:
    """Figures of a source; shares in percent, None where the source has no such figure.

    Attributes:
        source: its name.
        rows: how many were predicted.
        skipped: how many could not be.
        time_mape, time_median_ape: mean and median absolute error of step time.
        memory_mape, memory_median_ape: of peak memory.
        kendall_tau: of plans ranked by predicted and by measured time, -1 to 1; mean over questions (Run.question) of
            at least RANKED plans.
        regret: how much slower the plan predicted to be fastest was than the fastest measured; mean over questions of
            at least two plans.
    """

    source: str
    rows: int
    skipped: int
    time_mape: float | None
    time_median_ape: float | None
    memory_mape: float | None
    memory_median_ape: float | None
    kendall_tau: float | None
    regret: float | None

    def to_json(self) -> dict[str, object]:
        """Plain data; figures to four digits behind the point."""
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}


def kendall_tau(one: Sequence[float], two: Sequence[float]) -> float | None:
    """Kendall's tau-b of two rankings of the same things: pairs in the same order minus those in the other, over the
    geometric mean of the pairs that each ranking orders. None where one of them orders nothing."""
    agree = first = second = 0
    for (a, b), (c, d) in itertools.combinations(zip(one, two, strict=True), 2):
        x, y = (a > c) - (a < c), (b > d) - (b < d)
        agree += x * y
        first += abs(x)
        second += abs(y)
    return agree / math.sqrt(first * second) if first and second else None


def regret(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Measured time of the plan predicted to be fastest (the mean of several) over the fastest measured, minus 1."""
    least = min(predicted)
    chosen = [m for p, m in zip(predicted, measured, strict=True) if p == least]
    return statistics.fmean(chosen) / min(measured) - 1


def summaries(predicted: Iterable[Predicted], skipped: Iterable[Skipped]) -> list[Summary]:
    """Figures of every source, in order of appearance."""
    by_source: dict[str, list[Predicted]] = {}
    missing: dict[str, int] = {}
    for p in predicted:
        by_source.setdefault(p.run.source, []).append(p)
    for s in skipped:
        by_source.setdefault(s.source, [])
        missing[s.source] = missing.get(s.source, 0) + 1
    return [_summary(source, found, missing.get(source, 0)) for source, found in by_source.items()]


def questions(predicted: Iterable[Predicted], least: int) -> list[list[Predicted]]:
    """Plans that answer one question, of those with at least so many whose time was measured."""
    groups: dict[tuple[object, ...], list[Predicted]] = {}
    for p in predicted:
        if p.run.step_time_s is not None:
            groups.setdefault(p.run.question, []).append(p)
    return [group for group in groups.values() if len(group) >= least]


def _summary(source: str, predicted: list[Predicted], skipped: int) -> Summary:
    times = [100 * abs(e) for p in predicted if (e := p.time_error) is not None]
    memory = [100 * abs(e) for p in predicted if (e := p.memory_error) is not None]
    taus = [kendall_tau(*_times(group)) for group in questions(predicted, RANKED)]
    return Summary(
        source=source,
        rows=len(predicted),
        skipped=skipped,
        time_mape=_over(times, statistics.fmean),
        time_median_ape=_over(times, statistics.median),
        memory_mape=_over(memory, statistics.fmean),
        memory_median_ape=_over(memory, statistics.median),
        kendall_tau=_over([tau for tau in taus if tau is not None], statistics.fmean),
        regret=_over([100 * regret(*_times(group)) for group in questions(predicted, 2)], statistics.fmean),
    )


def _times(group: list[Predicted]) -> tuple[list[float], list[float]]:
    measured = [p.run.step_time_s for p in group if p.run.step_time_s is not None]
    return [p.prediction.step_time_s for p in group], measured


def _over(values: list[float], what: Callable[[list[float]], float]) -> float | None:
    return what(values) if values else None
