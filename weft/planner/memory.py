"""Bytes on a device of each stage, at the fullest moment of a step.

A device keeps its parameters and optimizer state throughout. Activations come and go with the microbatches, and
gradients appear as the backward goes on, so the fullest moment is one of

    backward    the first backward: ``alive`` microbatches' activations, minus what the backward has already let go,
                plus the gradients that it has completed so far
    accumulate  a later microbatch while all gradients are kept
    step        no activations, all gradients, and the temporaries of the optimizer

Every moment adds its own workspace. How many microbatches are alive follows from the schedule's own list of actions
(``alive``).

How data parallelism keeps gradients: replicas in buckets that live from step to step; sharded optimizers (ZeRO,
Rajbhandari et al. 2020) by their stage:

    zero  parameters                          gradients
    1     whole for a step                    whole until the last microbatch reduces them
    2     whole for a step                    each microbatch's are reduced and kept in shards
    3     whole while a unit computes         as 2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from weft.cluster.topology import Device
from weft.planner.compute import CallCost
from weft.planner.holdings import Holding
from weft.planner.system import WEFT, System
from weft.schedule import ORDERS, Kind

GATHER_COPIES = 3.0
"""Largest units that ``fully_shard`` holds gathered: the one computing, the next, and the buffer it arrives in."""

REDUCE_COPIES = 2.0
"""Largest units' gradients in flight: the whole gradient, and its copy in the order of the reduce-scatter."""

STEP_COPIES = 2.0
"""Temporaries of a single-tensor optimizer step, in sizes of its largest parameter."""


class Held(NamedTuple):
    """What the fullest devices of a stage hold, beside what they have.

    Attributes:
        bytes: at the fullest moment.
        limit: their memory.
        terms: bytes by term of MEMORY_TERMS.
    """

    bytes: float
    limit: int
    terms: Mapping[str, float]

    @property
    def fits(self) -> bool:
        """Whether their memory is enough."""
        return self.bytes <= self.limit

    @property
    def order(self) -> tuple[float, float]:
        """By which one is fuller than another."""
        return self.bytes / self.limit, self.bytes


class Alive(NamedTuple):
    """Microbatches whose activations a chunk keeps: when the device's first backward begins, and afterwards when most
    are kept."""

    first: int
    later: int


@lru_cache(maxsize=65536)
def alive(schedule: str, device: int, devices: int, microbatches: int, chunks: int = 1) -> tuple[Alive, ...]:
    """Microbatches alive by chunk of a device; ``later`` is 0 where the first backward is the last action.

    A backward in two parts lets go of activations with the second.
    """
    if schedule == "gpipe":
        return (Alive(microbatches, microbatches - 1),)
    if schedule == "zero_bubble":
        return _followed(schedule, device, devices, microbatches)
    # Forwards that come before the first backward; after it, one of each in turn.
    ahead = devices - 1 - device if chunks == 1 else 2 * (devices - 1 - device) + (chunks - 1) * devices
    total = microbatches * chunks
    done = min(ahead + 1, total)
    first, later = (_by_chunk(forwards, devices, chunks) for forwards in (done, min(done + 1, total)))
    later[-1] -= 1
    return tuple(Alive(f, n) for f, n in zip(first, later, strict=True))


def _by_chunk(forwards: int, devices: int, chunks: int) -> list[int]:
    """The first forwards of a device by its chunks, which take turns with as many microbatches as there are devices."""
    whole, rest = divmod(forwards, devices * chunks)
    return [whole * devices + min(max(rest - chunk * devices, 0), devices) for chunk in range(chunks)]


def _followed(schedule: str, device: int, devices: int, microbatches: int) -> tuple[Alive, ...]:
    """The same, found by following the device's actions."""
    # More microbatches than a pipeline takes to fill keep no more.
    order = ORDERS[schedule](device, devices, min(microbatches, 2 * devices + microbatches % devices))
    ends = Kind.WEIGHT if any(action.kind is Kind.WEIGHT for action in order) else Kind.BACKWARD
    now = first = later = 0
    for action in order:
        now += action.kind is Kind.FORWARD
        later = max(later, now) if first else 0
        if action.kind is ends:
            first = first or now
            now -= 1
    return (Alive(first, later),)


class Footprint(NamedTuple):
    """What a device holds, for any number of microbatches that it keeps.

    Attributes:
        saved: activations of one microbatch, by chunk.
        backward: the fullest moment of the first backward: activations that are gone by then, gradients, workspace.
        accumulate: gradients and workspace while a later microbatch is computed; None where there is none.
        step: gradients and temporaries of the optimizer's step.
        parameters, optimizer, buffers: bytes by term.
        device: whose memory it is.
    """

    saved: tuple[float, ...]
    backward: tuple[float, float, float]
    accumulate: tuple[float, float] | None
    step: tuple[float, float]
    parameters: float
    optimizer: float
    buffers: float
    device: Device

    def terms(self, alive: Sequence[Alive]) -> dict[str, float]:
        """Bytes by term of MEMORY_TERMS at the fullest moment, with so many microbatches kept by each chunk."""
        gone, *others = self.backward
        moments = [(sum([a.first * s for a, s in zip(alive, self.saved, strict=True)]) - gone, *others)]
        if self.accumulate:
            moments.append((sum([a.later * s for a, s in zip(alive, self.saved, strict=True)]), *self.accumulate))
        moments.append((0.0, *self.step))
        activations, gradients, workspace = max(moments, key=sum)
        terms = {
            "parameters": self.parameters,
            "gradients": gradients,
            "optimizer": self.optimizer,
            "activations": activations,
            "buffers": self.buffers,
        }
        asked = workspace + sum(terms.values())
        terms["slack"] = workspace + self.device.reserved_bytes + self.device.allocator_share * asked
        return terms


def footprint(
    chunks: Sequence[Sequence[CallCost]],
    holding: Holding,
    *,
    several: bool,
    sharded: bool,
    copied: bool,
    device: Device,
    optimizer_state: float,
    boundary_bytes: float,
    kept_output_bytes: Sequence[float],
    zero: int = 3,
    system: System = WEFT,
    item_bytes: float = 4.0,
) -> Footprint:
    """What a device holds.

    Args:
        chunks: costs of the device's calls, in order, by chunk.
        holding: its parameters.
        several: there are microbatches after the first backward.
        sharded: parameters' state is divided over ranks.
        copied: there are several replicas of it.
        device: whose memory it is.
        optimizer_state: bytes per byte of trainable parameter.
        boundary_bytes: tensors on their way to and from other stages, and the batch.
        kept_output_bytes: outputs for other stages that wait for their gradients, per microbatch, by chunk.
        zero: stage of the sharded optimizer.
        system: whose conventions.
        item_bytes: of an element of a trainable parameter.
    """
    kept = 1.0 if system.gradient_bytes is None else system.gradient_bytes / item_bytes
    whole = kept * holding.trainable
    # The reducer's buckets are there from the start, and gradients are views of them.
    standing = copied and not sharded
    if system.standing_gradients is not None:
        standing = system.standing_gradients
    shards = sharded and (zero >= 2 or not (several or standing))
    everything = kept * holding.trainable_shard if shards else whole
    grown = holding.gradient_shards if shards else holding.gradients

    last = chunks[-1]  # whose backward is the first
    moments: list[tuple[float, float, float]] = []
    done = gone = 0.0
    for call, gradient in zip(reversed(last), reversed(grown[len(grown) - len(last) :]), strict=True):
        # The call's activations are still held while its gradients are made.
        done += kept * gradient
        moments.append((gone, everything if standing else done, call.workspace_bytes))
        gone += call.saved_bytes
    step = STEP_COPIES * holding.largest if system.step_bytes is None else 0.0

    buffers, largest = boundary_bytes, max((*holding.units.values(), *holding.experts.values()), default=0.0)
    gathered = 1.0 if system.gather_bytes is None else system.gather_bytes / item_bytes
    parameters = holding.trainable_shard + holding.frozen_shard
    if sharded and zero == 3:
        buffers += GATHER_COPIES * gathered * largest
    elif sharded:
        parameters = parameters * system.shards_beside + gathered * (holding.trainable + holding.frozen)
    if sharded and not standing:
        buffers += REDUCE_COPIES * (system.reduce_bytes or item_bytes) / item_bytes * largest
    state = optimizer_state if system.state_bytes is None else system.state_bytes / item_bytes
    return Footprint(
        saved=tuple(sum(c.saved_bytes for c in calls) + k for calls, k in zip(chunks, kept_output_bytes, strict=True)),
        backward=max(moments, key=lambda moment: moment[1] + moment[2] - moment[0]),
        accumulate=(everything, max(c.workspace_bytes for calls in chunks for c in calls)) if several else None,
        step=(kept * holding.trainable_shard if sharded and not standing else everything, step),
        parameters=parameters,
        optimizer=state * holding.trainable_shard,
        buffers=buffers,
        device=device,
    )
