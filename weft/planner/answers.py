"""What a search for inference found, in words and numbers for people: the estimate's own numbers, which add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weft.estimate import InferenceEstimate
from weft.planner.explain import REFUSED_SHOWN
from weft.planner.space import Refused
from weft.quantity import format_bytes, format_count, format_seconds

TIME_NAMES = {
    "compute": "computing",
    "tensor_parallel": "exchanging inside layers (tensor parallelism)",
    "pipeline": "waiting for tensors and tokens between stages",
    "data_parallel": "gathering weights",
    "bubble": "idle in the pipeline",
}
MEMORY_NAMES = {
    "weights": "weights",
    "cache": "keys and values (cache)",
    "activations": "activations of one forward",
    "buffers": "communication buffers",
    "slack": "libraries, allocator, and room for the cache to grow",
}
COPIES = frozenset({"dp_replicate"})


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What there is to tell; of the lists the first is the choice.

    Attributes:
        titles, estimates, kinds: of the best plans of each kind: in a line, in numbers, and the dimensions used.
        names: calls of each stage.
        limits: bytes of memory of each stage's fullest device.
        cluster: its name.
        objective: what was to be best.
        fits_one: whether one device holds all of it.
        one: what one device does by itself, if it can.
        fixed: what the user kept, in a line.
        refused: what was left out.
        prompt, new_tokens: of each sequence; 0 where none are generated.
    """

    titles: Sequence[str]
    estimates: Sequence[InferenceEstimate]
    kinds: Sequence[frozenset[str]]
    names: Sequence[Sequence[str]]
    limits: Sequence[int]
    cluster: str
    objective: str
    fits_one: bool
    one: InferenceEstimate | None
    fixed: str
    refused: Sequence[Refused]
    prompt: int
    new_tokens: int


def answer(told: Answer) -> str:
    """The text of ``Plan.explain()`` of a plan for inference."""
    estimate, peaks = told.estimates[0], told.estimates[0].peak_memory_bytes
    full = max(range(len(peaks)), key=lambda stage: peaks[stage] / told.limits[stage])
    lines = [
        f"Plan for inference: {told.titles[0]}",
        f"on {told.cluster} (rates: {estimate.calibration})",
        "",
        *_figures(told),
        "",
        f"The fullest device holds {format_bytes(peaks[full])} of {format_bytes(told.limits[full])}.",
        verdict(told),
        *fewer(told),
        "",
        "Time of the last stage's device for one batch:",
        *_terms({TIME_NAMES[k]: v for k, v in estimate.time.items()}, estimate.batch_s, format_seconds),
        "",
        f"Memory at its fullest moment (stage {full}):",
        *_terms({MEMORY_NAMES[k]: v for k, v in estimate.memory[full].items()}, peaks[full], format_bytes),
        "",
        "Stages:",
        *(
            f"  {stage}: {names[0]} to {names[-1]} ({len(names)} calls): busy {estimate.busy[stage]:.0%}, "
            f"{format_bytes(estimate.memory[stage]['weights'])} of weights, {format_bytes(peaks[stage])} at most"
            for stage, names in enumerate(told.names)
        ),
    ]
    if told.titles[1:]:
        lines += ["", "Alternatives:"]
        lines += [
            f"  {title}: {_separates(told.objective, estimate, other)}"
            for title, other in zip(told.titles[1:], told.estimates[1:], strict=True)
        ]
    if told.refused:
        lines += ["", "Left out:", *(f"  {r.what}: {r.reason}" for r in told.refused[:REFUSED_SHOWN])]
        if len(told.refused) > REFUSED_SHOWN:
            lines.append(f"  and {len(told.refused) - REFUSED_SHOWN} more")
    return "\n".join(lines)


def _figures(told: Answer) -> list[str]:
    """What it does, in numbers."""
    estimate = told.estimates[0]
    if estimate.tokens_per_s is None:
        return [
            f"A batch of {estimate.samples} samples takes {format_seconds(estimate.batch_s)}: "
            f"{format_count(estimate.samples_per_s, 'samples/s')}, "
            f"{format_count(estimate.samples_per_s / estimate.devices, 'samples/s')} of each device."
        ]
    assert estimate.first_token_s is not None
    later = "" if estimate.token_s is None else f"    time per output token  {format_seconds(estimate.token_s)}"
    lines = [
        f"{estimate.samples} sequences at once, {told.prompt} tokens of a prompt and {told.new_tokens} new ones each:",
        f"  time to first token  {format_seconds(estimate.first_token_s)}{later}",
        f"  {format_count(estimate.tokens_per_s, 'tokens/s')} in all, "
        f"{format_count(estimate.tokens_per_s / estimate.devices, 'tokens/s')} of each device; "
        f"a batch takes {format_seconds(estimate.batch_s)}",
    ]
    if estimate.cache_tokens is not None:
        lines.append(
            f"  caches have room for {format_count(estimate.cache_tokens, 'tokens')}: "
            f"{estimate.cache_requests} such sequences at once"
        )
    return lines


def verdict(told: Answer) -> str:
    """What made it the choice: whether copies beat splitting, and by how much."""
    if len(told.titles) == 1 or told.objective == "memory":
        only = "It is the only plan that fits under what was asked."
        least = "It is the fastest of those that need least memory."
        return f"{least if told.objective == 'memory' else only} {_alone(told)}".rstrip()
    chosen, estimates = told.kinds[0], told.estimates
    copies = [i for i, kind in enumerate(told.kinds) if not kind or kind == COPIES]
    splits = [i for i in range(len(told.kinds)) if i not in copies]
    if copies and copies[0] == 0 and splits:
        other = splits[0]
        many = f"{estimates[0].devices} copies of the model beat splitting it" if chosen else "One device beats several"
        return (
            f"{many}: {_ahead(told, 0, other)} ahead of {told.titles[other]}. The model fits on one device, so nothing "
            "has to travel inside it."
        )
    if copies:
        return (
            f"Splitting the model beats copies of it: {_ahead(told, 0, copies[0])} ahead of {told.titles[copies[0]]}, "
            "though it fits on one device."
        )
    return f"It is {_ahead(told, 0, 1)} ahead of {told.titles[1]}. {_alone(told)}".rstrip()


def fewer(told: Answer) -> list[str]:
    """That one device is faster than all of them, where it is: a line, or none."""
    chosen, one = told.estimates[0], told.one
    if one is None or told.objective in ("memory", "cost"):
        return []
    ratio = value(told.objective, chosen) / value(told.objective, one)
    if ratio <= 1:
        return []
    what = "time per output token" if told.objective == "latency" and one.token_s is not None else "rate"
    return [
        f"One device by itself would be {ratio:.2f} times as fast ({what}): there is too little to divide. Plan for "
        "one (--devices 1), or for more sequences at once (--batch)."
    ]


def _alone(told: Answer) -> str:
    return "" if told.fits_one else "One device cannot hold the model, so it has to be split."


def value(objective: str, estimate: InferenceEstimate) -> float:
    """Seconds that are to be least."""
    return estimate.token_s if objective == "latency" and estimate.token_s is not None else estimate.batch_s


def _ahead(told: Answer, one: int, other: int) -> str:
    """By how much one plan is ahead of another."""
    what = "tokens/s" if told.new_tokens else "samples/s"
    if told.objective == "latency":
        what = "time per output token" if told.estimates[one].token_s is not None else "time of a batch"
    ratio = value(told.objective, told.estimates[other]) / value(told.objective, told.estimates[one])
    return f"{ratio - 1:.1%} ({what})"


def _separates(objective: str, chosen: InferenceEstimate, other: InferenceEstimate) -> str:
    """What separates an alternative from the chosen plan."""
    parts = [
        f"{format_count(other.rate, 'tokens/s' if other.tokens else 'samples/s')} ({other.rate / chosen.rate - 1:+.1%})"
    ]
    if other.first_token_s is not None and chosen.first_token_s is not None:
        parts.append(f"first token {format_seconds(other.first_token_s)}")
    if other.token_s is not None:
        parts.append(f"then one every {format_seconds(other.token_s)}")
    peak = max(other.peak_memory_bytes) - max(chosen.peak_memory_bytes)
    if abs(peak) > 1e-3 * max(chosen.peak_memory_bytes):
        parts.append(f"{format_bytes(abs(peak))} {'more' if peak > 0 else 'less'} memory")
    return ", ".join(parts)


def _terms(terms: dict[str, float], total: float, form: Callable[[float], str]) -> list[str]:
    """One line per term that is not zero."""
    shown = [(name, own) for name, own in terms.items() if own]
    width = max((len(form(own)) for _, own in shown), default=0)
    return [f"  {form(own):>{width}}  {own / total:4.0%}  {name}" for name, own in shown]
