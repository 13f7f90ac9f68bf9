"""Merging: recordings at two sizes of the batch as the calls of a profile, on the line through both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from weft.capture.alignment import Alignment
from weft.capture.groups import Group, Work
from weft.capture.initial import FakeModel
from weft.capture.lines import affine, operations
from weft.capture.profile import LOSS, NO_GROUP, Call, Operation, Output, Recomputed, Saved
from weft.capture.recomputation import Way
from weft.capture.recording import Cost, RecordedCall, Recording, SavedStorage
from weft.capture.tensor import groups_at_both
from weft.plan import RECOMPUTE

NONE = Work()
Found = tuple[list[tuple[Group, Group]], list[tuple[str, str]]]


@dataclass(slots=True)
class Merge:
    """Puts two recordings, of SAMPLES samples, on the line through both; ``plain``: the same in the parameters' own
    precision; ``found``: groups in both, and what was refused, where they are known."""

    fake: FakeModel
    small: Recording
    large: Recording
    plain: tuple[Recording, Recording]
    found: Found | None = None
    groups: list[tuple[Group, Group]] = field(init=False)
    refused: list[tuple[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        if self.found is not None:
            self.groups, self.refused = self.found
            return
        self.groups, self.refused = groups_at_both(*self.plain, self.fake.model)
        if self.plain[0] is not self.small:
            ways = Alignment(self.plain[0], self.small), Alignment(self.plain[1], self.large)
            self.groups = [(ways[0].group(a), ways[1].group(b)) for a, b in self.groups]

    def calls(self) -> tuple[Call, ...]:
        kept: tuple[set[int], set[int]] = (set(), set())
        ways = {mode: Way(mode) for mode in RECOMPUTE}
        kinds: dict[Any, int] = {}
        ours: dict[str, list[int]] = {}
        for index, (group, _) in enumerate(self.groups):
            ours.setdefault(group.unit, []).append(index)
        parameters = {n for n, _ in self.fake.model.named_parameters(remove_duplicate=False) if n in self.fake.names}
        shapes: dict[Any, _Shape] = {}
        calls = []
        for a, b in zip(self.small.calls, self.large.calls, strict=True):
            cost_a, cost_b = self.small.costs[a.kind], self.large.costs[b.kind]
            # A group of modules that are never called works in no call.
            mine = ours.get(a.unit, [])
            works = [(self.groups[i][0].work.get(a.kind, NONE), self.groups[i][1].work.get(b.kind, NONE)) for i in mine]
            # Of the calls of a kind only the numbers of their groups differ.
            same = a.kind, b.kind, *(id(work) for pair in works for work in pair)
            shape = shapes[same] = shapes.get(same) or _Shape.of(cost_a, cost_b, works, ways)
            groups = {NO_GROUP: NO_GROUP, **dict(enumerate(mine))}
            glue_forward = operations(a.glue.forward, b.glue.forward)
            glue_backward = operations(a.glue.backward, b.glue.backward)

            # Before the call's own: of a storage that it keeps either way, the ways do not differ.
            modes = {
                mode: Recomputed(
                    shape.saved(way.keep(0, a, cost_a), way.keep(1, b, cost_b), groups),
                    _numbered(shape.again[mode], groups),
                )
                for mode, way in ways.items()
                if a.name != LOSS
            }
            saved = shape.saved(_keep(a, cost_a, kept[0]), _keep(b, cost_b, kept[1]), groups)
            reads = dict.fromkeys((*a.reads, *a.glue_reads, *b.reads, *b.glue_reads))
            kept_bytes = [sum(s.bytes.at(1) for s in way) for way in (saved, *(m.saved for m in modes.values()))]
            likeness = (a.kind, b.kind, glue_forward, glue_backward, *kept_bytes)
            calls.append(
                Call(
                    name=a.name,
                    unit=a.unit,
                    kind=kinds.setdefault(likeness, len(kinds)),
                    forward=(*glue_forward, *_numbered(shape.forward, groups)),
                    backward=(*_numbered(shape.backward, groups), *glue_backward),
                    saved=saved,
                    inputs=tuple(sorted({*a.sources, *b.sources})),
                    outputs=tuple(
                        Output(affine(x.bytes, y.bytes), x.requires_grad)
                        for x, y in zip(a.tensors, b.tensors, strict=True)
                    ),
                    parameters=tuple(n for n in reads if n in parameters),
                    buffers=tuple(n for n in reads if n not in parameters),
                    workspace_bytes=affine(
                        max(cost_a.workspace_bytes, a.glue.workspace_bytes),
                        max(cost_b.workspace_bytes, b.glue.workspace_bytes),
                    ),
                    recompute=modes,
                )
            )
        assert calls[-1].name == LOSS
        return tuple(calls)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the calls of a kind do; groups are numbered by their order in the unit.

    Attributes:
        forward, backward: operations; ``again``: those done again, by mode of recomputing.
        storages: the group of each divided storage, at both sizes.
    """

    forward: tuple[Operation, ...]
    backward: tuple[Operation, ...]
    again: dict[str, tuple[Operation, ...]]
    storages: tuple[dict[int, int], dict[int, int]]

    @classmethod
    def of(cls, small: Cost, large: Cost, works: Sequence[tuple[Work, Work]], ways: Mapping[str, Way]) -> _Shape:
        divided = {place: i for i, (_, work) in enumerate(works) for place in work.operations}
        nodes = {node: i for i, (_, work) in enumerate(works) for node in work.nodes}
        by_node = {place: nodes[op.node] for place, op in enumerate(large.backward) if op.node in nodes}
        return cls(
            forward=operations(small.forward, large.forward, divided),
            backward=operations(small.backward, large.backward, by_node),
            again={
                mode: operations(small.forward, large.forward, divided, (way.again(small), way.again(large)))
                for mode, way in ways.items()
            },
            storages=(
                {s: i for i, (work, _) in enumerate(works) for s in work.storages},
                {s: i for i, (_, work) in enumerate(works) for s in work.storages},
            ),
        )

    def saved(
        self, small: Sequence[SavedStorage], large: Sequence[SavedStorage], groups: Mapping[int, int]
    ) -> tuple[Saved, ...]:
        """What is kept at both sizes, by group, under other numbers."""
        a, b = _by_group(small, self.storages[0]), _by_group(large, self.storages[1])
        return tuple(Saved(affine(a.get(g, 0), b.get(g, 0)), groups[g]) for g in sorted({*a, *b}))


def _numbered(operations: Sequence[Operation], groups: Mapping[int, int]) -> tuple[Operation, ...]:
    """Operations with other numbers for their groups."""
    return tuple(op if op.group == NO_GROUP else op._replace(group=groups[op.group]) for op in operations)


def _keep(call: RecordedCall, cost: Cost, kept: set[int]) -> list[SavedStorage]:
    """What a call and its glue save, without what an earlier call keeps alive already: its output is the next one's
    input."""
    new = []
    for saved in call.glue.saved:
        if saved.storage not in kept:
            kept.add(saved.storage)
            new.append(saved)
    for saved in cost.saved:
        if saved.argument is not None:
            storage = call.arguments[saved.argument]
            if storage in kept:
                continue
            kept.add(storage)
            saved = replace(saved, bytes=call.argument_bytes[saved.argument])
        if saved.output is not None:
            kept.add(call.outputs[saved.output])
        new.append(saved)
    return new


def _by_group(saved: Sequence[SavedStorage], groups: dict[int, int]) -> dict[int, int]:
    """Bytes saved, by tensor group."""
    result: dict[int, int] = {}
    for s in saved:
        group = groups.get(s.storage, NO_GROUP)
        result[group] = result.get(group, 0) + s.bytes
    return result
