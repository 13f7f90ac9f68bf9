"""Bytes on a device of each stage, at the fullest moment of a step.

A stage keeps its parameters and optimizer state throughout. Activations come and go with the microbatches, and
gradients appear as the backward goes on, so the fullest moment is one of

    backward    the first backward: ``alive`` microbatches' activations, minus what the backward has already let go,
                plus the gradients that it has completed so far
    accumulate  a later microbatch while all gradients are kept
    step        no activations, all gradients, and the temporaries of the optimizer

Every moment adds its own workspace. How many microbatches are alive follows from the schedule's own list of actions
(``alive``).

How data parallelism keeps gradients: replicas in buckets that live from step to step, beside the gradients of earlier
microbatches if there are several; ``fully_shard`` whole until the last microbatch reduces them, then sharded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from weft.cluster.topology import Device
from weft.planner.compute import CallCost
from weft.planner.holdings import Holding
from weft.planner.space import Degrees
from weft.schedule import ORDERS, Kind

GATHER_COPIES = 3.0
"""Largest units that ``fully_shard`` holds gathered: the one computing, the next, and the buffer it arrives in."""

REDUCE_COPIES = 2.0
"""Largest units' gradients in flight: the whole gradient, and its copy in the order of the reduce-scatter."""

STEP_COPIES = 2.0
"""Temporaries of a single-tensor optimizer step, in sizes of its largest parameter."""


class Alive(NamedTuple):
    """Microbatches whose activations a stage keeps: when its first backward begins, and the most afterwards."""

    first: int
    later: int


@lru_cache(maxsize=4096)
def alive(schedule: str, stage: int, stages: int, microbatches: int) -> Alive:
    """Microbatches alive on a stage, itself included; ``later`` is 0 where the first backward is the last action."""
    now = first = later = 0
    for action in ORDERS[schedule](stage, stages, microbatches):
        if action.kind is Kind.FORWARD:
            now += 1
        if first:
            later = max(later, now)
        if action.kind is Kind.BACKWARD:
            first = first or now
            now -= 1
    return Alive(first, later)


def stage_memory(
    calls: Sequence[CallCost],
    holding: Holding,
    *,
    alive: Alive,
    degrees: Degrees,
    device: Device,
    optimizer_state: float,
    boundary_bytes: float,
    kept_output_bytes: float,
) -> dict[str, float]:
    """Bytes by term of MEMORY_TERMS at the fullest moment of a stage.

    Args:
        calls: costs of the stage's calls, in order.
        holding: its parameters.
        alive: how many microbatches it keeps.
        degrees: of the plan.
        device: whose memory it is.
        optimizer_state: bytes per byte of trainable parameter.
        boundary_bytes: tensors on their way to and from other stages, and the batch.
        kept_output_bytes: outputs for other stages that wait for their gradients, per microbatch.
    """
    whole = holding.gradients
    saved = sum(call.saved_bytes for call in calls) + kept_output_bytes
    sharded = degrees.dp_shard > 1
    replicated = degrees.dp_replicate > 1 and not sharded
    several = alive.later > 0
    standing = replicated  # the reducer's buckets are there from the start, and gradients are views of them
    # With one microbatch a unit's gradient is sharded as soon as it is whole.
    grown = holding.gradient_shards if sharded and not several else whole

    moments: list[tuple[float, float, float]] = []  # activations, gradients, workspace
    done = 0.0
    gone = 0.0
    for call, gradient in zip(reversed(calls), reversed(grown), strict=True):
        # The call's activations are still held while its gradients are made.
        done += gradient
        moments.append((alive.first * saved - gone, sum(whole) if standing else done, call.workspace_bytes))
        gone += call.saved_bytes
    if several:
        workspace = max(call.workspace_bytes for call in calls)
        moments.append((alive.later * saved, sum(whole), workspace))
    moments.append((0.0, sum(holding.gradient_shards) if sharded else sum(whole), STEP_COPIES * holding.largest))
    activations, gradients, workspace = max(moments, key=sum)

    buffers = boundary_bytes
    if sharded:
        buffers += (GATHER_COPIES + REDUCE_COPIES) * max(holding.units.values(), default=0.0)
    terms = {
        "parameters": holding.trainable_shard + holding.frozen_shard,
        "gradients": gradients,
        "optimizer": optimizer_state * holding.trainable_shard,
        "activations": activations,
        "buffers": buffers,
    }
    asked = workspace + sum(terms.values())
    return {**terms, "slack": workspace + device.reserved_bytes + device.allocator_share * asked}
