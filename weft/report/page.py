"""A plan as one page of HTML that needs nothing else: no script, no font, no request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from weft.capture.profile import Profile
from weft.cluster import Cluster
from weft.errors import PlanError
from weft.estimate import MEMORY_TERMS, TIME_TERMS
from weft.planner import Change, Choice
from weft.planner.evaluate import StageRow
from weft.planner.explain import MEMORY_NAMES, TIME_NAMES, separates, stretches
from weft.planner.frontier import title
from weft.planner.spans import PARTS, Span, candidate_of, spans
from weft.quantity import format_bytes, format_count, format_seconds
from weft.shares import apportion

SPANS_DRAWN = 3000
"""Spans of a timeline up to which all of it is drawn; of a longer one so many at its two ends."""

SPANS_NAMED = 700
"""Spans up to which each tells what it is when pointed at."""

WIDTH, WIDEST, CUT, MARGIN = 1000.0, 3600.0, 46.0, 62.0
"""Units of the drawing: of the timeline at least and at most, of what is left out, of the names of stages."""

LANE, BAR, DIGIT = 26, 20, 6.0
"""Height of a stage's lane and of what stands in it; width of a digit there."""

ROWS, CELLS = 4, 8
"""Replicas and ranks of tensor parallelism that the picture of a stage shows."""


class Window(NamedTuple):
    """A part of the step that is drawn, and where it begins on the page."""

    begin_s: float
    end_s: float
    x: float


class Mark(NamedTuple):
    """A span on the page. ``label`` is empty where it has no room."""

    part: str
    x: float
    width: float
    label: str
    title: str


def write(path: Path, choice: Choice, profile: Profile, cluster: Cluster, changes: Sequence[Change] = ()) -> None:
    """Write the page of a choice.

    Args:
        path: the file.
        choice, profile, cluster: what was found, for what, on what.
        changes: what would change it; empty where nobody asked.

    Raises:
        PlanError: the file cannot be written.
    """
    try:
        path.write_text(render(choice, profile, cluster, changes), encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{path}: cannot be written: {error.strerror}; name a file in a folder there is") from error


def check(path: Path) -> None:
    """Look whether a file is a page.

    Raises:
        PlanError: it is not.
    """
    try:
        begins = path.read_bytes()[:15].lower()
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {error.strerror}") from error
    if begins != b"<!doctype html>":
        raise PlanError(f"{path}: is no page")


def render(choice: Choice, profile: Profile, cluster: Cluster, changes: Sequence[Change] = ()) -> str:
    """The page of a choice."""
    import jinja2  # nothing else needs it

    plan, estimate = choice.plan, choice.estimate
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(files("weft.report").joinpath("page.html").read_text(encoding="utf-8"))
    step = estimate.step_time_s
    extras = [plan.precision] * (plan.precision != "float32") + ["compiled"] * plan.compile
    stages = [(f"stage {number}", terms) for number, terms in enumerate(estimate.stage_time)]
    times = [("slowest device", estimate.time), *(stages if len(stages) > 1 else [])]
    return template.render(
        title=", ".join([title(candidate_of(plan)[0]), *extras]),
        cluster=cluster,
        estimate=estimate,
        rate=format_count(profile.batch_size / step, "samples/s"),
        peak=max(choice.stages, key=lambda row: row.memory_bytes / row.limit_bytes),
        summary=plan.explain().split("\n\n")[1].splitlines()[1:] if plan.reasons else [],
        stages=[picture(choice, number) for number in range(plan.pp)],
        time_names=used(TIME_TERMS, TIME_NAMES, [terms for _, terms in times]),
        times=[(name, terms, step) for name, terms in times],
        memory_names=used(MEMORY_TERMS, MEMORY_NAMES, estimate.memory),
        memories=[
            (f"stage {number}", terms, max(sum(terms.values()), stage.limit_bytes))
            for number, (terms, stage) in enumerate(zip(estimate.memory, choice.stages, strict=True))
        ],
        timeline=timeline(spans(profile, cluster, plan), plan.pp),
        alternatives=[(title(candidate_of(a.plan)[0]), separates(estimate, a.estimate)) for a in choice.alternatives],
        later=[(x.what, f"{separates(estimate, x.estimate)}; needs {x.lacks}") for x in choice.later],
        changes=[change.describe().split(": ", 1) for change in changes],
        refused=choice.refused,
        seconds=f"captured in {format_seconds(choice.capture_s)}, searched in {format_seconds(choice.search_s)}",
        bytes=format_bytes,
        time=format_seconds,
    )


def used(order: Sequence[str], names: Mapping[str, str], rows: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """The terms that are anything in any row, with their names."""
    return {term: names[term] for term in order if any(terms.get(term) for terms in rows)}


def picture(choice: Choice, number: int) -> dict[str, Any]:
    """One stage: what of the model is on it, and the ranks that hold it, replica by replica."""
    plan, stage = choice.plan, choice.stages[number]
    replicas = plan.dp_replicate * plan.dp_shard
    inside, first = plan.tp * plan.cp, number * replicas * plan.tp * plan.cp
    samples = apportion(-(-plan.batch_size // plan.microbatches), plan.portions)
    rows = [
        {
            "ranks": range(first + replica * inside, first + replica * inside + min(inside, CELLS)),
            "last": first + (replica + 1) * inside - 1,
            "samples": samples[replica],
        }
        for replica in range(min(replicas, ROWS))
    ]
    return {
        "number": number,
        "calls": drawn(stage),
        "holds": format_bytes(stage.memory_bytes),
        "unequal": bool(plan.shares),
        "devices": " and ".join(stage.devices),
        "rows": rows,
        "more": replicas - len(rows),
        "cells": min(inside, CELLS),
        "inside": inside,
    }


def drawn(stage: StageRow) -> str:
    """A stage's calls, and what it recomputes."""
    again = f"; recomputes {', '.join(stretches(list(stage.recompute)))}" if stage.recompute else ""
    return ", ".join(stretches(stage.calls)) + again


def timeline(every: Sequence[Span], devices: int) -> dict[str, Any]:
    """The drawing of a timeline: lanes of marks, ticks of the time axis, and where it is cut."""
    end_s = max(span.end_s for span in every)
    windows = cut(every, end_s)
    shown = sum(w.end_s - w.begin_s for w in windows)
    lengths = [span.end_s - span.begin_s for span in every if span.part == "forward"]
    # As wide as lets a microbatch's number stand in its forward, within reason.
    width = min(WIDEST, max(WIDTH, 3 * DIGIT * shown / median(lengths))) if lengths else WIDTH
    scale = width / shown
    windows = [
        window._replace(x=MARGIN + number * CUT + scale * sum(w.end_s - w.begin_s for w in windows[:number]))
        for number, window in enumerate(windows)
    ]
    named = len(every) <= SPANS_NAMED
    lanes: list[list[Mark]] = [[] for _ in range(devices)]
    for span in every:
        for window in windows:
            begin, end = max(span.begin_s, window.begin_s), min(span.end_s, window.end_s)
            if end > begin:
                x, wide = window.x + scale * (begin - window.begin_s), scale * (end - begin)
                lanes[span.device].append(mark(span, x, wide, named=named))
    return {
        "width": MARGIN + width + CUT * (len(windows) - 1) + 20,
        "height": LANE * devices + 40,
        "lanes": lanes,
        "windows": [(window, scale * (window.end_s - window.begin_s)) for window in windows],
        "ticks": [tick for window in windows for tick in ticks(window, scale, end_s)],
        "parts": [part for part in PARTS if any(span.part == part for span in every)],
        "left_out": format_seconds(windows[1].begin_s - windows[0].end_s) if len(windows) > 1 else "",
        "lane": LANE,
        "bar": BAR,
        "margin": MARGIN,
        "cut": CUT,
    }


def cut(every: Sequence[Span], end_s: float) -> list[Window]:
    """What is drawn of a step: all of it, or its first and last rounds."""
    if len(every) <= SPANS_DRAWN:
        return [Window(0.0, end_s, 0.0)]
    half = SPANS_DRAWN // 2
    until = sorted(span.begin_s for span in every)[half]
    since = sorted((span.end_s for span in every), reverse=True)[half]
    return [Window(0.0, until, 0.0), Window(since, end_s, 0.0)] if since > until else [Window(0.0, end_s, 0.0)]


def mark(span: Span, x: float, width: float, *, named: bool) -> Mark:
    """A span on the page."""
    number = str(span.microbatch) if span.microbatch >= 0 else ""
    fits = width >= DIGIT * len(number) + 3 and span.part in ("forward", "backward", "weight")
    of = f" of microbatch {number}" if number else ""
    told = f"{span.part}{of}, {format_seconds(span.end_s - span.begin_s)}" if named else ""
    return Mark(span.part, round(x, 1), max(round(width, 1), 0.1), number if fits else "", told)


def ticks(window: Window, scale: float, end_s: float) -> list[tuple[float, str]]:
    """Round moments of a window, about every 110 units of the drawing, and their places."""
    step = 110 / scale
    power = 10.0 ** (len(f"{int(step):d}") - 1) if step >= 1 else 1.0
    while power > step:
        power /= 10
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step or factor == 10)
    first = -(-window.begin_s // step)
    moments = [step * (first + i) for i in range(int((window.end_s - first * step) / step) + 1)]
    unit, size = ("s", 1.0) if end_s >= 1 else ("ms", 1e-3) if end_s >= 1e-3 else ("us", 1e-6)
    return [(round(window.x + scale * (t - window.begin_s), 1), f"{t / size:.6g} {unit}") for t in moments]
