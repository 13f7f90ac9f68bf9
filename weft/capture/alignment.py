"""Alignment: what was found in a recording in the parameters' own precision, in one of the same model in a lower one.

What can be divided does not depend on the precision, but autocast's casts stand between operations and hide it: a
projection no longer multiplies by its weight but by a copy. So tensor groups are looked for without them, and carried
over: the operations of both recordings are the same in the same order, but for the casts. A cast whose result is
divided is divided itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher

import torch

from weft.capture.frames import RawOp
from weft.capture.groups import Group, Work
from weft.capture.recording import Recording
from weft.capture.sharding import tensors_of
from weft.capture.tape import Ref


@dataclass(slots=True)
class Alignment:
    """Two recordings of one batch.

    Attributes:
        plain: in the parameters' own precision.
        lower: in a lower one.
        works: of groups carried over, by kind and what it was; the blocks of a kind share theirs.
    """

    plain: Recording
    lower: Recording
    kinds: dict[int, int] = field(init=False)
    works: dict[tuple[int, Work], Work] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        calls = zip(self.plain.calls, self.lower.calls, strict=True)
        self.kinds = {a.kind: b.kind for a, b in calls}

    def group(self, group: Group) -> Group:
        """A group of the plain recording, as one of the lower; what it exchanges are results of lower products."""
        for key in group.work.items():
            if key not in self.works:
                self.works[key] = self._work(*key)
        return replace(group, work={self.kinds[kind]: self.works[kind, work] for kind, work in group.work.items()})

    def _work(self, kind: int, work: Work) -> Work:
        before, after = self.plain.costs[kind].forward, self.lower.costs[self.kinds[kind]].forward
        places: dict[int, int] = {}
        storages: dict[int, set[int]] = {}
        matcher = SequenceMatcher(None, [op.name for op in before], [op.name for op in after], autojunk=False)
        for i, j, length in matcher.get_matching_blocks():
            for a, b in zip(range(i, i + length), range(j, j + length), strict=True):
                places[a] = b
                for x, y in zip(_refs(before[a]), _refs(after[b]), strict=False):
                    storages.setdefault(x.storage, set()).add(y.storage)
        divided = {new for old in work.storages for new in storages.get(old, ())}
        casts = {
            place
            for place, op in enumerate(after)
            if op.name == "aten._to_copy" and any(ref.storage in divided for ref in op.outputs)
        }
        operations = {places[place] for place in work.operations if place in places} | casts
        return replace(
            work,
            operations=frozenset(operations),
            nodes=_nodes(after, operations),
            storages=frozenset(divided),
            sent=tuple(map(halved, work.sent)),
            back=tuple(map(halved, work.back)),
        )


def halved(ref: Ref) -> Ref:
    """What a product gives in a lower precision; both have two bytes."""
    return ref._replace(dtype=torch.bfloat16) if ref.dtype is torch.float32 else ref


def _refs(op: RawOp) -> list[Ref]:
    return [*op.outputs, *tensors_of((op.args, op.kwargs))]


def _nodes(forward: Iterable[RawOp], places: set[int]) -> frozenset[int]:
    """Autograd nodes of operations: each belongs to the first that shows it."""
    makers: dict[int, int] = {}
    for place, op in enumerate(forward):
        makers.setdefault(op.node, place)
    return frozenset(node for node, place in makers.items() if place in places)
