"""What a stage holds: the parameters that its calls read, as tensor and sharded data parallelism divide them."""

from __future__ import annotations

import math
from typing import NamedTuple

from weft.capture.profile import NO_GROUP, Parameter, Profile
from weft.plan import shard_dim

ROOT = ""
"""Gather group of the parameters that glue reads: they belong to no unit of the stage."""


class Holding(NamedTuple):
    """Parameters of one rank of a stage, in bytes.

    Attributes:
        trainable, frozen: after tensor parallelism, whole along ``dp_shard``; buffers count as frozen.
        trainable_shard, frozen_shard: the same as the fullest rank of ``dp_shard`` keeps them; buffers stay whole.
        tensors: how many trainable parameters.
        largest: bytes of the largest trainable shard, of which an optimizer step makes temporaries.
        units: bytes gathered at once, by unit; ROOT for glue.
        gradients: whole bytes of the gradients that the backward of each call of the stretch completes.
        gradient_shards: the same, sharded.
    """

    trainable: float
    frozen: float
    trainable_shard: float
    frozen_shard: float
    tensors: int
    largest: float
    units: dict[str, float]
    gradients: tuple[float, ...]
    gradient_shards: tuple[float, ...]


class Holdings:
    """What stretches of a profile's calls hold, each worked out once."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._known: dict[tuple[int, int, int, int], Holding] = {}

    def of(self, start: int, end: int, tp: int, dp_shard: int) -> Holding:
        """Parameters that calls ``start`` to ``end`` (exclusive) read, on the fullest of ``tp * dp_shard`` ranks."""
        key = (start, end, tp, dp_shard)
        if key not in self._known:
            self._known[key] = self._holding(start, end, tp, dp_shard)
        return self._known[key]

    def _holding(self, start: int, end: int, tp: int, dp_shard: int) -> Holding:
        calls = self._profile.calls[start:end]
        # The backward goes from the last call to the first: the first reader's completes a parameter's gradient.
        first_reader: dict[str, int] = {}
        for position, call in enumerate(calls):
            for name in (*call.parameters, *call.buffers):
                first_reader.setdefault(name, position)
        units = {call.unit for call in calls}
        gathered: dict[str, float] = {}
        gradients, shards = [0.0] * len(calls), [0.0] * len(calls)
        frozen = frozen_shard = largest = 0.0
        tensors = 0
        buffers = {name for call in calls for name in call.buffers}
        for name, position in first_reader.items():
            parameter = self._profile.parameters[name]
            whole = parameter.bytes / self._tensor_share(parameter, tp)
            shard = whole if name in buffers else whole * padded_share(parameter.shape, dp_shard)
            if name not in buffers:
                unit = calls[position].unit
                group = unit if unit in units and belongs(parameter, unit) else ROOT
                gathered[group] = gathered.get(group, 0.0) + whole
            if parameter.trainable:
                tensors += 1
                largest = max(largest, shard)
                gradients[position] += whole
                shards[position] += shard
            else:
                frozen += whole
                frozen_shard += shard
        return Holding(
            sum(gradients),
            frozen,
            sum(shards),
            frozen_shard,
            tensors,
            largest,
            gathered,
            tuple(gradients),
            tuple(shards),
        )

    def _tensor_share(self, parameter: Parameter, tp: int) -> int:
        if tp == 1 or parameter.group == NO_GROUP or parameter.tensor_dim is None:
            return 1
        return tp if self._profile.tensor_groups[parameter.group].divisible_by(tp) else 1


def belongs(parameter: Parameter, unit: str) -> bool:
    """Whether a parameter lives inside a unit rather than in the glue around it."""
    return any(name.startswith(f"{unit}.") for name in parameter.names)


def padded_share(shape: tuple[int, ...], ranks: int) -> float:
    """Share of a tensor that its fullest rank keeps: ``fully_shard`` pads the last part."""
    rows = shape[shard_dim(shape, ranks)] if shape else 1
    return math.ceil(rows / ranks) / rows if rows else 0.0
