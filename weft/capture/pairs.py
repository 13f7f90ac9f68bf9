"""Pairs: groups between projections divided over their outputs and projections that contract these.

Divided over its outputs (*column*), a projection leaves every rank with some of the features; rules follow these
through the unit until other projections contract them (*row*) and the ranks' partial results are added up. Columns
whose features meet form one group with the rows that end them: query, key, value and output; gate, up and down.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from weft.capture.following import CONSTANT, PASSES, Following, Projection
from weft.capture.groups import Group, Unit, degree_for
from weft.capture.numbers import candidates, shared_numbers
from weft.capture.sharding import Divided, tensors_of
from weft.plan import TensorStyle


@dataclass(slots=True)
class PairSearch:
    """The search in one recorded call; ``refused``: projections that are in no group, and why."""

    unit: Unit
    refused: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def groups(self) -> list[Group]:
        """The groups of the unit."""
        projections = self._projections()
        passing = Following(self.unit, projections)
        passing.go()
        for _ in range(PASSES):
            if not passing.more:
                break
            passing = passing.again()
            passing.go()
        groups = []
        taken: set[int] = set()
        for _, met in sorted(passing.components().items()):
            tags, columns = met, sorted(tag for tag in met if tag >= 0)
            if not columns:
                continue
            rows = [row for row, whose in passing.rows.items() if whose & tags]
            reason = next((passing.failed[tag] for tag in sorted(tags) if tag in passing.failed), "")
            if not rows and not reason:
                reason = "its features are divided nowhere else"
            if not reason and (taken.intersection((*columns, *rows)) or set(columns) & set(rows)):
                reason = "it ends another group"
            if not reason:
                group, reason = self._group(passing, tags, columns, rows)
                if group is not None:
                    taken.update(columns, rows)
                    groups.append(group)
            if reason:
                self.refused.update((projections[tag].module, reason) for tag in columns)
        self.used = {projections[place].module for place in taken}
        ends = {projections[row].module for row in passing.rows}
        # What would end a group is told with the group.
        self.refused = {m: why for m, why in self.refused.items() if m not in self.used and m not in ends}
        return groups

    def _projections(self) -> dict[int, Projection]:
        """Projections by the place of their product in the forward."""
        result = {}
        for leaf in self.unit.leaves.values():
            if not leaf.plain or len(leaf.visits) != 1 or self.unit.readers.get(leaf.weight) != {leaf.module}:
                continue
            for place in range(leaf.visits[0].start, leaf.visits[0].end):
                op = self.unit.cost.forward[place]
                if op.name not in ("aten.mm", "aten.addmm"):
                    continue
                x, matrix = tensors_of(op.args)[-2:]
                if self.unit.names.get(matrix.storage) != leaf.weight or x.storage in self.unit.names:
                    continue
                transposed = matrix.stride == self.unit.parameters[leaf.weight].stride()
                result[place] = Projection(leaf.module, leaf.weight, leaf.bias, transposed, x, op.outputs[0])
        return dict(sorted(result.items()))

    def _group(
        self, passing: Following, tags: frozenset[int], columns: list[int], rows: list[int]
    ) -> tuple[Group | None, str]:
        unit = self.unit
        states = {ref: state for ref, state in passing.states.items() if state.tags <= tags}
        styles: dict[str, TensorStyle] = {}
        dims: dict[str, int] = {}
        for places, column in ((columns, True), (rows, False)):
            for place in places:
                p = passing.projections[place]
                parts = passing.parts(place, p.output.size[-1]) if column else passing.stretches[place]
                styles[p.module] = _style(column, p.transposed, parts)
                dims[p.weight] = int(column) if p.transposed else 1 - int(column)
                if column and p.bias:
                    dims[p.bias] = 0
        for tag in sorted(tags):
            if tag < 0:
                name = passing.parameter(tag)
                if name.startswith(CONSTANT):
                    continue
                dim, stretches = passing.seeds[name]
                for alias in unit.aliases(name):
                    styles[alias] = TensorStyle("shard", stretches if len(stretches) > 1 else (), dim)
                dims[name] = dim
        for name, whose in passing.summed.items():
            if whose & tags:
                styles.update((alias, TensorStyle("sum_gradient")) for alias in unit.aliases(name)[:1])
        lengths = {n for s in states.values() if isinstance(s, Divided) for n in s.stretches}
        features = {n for c in columns for n in passing.parts(c, passing.projections[c].output.size[-1])}
        sizes = _sizes(lengths, features)
        if not degree_for(sizes):
            return None, ", ".join(f"{n} {what}" for what, n in sizes) + " have no common divisor"
        degree = degree_for(sizes)
        values = {v for s in states.values() if isinstance(s, Divided) for v in (sum(s.stretches), *s.stretches)}
        names = candidates(unit.model, unit.name, styles, unit.plain, values, degree)
        shares, reason = shared_numbers(names, lambda more: unit.try_on_shares({**styles, **more}, states, degree))
        if reason:
            return None, reason
        divided = frozenset(place for place, t in passing.touched.items() if t & tags) | {*columns}
        sent = [passing.projections[r].output for r in rows]
        back = [passing.projections[c].input for c in columns]  # projections of one tensor share its gradient
        work = unit.work(divided, {ref.storage for ref in states}, sent, back)
        return Group(unit.name, {**styles, **shares}, sizes, dims, {unit.kind: work}), ""


def _style(column: bool, transposed: bool, parts: tuple[int, ...]) -> TensorStyle:
    name = ("colwise" if column else "rowwise") + ("_transposed" if transposed else "")
    return TensorStyle(name, parts if len(parts) > 1 else ())


def _sizes(lengths: set[int], features: set[int]) -> tuple[tuple[str, int], ...]:
    heads = {n for n in lengths if n < min(features)}
    named = [("heads" if n == max(heads) else "key/value heads", n) for n in sorted(heads, reverse=True)]
    return (*named, *(("features", n) for n in sorted((lengths | features) - heads)))
