"""The page that ``zoo.py`` writes: coverage per kind of plan, and every failure with its reason."""

from __future__ import annotations

import importlib.metadata
import re
import textwrap
from typing import Any

PACKAGES = ("torch", "transformers", "diffusers", "keras", "peft")
LONGEST = 300
INTRODUCTION = """
Small instances of every architecture that `transformers` registers for causal, sequence-to-sequence and masked language
models and for image classification, and of models of `diffusers`, plain PyTorch, Keras and `peft`, trained one step
under every kind of plan. An architecture counts where the loss and all gradients are one device's (float32, 1e-4 of
each norm) and the plan really divided the model: a stage holds only what its own calls read, and no process holds more
than 0.65 of the parameter bytes that two should halve. `pipeline()` is `torch.distributed.pipelining.pipeline()` in two
stages, split at the middle of the longest list of blocks, on the same models in `eval` mode. Written by
`python benchmarks/zoo.py`.
"""
ROUNDED = """
Where float32 gradients differ by more, the plan runs again in float64 and counts if they differ there by at most 1e-7:
the difference is rounding (the bias of attention keys has a gradient that is zero but for it). So it is for
"""
Results = dict[str, dict[str, Any]]


def to_json(results: Results) -> dict[str, Any]:
    """What is saved: versions, and results by name."""
    return {"versions": versions(), "architectures": {name: results[name] for name in sorted(results)}}


def from_json(data: dict[str, Any]) -> Results:
    """What ``to_json`` wrote."""
    return dict(data["architectures"])


def versions() -> dict[str, str]:
    """Of the packages whose models are measured."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def shorten(text: str) -> str:
    """A reason without the paths of this machine, in a length that can be read."""
    text = re.sub(r"/\S*/site-packages/", "", " ".join(text.split()))
    text = re.sub(r"(?<![\w/])/\S*/(?=[\w.]+\.py)", "", text)
    text = re.sub(r" \(zoo_\w+\.py:\d+ in \w+\)$", "", text)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def alike(reason: str) -> str:
    """What reasons of one sort have in common: names and numbers are left out."""
    text = re.sub(r"'[^']*'", "'...'", reason)
    text = re.sub(r"\b[a-zA-Z_]\w*(\.\w+)*\.\d+(\.\w+)*", "...", text)
    text = re.sub(r"gradient of \S+", "gradient of ...", text)
    return re.sub(r"\d+(\.\d+)?(e[-+]\d+)?%?", "N", text)


def page(results: Results, kinds: list[str]) -> str:
    """The whole page, in Markdown."""
    runs = {name: result for name, result in results.items() if not result["one_process"]}
    lines = [
        "# Coverage",
        "",
        *textwrap.wrap(INTRODUCTION.strip(), 120),
        "",
        ", ".join(f"{name} {version}" for name, version in versions().items()),
        "",
        f"Of {len(results)} architectures {len(runs)} run on one process.",
        "",
        "| plan | architectures | share |",
        "|---|---:|---:|",
    ]
    for kind in kinds:
        tried = [result["kinds"][kind] for result in runs.values() if kind in result["kinds"]]
        count = sum(not reason for reason in tried)
        name = f"`{kind}`" + (" of PyTorch" if kind == "pipeline()" else "")
        lines.append(f"| {name} | {count} of {len(tried)} | {count / max(len(tried), 1):.1%} |")
    rounded = {name: ", ".join(result["float64"]) for name, result in runs.items() if result.get("float64")}
    if rounded:
        text = f"{ROUNDED.strip()} {', '.join(f'`{name}` ({kinds})' for name, kinds in rounded.items())}."
        lines += ["", *textwrap.wrap(text, 120, break_long_words=False)]
    for kind in kinds:
        failed = {n: r["kinds"][kind] for n, r in runs.items() if r["kinds"].get(kind)}
        if failed:
            lines += ["", f"## Does not count under `{kind}`: {len(failed)}", "", *_grouped(failed)]
    missing = {name: result["one_process"] for name, result in results.items() if result["one_process"]}
    if missing:
        lines += ["", f"## Does not run on one process: {len(missing)}", "", *_grouped(missing)]
    return "\n".join(lines) + "\n"


def _grouped(reasons: dict[str, str]) -> list[str]:
    """Reasons with the names they hold for, the most frequent first; each as the first of its sort says it."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(alike(reason), []).append(name)
    ordered = sorted(groups.values(), key=lambda names: (-len(names), names[0]))
    return [f"- {_plain(reasons[names[0]])}: {', '.join(f'`{name}`' for name in names)}" for names in ordered]


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([*_<>|\[\]`])", r"\\\1", shorten(text))
