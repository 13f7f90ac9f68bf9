"""What a stage holds: the parameters that its calls read, as tensor and sharded data parallelism divide them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from weft.capture.profile import NO_GROUP, Parameter, Profile
from weft.plan import shard_dim
from weft.planner.communication import expert_shards
from weft.planner.experts import Experts
from weft.planner.space import Degrees

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
        experts: the same of experts that ``ep`` divides, apart from the other parameters.
        gradients: whole bytes of the gradients that the backward of each call of the stretch completes.
        gradient_shards: the same, sharded.
    """

    trainable: float
    frozen: float
    trainable_shard: float
    frozen_shard: float
    tensors: int
    largest: float
    units: Mapping[str, float]
    gradients: tuple[float, ...]
    gradient_shards: tuple[float, ...]
    experts: Mapping[str, float] = MappingProxyType({})


class _Own(NamedTuple):
    """What one parameter adds to its first reader in a stretch, in bytes, or several that only that call reads."""

    trainable: float = 0.0
    frozen: float = 0.0
    trainable_shard: float = 0.0
    frozen_shard: float = 0.0
    tensors: float = 0.0
    largest: float = 0.0
    inside: float = 0.0  # gathered with the call's unit
    outside: float = 0.0  # gathered with ROOT
    apart: float = 0.0  # experts, gathered by themselves

    def plus(self, other: _Own) -> _Own:
        largest = max(self.largest, other.largest)
        return _Own(*(a + b for a, b in zip(self, other, strict=True)))._replace(largest=largest)


class Ways(NamedTuple):
    """How parameters are divided: layers by ``tp``, what of them is left over ``shards``; experts of their own way by
    ``ep``, ``etp`` and ``expert_shards``, as others where ``etp`` is 0."""

    tp: int
    shards: int
    ep: int = 1
    etp: int = 0
    expert_shards: int = 1


class Holdings:
    """What stretches of a profile's calls hold, each worked out once."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._experts = Experts.of(profile).names
        self._known: dict[tuple[int, int, Ways], Holding] = {}
        self._divided: dict[Ways, list[_Own]] = {}
        self._buffers = {name for call in profile.calls for name in call.buffers}
        readers: dict[str, list[int]] = {}
        for index, call in enumerate(profile.calls):
            for name in dict.fromkeys((*call.parameters, *call.buffers)):
                readers.setdefault(name, []).append(index)
        self._own = [[n for n, r in readers.items() if r == [index]] for index in range(len(profile.calls))]
        self._shared = {name: found for name, found in readers.items() if len(found) > 1}
        self._contents = [self.own(index) for index in range(len(profile.calls))]
        self._first = {content: index for index, content in reversed(list(enumerate(self._contents)))}

    def of(self, start: int, end: int, tp: int, dp_shard: int) -> Holding:
        """Parameters that calls ``start`` to ``end`` (exclusive) read, on the fullest of ``tp * dp_shard`` ranks."""
        return self._of(start, end, Ways(tp, dp_shard))

    def _of(self, start: int, end: int, ways: Ways) -> Holding:
        key = (start, end, ways)
        if key not in self._known:
            self._known[key] = self._holding(start, end, ways)
        return self._known[key]

    def own(self, index: int) -> tuple[object, ...]:
        """What tells the parameters that only this call reads from those of another call."""
        unit = self._profile.calls[index].unit
        parameters = [(name, self._profile.parameters[name]) for name in self._own[index]]
        return tuple(
            (
                *(p.shape, p.bytes, p.trainable, p.tensor_dim),
                *(self._sizes(p), belongs(p, unit), name in self._buffers, name in self._experts),
            )
            for name, p in parameters
        )

    def shared_by(self, index: int) -> bool:
        """Whether this call reads a parameter that others read too."""
        return any(index in readers for readers in self._shared.values())

    def _sizes(self, parameter: Parameter) -> object:
        if parameter.group == NO_GROUP:
            return None
        group = self._profile.tensor_groups[parameter.group]
        return group.sizes, group.uneven

    def tied(self, stretches: Sequence[tuple[int, int]], mine: set[int]) -> float:
        """Bytes of trainable parameters that stretches with these numbers read, and others too."""
        total = 0.0
        for name, readers in self._shared.items():
            parameter = self._profile.parameters[name]
            if parameter.trainable:
                homes = {s for s, (start, end) in enumerate(stretches) if any(start <= r < end for r in readers)}
                total += parameter.bytes * bool(homes & mine and homes - mine)
        return total

    def joined(self, stretches: Sequence[tuple[int, int]], degrees: Degrees, shards: int) -> Holding:
        """What several stretches of one device hold together, whose parameters ``shards`` ranks divide."""
        ways = Ways(degrees.tp, shards)
        if degrees.parts != degrees.tp or degrees.ep > 1:
            ways = Ways(degrees.tp, shards, degrees.ep, degrees.etp or degrees.tp, expert_shards(degrees, shards))
        parts = [self._of(*stretch, ways) for stretch in stretches]
        if len(parts) == 1:
            return parts[0]
        units, experts = (Counter[str](), Counter[str]())
        for part in parts:
            units.update(part.units)
            experts.update(part.experts)
        return Holding(
            sum(part.trainable for part in parts),
            sum(part.frozen for part in parts),
            sum(part.trainable_shard for part in parts),
            sum(part.frozen_shard for part in parts),
            sum(part.tensors for part in parts),
            max(part.largest for part in parts),
            units,
            tuple(gradient for part in parts for gradient in part.gradients),
            tuple(gradient for part in parts for gradient in part.gradient_shards),
            experts,
        )

    def _holding(self, start: int, end: int, ways: Ways) -> Holding:
        if ways not in self._divided:
            sums = {content: self._sum(index, self._own[index], ways) for content, index in self._first.items()}
            self._divided[ways] = [sums[content] for content in self._contents]
        parts = self._divided[ways][start:end]
        # The backward goes from the last call to the first: the first reader's completes a parameter's gradient.
        for name, readers in self._shared.items():
            first = next((r for r in readers if r >= start), end)
            if first < end:
                parts[first - start] = parts[first - start].plus(self._sum(first, [name], ways))
        gathered: dict[str, float] = {}
        experts: dict[str, float] = {}
        for call, part in zip(self._profile.calls[start:end], parts, strict=True):
            for unit, size in ((call.unit, part.inside), (ROOT, part.outside)):
                if size:
                    gathered[unit] = gathered.get(unit, 0.0) + size
            if part.apart:
                experts[call.unit] = experts.get(call.unit, 0.0) + part.apart
        return Holding(
            sum(part.trainable for part in parts),
            sum(part.frozen for part in parts),
            sum(part.trainable_shard for part in parts),
            sum(part.frozen_shard for part in parts),
            round(sum(part.tensors for part in parts)),
            max((part.largest for part in parts), default=0.0),
            gathered,
            tuple(part.trainable for part in parts),
            tuple(part.trainable_shard for part in parts),
            experts,
        )

    def _sum(self, index: int, names: Sequence[str], ways: Ways) -> _Own:
        """What parameters add that this call reads first."""
        unit, total = self._profile.calls[index].unit, _Own()
        for name in names:
            parameter = self._profile.parameters[name]
            expert = ways.etp > 0 and name in self._experts
            shape, shards = parameter.shape, ways.expert_shards if expert else ways.shards
            if expert:
                shape = (max(1, shape[0] // ways.ep), *shape[1:])
            whole = parameter.bytes / self._tensor_share(parameter, ways.etp if expert else ways.tp)
            whole /= ways.ep if expert else 1
            buffer = name in self._buffers
            shard = whole if buffer else whole * padded_share(shape, shards)
            inside = bool(unit) and belongs(parameter, unit)
            total = total.plus(
                _Own(
                    trainable=whole * parameter.trainable,
                    frozen=whole * (not parameter.trainable),
                    trainable_shard=shard * parameter.trainable,
                    frozen_shard=shard * (not parameter.trainable),
                    tensors=int(parameter.trainable),
                    largest=shard * parameter.trainable,
                    inside=whole * (inside and not buffer and not expert),
                    outside=whole * (not inside and not buffer and not expert),
                    apart=whole * expert,
                )
            )
        return total

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
