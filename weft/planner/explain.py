"""What the planner found, in words and numbers for people: the estimate's own numbers, which add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from weft.capture.profile import Profile
from weft.cluster.topology import Device
from weft.estimate import Estimate
from weft.plan import RECOMPUTE, listed
from weft.planner.evaluate import StageRow
from weft.planner.sites import Line
from weft.planner.space import Candidate, Refused
from weft.quantity import format_bytes, format_count, format_seconds

TIME_NAMES = {
    "compute": "computing",
    "tensor_parallel": "exchanging inside layers (tensor parallelism)",
    "pipeline": "waiting for tensors between stages",
    "data_parallel": "gathering weights and averaging gradients",
    "bubble": "idle in the pipeline",
    "optimizer": "optimizer step and clipping",
}
MEMORY_NAMES = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations kept for the backward",
    "buffers": "communication buffers",
    "slack": "workspace and allocator",
}
REFUSED_SHOWN = 12
TELLING = 1e-3
"""Differences below this share of the whole are not told."""
TOLD = 1e-2
"""What an alternative saves somewhere is told from this share of the step."""


def explain(
    *,
    title: str,
    estimate: Estimate,
    stages: Sequence[StageRow],
    cluster: str,
    batch_size: int,
    alternatives: Sequence[tuple[str, Estimate]],
    refused: Sequence[Refused],
    without_recompute: tuple[float, int] | None = None,
    notes: Sequence[str] = (),
    later: Sequence[tuple[str, Estimate, str]] = (),
) -> str:
    """The text of ``Plan.explain()``.

    Args:
        title: the plan in a line.
        estimate: of the plan.
        stages: what its stages contribute.
        cluster: its name.
        batch_size: global batch size, in samples.
        alternatives: other plans in a line each, with their estimates.
        refused: what was left out.
        without_recompute: bytes the fullest device would need if nothing were recomputed, and those it has; None where
            the planner did not choose to.
        notes: what the user should know of it besides.
        later: faster plans that weft cannot run yet, with what it lacks.
    """
    step, full = estimate.step_time_s, _fullest(stages)
    peak = estimate.peak_memory_bytes[full]
    lines = [
        f"Plan: {title}",
        f"on {cluster} (rates: {estimate.calibration})",
        "",
        f"A step takes {format_seconds(step)}: {format_count(batch_size / step, 'samples/s')}. "
        f"The fullest device holds {format_bytes(peak)} of {format_bytes(stages[full].limit_bytes)}.",
        why(estimate, alternatives, refused),
        *([] if without_recompute is None else [_because(*without_recompute)]),
        *notes,
        "",
        "Time of the slowest device's step:",
        *_terms({TIME_NAMES[k]: v for k, v in estimate.time.items()}, step, format_seconds),
        "",
        f"Memory at its fullest moment (stage {full}):",
        *_terms({MEMORY_NAMES[k]: v for k, v in estimate.memory[full].items()}, peak, format_bytes),
        "",
        "Stages:",
        *(f"  {index}: {_stage(stage)}" for index, stage in enumerate(stages)),
    ]
    if alternatives:
        lines += ["", "Alternatives:"]
        lines += [f"  {name}: {separates(estimate, other)}" for name, other in alternatives]
    if later:
        lines += ["", "Faster, but weft cannot run them yet:"]
        lines += [f"  {name}: {separates(estimate, other)}; needs {lacks}" for name, other, lacks in later]
    if refused:
        lines += ["", "Left out:"]
        lines += [f"  {r.what}: {r.reason}" for r in refused[:REFUSED_SHOWN]]
        if len(refused) > REFUSED_SHOWN:
            lines.append(f"  and {len(refused) - REFUSED_SHOWN} more")
    return "\n".join(lines)


def remarks(profile: Profile, candidate: Candidate) -> list[str]:
    """What the user should know of a plan besides its cost."""
    count, tp = candidate.microbatches, candidate.degrees.tp
    told = [f"Tensor parallelism divides {profile.divided_share(tp):.0%} of the parameters' bytes."] if tp > 1 else []
    if not profile.batch_statistics or count == 1:
        return told
    samples = profile.batch_size / count
    return [
        *told,
        f"The model normalises over the batch: with {count} microbatches it takes its statistics from about "
        f"{samples:.0f} samples at a time, those of one microbatch on all replicas, not from all {profile.batch_size}; "
        "--microbatches 1 takes them from all.",
    ]


def unequal(lines: Sequence[Line], kinds: Sequence[Device], chosen: Estimate, equal: Estimate) -> str:
    """How a batch is divided over replicas of unequal speed, and what that is worth.

    Args:
        lines: of the plan.
        kinds: of devices.
        chosen: estimate of the plan.
        equal: of the same with equal shares.
    """
    told = []
    for line in lines:
        sites = [site for sites in line.sites for site in sites]
        names = dict.fromkeys(kinds[site.kind].name for site in sites)
        counts = dict.fromkeys(str(site.samples) for site in sites)
        replicas = f"replica{'s' if len(line.replicas) > 1 else ''} {listed(line.replicas)}"
        told.append(f"{replicas} ({', '.join(names)}) {' or '.join(counts)}")
    return (
        f"Samples of a microbatch by the speed of devices: {'; '.join(told)}. With equal shares a step would take "
        f"{format_seconds(equal.step_time_s)} ({equal.step_time_s / chosen.step_time_s - 1:+.1%})."
    )


def _because(without: float, limit: int) -> str:
    needs = f"{format_bytes(without)} of {format_bytes(limit)}"
    return f"It recomputes activations, since keeping them all needs {needs}."


def why(estimate: Estimate, alternatives: Sequence[tuple[str, Estimate]], refused: Sequence[Refused]) -> str:
    """One sentence: what made it the choice."""
    tight = [r.what for r in refused if r.reason.startswith("needs ")]
    without = f" {_list(tight)} would not fit." if tight else ""
    if not alternatives:
        return f"It is the only plan that {'fits' if tight else 'is possible'} under what was asked.{without}"
    name, other = alternatives[0]
    gap = other.step_time_s / estimate.step_time_s - 1
    term, more = _differences(estimate, other)[0]
    because = f", which spends {format_seconds(more)} more on {term}" if more > 0 else ""
    return f"It is the fastest that fits: {gap:.1%} ahead of {name}{because}.{without}"


def separates(chosen: Estimate, other: Estimate) -> str:
    """What separates an alternative from the chosen plan."""
    (most, more), *_, (least, less) = _differences(chosen, other)
    peak = max(other.peak_memory_bytes) - max(chosen.peak_memory_bytes)
    parts = [f"{format_seconds(other.step_time_s)} ({other.step_time_s / chosen.step_time_s - 1:+.1%})"]
    if more > TELLING * chosen.step_time_s:
        parts.append(f"{format_seconds(more)} more {most}")
    if -less > TOLD * chosen.step_time_s:
        parts.append(f"{format_seconds(-less)} less {least}")
    if abs(peak) > TELLING * max(chosen.peak_memory_bytes):
        parts.append(f"{format_bytes(abs(peak))} {'more' if peak > 0 else 'less'} memory")
    return ", ".join(parts)


def _differences(chosen: Estimate, other: Estimate) -> list[tuple[str, float]]:
    """What the other plan spends more, or less where it is negative, on each term: most first.

    Computing and idling count as one: devices that share cores compute faster while others idle.
    """

    def parts(estimate: Estimate) -> dict[str, float]:
        rest = {TIME_NAMES[term]: value for term, value in estimate.time.items() if term not in ("compute", "bubble")}
        return {"computing and idling": estimate.time["compute"] + estimate.time["bubble"], **rest}

    mine, theirs = parts(chosen), parts(other)
    return sorted(((name, theirs[name] - mine[name]) for name in mine), key=lambda pair: -pair[1])


def _fullest(stages: Sequence[StageRow]) -> int:
    return max(range(len(stages)), key=lambda s: stages[s].memory_bytes / stages[s].limit_bytes)


def _terms(terms: dict[str, float], total: float, form: Callable[[float], str]) -> list[str]:
    """One line per term that is not zero."""
    shown = [(name, value) for name, value in terms.items() if value]
    width = max((len(form(value)) for _, value in shown), default=0)
    return [f"  {form(value):>{width}}  {value / total:4.0%}  {name}" for name, value in shown]


def _stage(stage: StageRow) -> str:
    calls = (
        stage.calls[0] if len(stage.calls) == 1 else f"{stage.calls[0]} to {stage.calls[-1]} ({len(stage.calls)} calls)"
    )
    of = f" of {format_bytes(stage.limit_bytes)} on {' and '.join(stage.devices)}" if stage.devices else ""
    return (
        f"{calls}: {format_bytes(stage.parameter_bytes)} of parameters, busy {format_seconds(stage.busy_s)}, "
        f"idle {format_seconds(stage.idle_s)}, {format_bytes(stage.memory_bytes)}{of} at most"
        f"{_recompute(stage.recompute)}"
    )


def _recompute(modes: Mapping[str, str]) -> str:
    """Which units are recomputed: ``; recompute: selective in blocks.0, full in blocks.1-5``; empty for none."""
    if not modes:
        return ""
    parts = []
    for mode in RECOMPUTE:
        if units := [unit for unit, of in modes.items() if of == mode]:
            parts.append(f"{mode} in {', '.join(stretches(units))}")
    return f"; recompute: {', '.join(parts)}"


def stretches(units: Sequence[str]) -> list[str]:
    """Names with consecutive numbers at the end drawn together: ``blocks.0-5``."""
    found: list[tuple[str, int, int] | str] = []
    for unit in units:
        stem, dot, number = unit.rpartition(".")
        if not (dot and number.isdecimal()):
            found.append(unit)
        elif found and isinstance(found[-1], tuple) and found[-1][0] == stem and found[-1][2] + 1 == int(number):
            found[-1] = (stem, found[-1][1], int(number))
        else:
            found.append((stem, int(number), int(number)))
    return [x if isinstance(x, str) else f"{x[0]}.{x[1]}" + (f"-{x[2]}" if x[2] > x[1] else "") for x in found]


def _list(names: Sequence[str]) -> str:
    shown = list(names[:3]) + ([f"{len(names) - 3} others"] if len(names) > 3 else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
