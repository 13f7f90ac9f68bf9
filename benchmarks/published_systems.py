"""How weft is asked about a published run: which cluster it ran on, and which plan stands for its degrees."""

from __future__ import annotations

from dataclasses import dataclass

from published_run import Run

import weft
from weft.capture import Profile
from weft.planner import estimate, make_plan

PRESETS = {"a100": "a100-80", "a100-80": "a100-80", "a100-40": "a100-40", "h100": "h100-sxm", "h200": "h200"} | {
    "b200": "b200",
    "gb200": "b200",
}
"""Presets of GPUs; one with more words is looked for under fewer."""


class CannotPredictError(Exception):
    """What is unknown about a run's hardware or plan; the message says what."""


@dataclass(frozen=True)
class Prediction:
    """Seconds a step, and bytes on the device that the source tells of (``Run.memory_rank``)."""

    step_time_s: float
    peak_memory_bytes: float


def predict(run: Run, profile: Profile) -> Prediction:
    """What weft expects of a run.

    Args:
        run: the row.
        profile: of its model.

    Raises:
        CannotPredictError: there is no preset of its GPU.
    """
    preset = PRESETS.get(run.gpu) or PRESETS.get(run.gpu.partition("-")[0])
    if preset is None:
        raise CannotPredictError(f"there is no preset of {run.gpu}")
    devices = run.dp * run.tp * run.pp
    per_node = min(run.gpus_per_node, devices)
    cluster = weft.Cluster.preset(preset, nodes=-(-devices // per_node), devices_per_node=per_node)
    sharded = run.zero == 3
    plan = make_plan(
        profile,
        cluster,
        pp=run.pp,
        dp_replicate=1 if sharded else run.dp,
        dp_shard=run.dp if sharded else 1,
        tp=run.tp,
        microbatches=run.microbatches,
        recompute=run.recompute,
        compile=run.compiled,
    )
    found = estimate(profile, cluster, plan)
    peaks = found.peak_memory_bytes
    seen = {"first": peaks[0], "last": peaks[-1]}.get(run.memory_rank, max(peaks))
    return Prediction(found.step_time_s, seen)
