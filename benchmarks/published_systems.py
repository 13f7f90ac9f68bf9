"""How weft is asked about a published run: the machines it ran on, how its program kept and moved numbers, its plan.

Constants of kinds of GPU (shares of the data sheet's rates) stand in weft's presets, with the source they were fitted
on. What stands here are facts of the programs and of the clusters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from published_run import Run

import weft
from weft.capture import Profile
from weft.capture.profile import LOSS, Affine, Call, Recomputed
from weft.cluster import Link
from weft.planner.evaluate import Evaluator
from weft.planner.space import Candidate, Degrees
from weft.planner.stages import Ends
from weft.planner.system import System

PRESETS = {"a100": "a100-80", "a100-80": "a100-80", "a100-40": "a100-40", "h100": "h100-sxm", "h200": "h200"} | {
    "h100-96": "h100-96", "b200": "b200", "gb200": "b200",
}  # fmt: skip
"""Presets of GPUs; one with more words is looked for under fewer."""

MEGATRON = System(
    gradient_bytes=4,  # "main gradients" in float32, in one buffer
    reduce_bytes=4,
    gather_bytes=2,
    state_bytes=12,  # master weights and two moments
    step_bytes=4 * 3 + 12 * 2 + 2,  # norm, scaling and step read and write gradients; the step reads and writes state
    standing_gradients=True,
    shards_beside=False,
    parallel_loss=True,
    scatters=True,
    hides_reduce=False,
    hides_gather=False,
    blocking=True,
)
"""Megatron-LM: each parameter's gradient is added to a float32 buffer, which is reduced after the last backward."""

SYSTEMS = {
    "megatron": MEGATRON,
    # Dispatch and the rest of a step were fitted on its single-node runs, with the shares of [fitted.a100].
    "megatron-deepspeed": replace(
        MEGATRON, reduce_bytes=2, gradient_bytes=2, scatters=False, dispatch_s=5.8e-5, step_s=5e-3
    ),
    "nemo": replace(MEGATRON, hides_reduce=True, hides_gather=True, blocking=False),
    "torchtitan": System(
        gradient_bytes=4,
        reduce_bytes=4,
        gather_bytes=2,
        state_bytes=2 + 8,  # the parameters' other half: shards are in float32; two moments
        step_bytes=4 * 3 + 4 * 7,
        hides_reduce=True,
        hides_gather=True,
    ),
    # Gradients in bfloat16 are added to float32 sums and let go of after every backward. DistributedDataParallel's
    # buckets reduce, or scatter, the sums; of what should hide behind the backward then, nothing is seen to.
    "nanotron": replace(
        MEGATRON,
        accumulate_bytes=10,
        scatters=False,
        keeps_gathered=True,
        buckets_shards=True,
    ),
}
"""By framework; others are taken for Megatron-LM."""


FP8 = {"torchtitan": 1.55}
FP8_ELSEWHERE = 1.8
"""How much faster products are in 8 bits than in 16, of twice by the data sheet; casts and scales take the rest, more
of it where they are not part of the kernels. Fitted on torchtitan's runs, and on one of DGXC's."""

ROWWISE = 0.7
"""The same with a scale for every row: fitted on torchtitan's run without asynchronous tensor parallelism, tested on
that with it."""

ASYNC = 0.3
"""Share of the exchange inside layers that asynchronous tensor parallelism hides: what torchtitan's bfloat16 run with
it is faster than that without. Tested on its fp8 runs."""

EVERY_OTHER = 0.6
"""Of what selective recomputation keeps besides a block's input, what torchtitan's does: every other product."""

BLOCK = re.compile(r"\.\d+$")
"""Units that are one of a model's blocks."""


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
        CannotPredictError: there is no preset of its GPU, or its stages cannot be told.
    """
    cluster, system, candidate = cluster_of(run), system_of(run), candidate_of(run, profile)
    share = 1.0
    if candidate.chunks > 1 and candidate.microbatches % candidate.degrees.pp:
        # Whole rounds of the interleaved schedule, of which the run does a share.
        whole = -(-candidate.microbatches // candidate.degrees.pp) * candidate.degrees.pp
        share = candidate.microbatches / whole
        profile = replace(profile, batch_size=round(profile.batch_size / share))
        candidate = candidate._replace(microbatches=whole)
    if run.recompute_what == "op":
        profile = replace(profile, calls=tuple(_every_other(call) for call in profile.calls))
    evaluator = Evaluator(profile, cluster, system)
    found = evaluator.estimate(candidate, ends_of(run, profile))
    peaks = found.peak_memory_bytes
    seen = {"first": peaks[0], "last": peaks[-1]}.get(run.memory_rank, max(peaks))
    return Prediction(share * found.step_time_s, seen)


def cluster_of(run: Run) -> weft.Cluster:
    """The machines: a preset, with the links between them that the source names."""
    preset = PRESETS.get(run.gpu) or PRESETS.get(run.gpu.partition("-")[0])
    if preset is None:
        raise CannotPredictError(f"there is no preset of {run.gpu}")
    devices = run.dp * run.cp * run.tp * run.pp
    per_node = min(run.gpus_per_node, devices)
    cluster = weft.Cluster.preset(preset, nodes=-(-devices // per_node), devices_per_node=per_node)
    device = cluster.device
    if run.dtype == "fp8":  # of products only: attention stays in bfloat16, and its rate is stated relative to theirs
        faster = ROWWISE if run.recipe == "rowwise" else FP8.get(run.framework, FP8_ELSEWHERE)
        matmul = {**device.matmul, "bfloat16": device.matmul["bfloat16"].scaled(faster)}
        device = replace(
            device, matmul=matmul, rates={**device.rates, "attention": device.rates["attention"].scaled(1 / faster)}
        )
    nodes = replace(cluster.nodes[0], device=device)
    return replace(cluster, nodes=(nodes,), links=tuple(_link(run, link) for link in cluster.links))


def _link(run: Run, link: Link) -> Link:
    """A link as the source describes its own."""
    if run.framework == "megatron-deepspeed" and link.devices > run.gpus_per_node:
        return replace(link, bytes_per_s=0.78 * 100e9 / run.gpus_per_node)  # 800 Gbit/s for a node
    return link


def system_of(run: Run) -> System:
    """How the run's program keeps and moves numbers."""
    system = SYSTEMS.get(run.framework, MEGATRON)
    if "async-tp" in run.features:
        system = replace(system, hides_tensor=ASYNC)
    if "overlap" in run.features:
        system = replace(system, hides_reduce=True, hides_gather=True, blocking=False)
    return replace(system, blocking=system.blocking and run.vpp == 1, context_shards=run.zero > 0)


def candidate_of(run: Run, profile: Profile) -> Candidate:
    """The run's plan."""
    sharded = run.zero > 0 and run.dp * run.cp > 1
    ep, etp = (run.ep, run.etp) if run.shape.experts else (1, 0)
    degrees = Degrees(run.pp, 1 if sharded else run.dp, run.dp if sharded else 1, run.tp, run.cp, ep, etp)
    mode = {"none": None}.get(run.recompute, run.recompute)
    if run.recompute_what == "core":
        mode = None
    again = {c.unit: mode for c in profile.calls if mode and mode in c.recompute and BLOCK.search(c.unit)}
    return Candidate(
        degrees,
        run.microbatches,
        "interleaved" if run.vpp > 1 and run.pp > 1 else "1f1b",
        again,
        max(run.zero, 1) if sharded else 3,
        run.vpp if run.pp > 1 else 1,
        run.sequence_parallel,
    )


def _every_other(call: Call) -> Call:
    """A call of which selective recomputation keeps every other product."""
    if "selective" not in call.recompute:
        return call
    full, way = call.recompute["full"], call.recompute["selective"]
    more = sum(saved.bytes.per_sample for saved in way.saved)
    least = sum(saved.bytes.per_sample for saved in full.saved)
    share = (least + EVERY_OTHER * (more - least)) / more
    saved = tuple(s._replace(bytes=Affine(s.bytes.fixed * share, s.bytes.per_sample * share)) for s in way.saved)
    products = [op for op in call.forward if op.kind == "matmul"]
    return replace(call, recompute={**call.recompute, "selective": Recomputed(saved, (*way.again, *products[1::2]))})


def ends_of(run: Run, profile: Profile) -> Ends:
    """Where the run's stages end: equal numbers of blocks each, what is before them with the first, the rest with the
    last."""
    blocks = [i for i, call in enumerate(profile.calls) if BLOCK.search(call.unit)]
    count = run.pp * (run.vpp if run.pp > 1 else 1)
    stages = run.stage_layers or ()
    if not stages:
        share, extra = divmod(len(blocks), count)
        stages = tuple(share + (i < extra) for i in range(count))
    ends, taken = [], 0
    for number in stages:
        taken += number
        ends.append(blocks[taken - 1] + 1)
    last = next(i for i, call in enumerate(profile.calls) if call.name == LOSS)
    return (*ends[:-1], last)
