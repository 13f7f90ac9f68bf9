"""Groups: the search for tensor groups in one recorded call of a unit. tensor.py says what they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_unflatten

from weft.capture.blame import first_line
from weft.capture.isolation import restored, snapshot
from weft.capture.operations import StandIns
from weft.capture.recording import Cost, Example, TensorLeaf
from weft.capture.sharding import Divided, RefusedError, apply, tensors_of
from weft.capture.tape import Ref
from weft.plan import TensorStyle

GATHERING = ("colwise_gather_output", "colwise_rep", "colwise_gather")
"""Names in use for a projection divided over its outputs, which are then gathered."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A module that multiplies its input by its weight, once.

    Attributes:
        module: its name in the model.
        weight, bias: first names of its parameters; bias may be "".
        transposed: whether the weight is [in, out].
        input, output: of the product, features last.
    """

    module: str
    weight: str
    bias: str
    transposed: bool
    input: Ref
    output: Ref

    def dims(self, column: bool) -> dict[str, int]:
        """The dimension of each parameter that is divided."""
        dims = {self.weight: int(column) if self.transposed else 1 - int(column)}
        return {**dims, self.bias: 0} if column and self.bias else dims

    def style(self, column: bool) -> TensorStyle:
        """Its style, one of plan.STYLES."""
        return TensorStyle(("colwise" if column else "rowwise") + ("_transposed" if self.transposed else ""))


@dataclass(frozen=True, slots=True)
class Work:
    """Divided operations of a forward, by their place in it; their autograd nodes; divided storages."""

    operations: frozenset[int]
    nodes: frozenset[int]
    storages: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Group:
    """A tensor group at one size of the batch; see profile.TensorGroup.

    Attributes:
        unit: the unit.
        styles: module name to style.
        sizes: what the degree must divide.
        dims: the divided dimension of each parameter, by first name.
        forward_bytes, backward_bytes: what is all-reduced or gathered.
        work: what is divided in a call, by the kind of the call.
    """

    unit: str
    styles: dict[str, TensorStyle]
    sizes: tuple[tuple[str, int], ...]
    dims: dict[str, int]
    forward_bytes: int
    backward_bytes: int
    work: dict[int, Work]


@dataclass(slots=True)
class UnitSearch:
    """The search in one recorded call."""

    kind: int
    example: Example
    cost: Cost
    model: nn.Module
    names: dict[int, str]
    first: dict[str, str]
    divided: dict[Ref, Divided] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    parent: dict[int, int] = field(default_factory=dict)
    rows: dict[int, frozenset[int]] = field(default_factory=dict)
    touched: dict[int, frozenset[int]] = field(default_factory=dict)

    def groups(self) -> tuple[list[Group], list[tuple[str, str]]]:
        projections = self._projections()
        self._follow(projections)
        components: dict[int, list[int]] = {}
        for tag in projections:
            components.setdefault(self._root(tag), []).append(tag)
        used: set[int] = set()
        groups: list[Group] = []
        reasons: dict[int, str] = {}
        for columns in components.values():
            rows = [row for row, tags in self.rows.items() if not tags.isdisjoint(columns)]
            bad = [self.failed[tag] for tag in columns if tag in self.failed]
            if not rows and not bad:
                bad = ["its features are divided nowhere else"]
            if bad:
                reasons.update((tag, bad[0]) for tag in columns)
                continue
            if used.intersection((*columns, *rows)) or set(columns) & set(rows):
                reasons.update((tag, "it ends another group") for tag in columns)
                continue
            group = self._group([projections[c] for c in columns], [projections[r] for r in rows], frozenset(columns))
            failure = self._try(group, [projections[c] for c in columns], [projections[r] for r in rows])
            if failure:
                reasons.update((tag, failure) for tag in columns)
                continue
            used.update(columns, rows)
            groups.append(group)
        # What would end a group is told with the group.
        left = [tag for tag in reasons if tag not in used and tag not in self.rows]
        return groups, [(projections[tag].module, reasons[tag]) for tag in left]

    def _projections(self) -> dict[int, Projection]:
        """Projections by the place of their product in the forward."""
        modules = dict(self.model.get_submodule(self.example.unit).named_modules())
        owners: dict[str, list[str]] = {}
        for name in modules:
            path = _join(self.example.unit, name)
            for key, _ in modules[name].named_parameters(recurse=False):
                owners.setdefault(self.first[_join(path, key)], []).append(path)
        reads: dict[str, int] = {}
        for op in self.cost.forward:
            if op.kind != "view":
                for name in {self.names.get(r.storage, "") for r in tensors_of((op.args, op.kwargs))}:
                    reads[name] = reads.get(name, 0) + 1
        result = {}
        for place, op in enumerate(self.cost.forward):
            if op.name not in ("aten.mm", "aten.addmm"):
                continue
            x, matrix = tensors_of(op.args)[-2:]
            weight = self.names.get(matrix.storage)
            if weight is None or x.storage in self.names or reads[weight] != 1 or len(owners.get(weight, ())) != 1:
                continue
            path = owners[weight][0]
            own = {self.first[_join(path, key)]: p for key, p in self.model.get_submodule(path).named_parameters()}
            biases = [name for name in own if name != weight]
            if len(biases) > 1 or any(own[b].dim() != 1 for b in biases) or own[weight].dim() != 2:
                continue
            transposed = matrix.stride == own[weight].stride()
            bias = biases[0] if biases else ""
            result[place] = Projection(path, weight, bias, transposed, x, op.outputs[0])
        return result

    def _follow(self, projections: Mapping[int, Projection]) -> None:
        """Divide every projection by its outputs and see how far the features go."""
        for place, op in enumerate(self.cost.forward):
            given = {r: self.divided[r] for r in tensors_of((op.args, op.kwargs)) if r in self.divided}
            tags = frozenset[int]().union(*(d.tags for d in given.values()))
            if given:
                self.touched[place] = tags
            if place in projections:
                projection = projections[place]
                if given:
                    self._join_tags(tags)
                    last = len(projection.input.size) - 1
                    if set(given) == {projection.input} and given[projection.input][:2] == (last, 1):
                        self.rows[place] = tags
                    else:
                        self._fail(tags, f"{projection.module} does not contract the divided features")
                self.parent.setdefault(place, place)
                if projection.output.size[-1] > 1:
                    self.divided[projection.output] = Divided(len(projection.output.size) - 1, 1, frozenset({place}))
                continue
            if not given:
                continue
            names = {projections[tag].bias for tag in tags}
            biases = frozenset(r for r in tensors_of(op.args) if self.names.get(r.storage) in names - {""})
            try:
                for ref, state in zip(op.outputs, apply(op, given, biases), strict=True):
                    if state is not None:
                        self.divided[ref] = state
            except RefusedError as error:
                self._fail(tags, str(error))
            self._join_tags(tags)
        for ref in self.cost.returned:
            if ref in self.divided:
                self._fail(self.divided[ref].tags, "its features leave the unit")

    def _group(self, columns: list[Projection], rows: list[Projection], tags: frozenset[int]) -> Group:
        divided = {ref: d for ref, d in self.divided.items() if d.tags <= tags}
        features = {c.output.size[-1] for c in columns}
        runs = {ref.size[d.dim] // d.outer for ref, d in divided.items() if d.outer > 0} - features
        heads = {n for n in runs if n < min(features)}
        places = frozenset(place for place, t in self.touched.items() if t & tags) | tags
        pieces = [p.dims(True) for p in columns] + [p.dims(False) for p in rows]
        return Group(
            unit=self.example.unit,
            styles={p.module: p.style(column) for ps, column in ((columns, True), (rows, False)) for p in ps},
            sizes=_sizes(heads, features),
            dims={name: dim for piece in pieces for name, dim in piece.items()},
            forward_bytes=sum(map(_bytes, (p.output for p in rows))),
            backward_bytes=sum(map(_bytes, {p.input for p in columns})),  # projections of one tensor share its gradient
            work={self.kind: Work(places, self._nodes(places), frozenset(ref.storage for ref in divided))},
        )

    def _nodes(self, places: frozenset[int]) -> frozenset[int]:
        """Autograd nodes of operations. One that made no node shows the last one made, which is an earlier
        operation's."""
        makers: dict[int, int] = {}
        for place, op in enumerate(self.cost.forward):
            makers.setdefault(op.node, place)
        return frozenset(node for node, place in makers.items() if place in places)

    def whole(self, unit: str, styles: Mapping[str, str]) -> Group | None:
        """The group of a unit that is a single module, if a style for it makes its result whole again."""
        style = next((s for pattern, s in styles.items() if isinstance(s, str) and fnmatchcase(unit, pattern)), None)
        work = [place for place, op in enumerate(self.cost.forward) if op.kind != "view"]
        if len(work) != 1 or f"{unit}.weight" not in self.first:
            return None
        ((place,), weight) = work, self.first[f"{unit}.weight"]
        op = self.cost.forward[place]
        result = tensors_of(op.outputs)[0]
        shape = self.model.get_parameter(weight).shape
        done = {self.kind: Work(frozenset({place}), self._nodes(frozenset({place})))}
        if style == "embedding_rowwise" and op.name == "aten.embedding":
            sizes, dims = (("vocabulary", int(shape[0])),), {weight: 0}
            return Group(unit, {unit: TensorStyle(style)}, sizes, dims, _bytes(result), 0, done)
        if style in GATHERING and place in (projections := self._projections()):
            p = projections[place]
            if p.transposed or p.module != self.example.unit:
                return None
            sizes, dims = (("features", int(shape[0])),), {weight: 0}
            if p.bias:
                dims[self.first[f"{unit}.bias"]] = 0
            spent = _bytes(result), _bytes(p.input)
            return Group(unit, {unit: TensorStyle("colwise_gather")}, sizes, dims, *spent, done)
        return None

    def _try(self, group: Group, columns: list[Projection], rows: list[Projection]) -> str:
        """Run the unit on shares; why it fails, or ""."""
        common = math.gcd(*(size for _, size in group.sizes))
        degree = next((n for n in range(2, common + 1) if common % n == 0), 0)
        if not degree:
            return ""  # no degree divides it, which the sizes tell
        unit = self.model.get_submodule(self.example.unit)
        mode: FakeTensorMode = next(p for p in unit.parameters()).fake_mode  # type: ignore[attr-defined] # fake
        called: list[str] = []
        try:
            stand_ins = StandIns()  # type: ignore[no-untyped-call] # in torch
            with mode, stand_ins, torch.no_grad(), restored(unit):
                for p in columns:
                    _divide(self.model.get_submodule(p.module), p.module, called, degree, column=True)
                for p in rows:
                    _divide(self.model.get_submodule(p.module), p.module, called, degree, column=False)
                args, kwargs = tree_unflatten([_fake(x) for x in self.example.arguments], self.example.spec)
                result = unit(*args, **kwargs)
        except Exception as error:  # the user's code on sizes it may not expect: any failure means it cannot be divided
            return f"the unit's code does not run on 1/{degree} of the features: {first_line(error)}"
        if sorted(called) != sorted(group.styles):
            return "the unit's code uses the weights without calling their modules"
        shapes = [tuple(x.shape) for x in tree_leaves(result) if isinstance(x, Tensor)]
        if shapes != [ref.size for ref in self.cost.returned]:
            return f"the unit's outputs change shape on 1/{degree} of the features"
        return ""

    def _root(self, tag: int) -> int:
        while self.parent[tag] != tag:
            tag = self.parent[tag]
        return tag

    def _join_tags(self, tags: Iterable[int]) -> None:
        roots = sorted({self._root(tag) for tag in tags})
        self.parent.update(dict.fromkeys(roots[1:], roots[0]) if roots else {})

    def _fail(self, tags: Iterable[int], reason: str) -> None:
        for tag in tags:
            self.failed.setdefault(tag, reason)


def _divide(module: nn.Module, name: str, called: list[str], degree: int, *, column: bool) -> None:
    """Let a projection give a share of its features, or take one."""
    original = module.forward

    def forward(x: Tensor) -> Any:
        called.append(name)
        if column:
            whole = original(x)
            return whole.narrow(-1, 0, whole.shape[-1] // degree).contiguous()
        return original(torch.cat([x] * degree, -1))

    module.__dict__["forward"] = forward


def _fake(value: Any) -> Any:
    if isinstance(value, TensorLeaf):
        return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device_type)
    return snapshot(value)


def _sizes(heads: set[int], features: set[int]) -> tuple[tuple[str, int], ...]:
    named = [("heads" if n == max(heads) else "key/value heads", n) for n in sorted(heads, reverse=True)]
    return (*named, *(("features", n) for n in sorted(features)))


def _bytes(ref: Ref) -> int:
    return math.prod(ref.size) * ref.dtype.itemsize


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
