"""Following: one pass over a unit's operations that divides every projection and sees how far the shares go.

What a pass lacks it says, and the next pass has it: that a projection's outputs consist of several stretches (they are
cut later on), or that another parameter has to be divided, too (a bias table of every head).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from weft.capture.frames import RawOp
from weft.capture.groups import Unit
from weft.capture.rules import apply
from weft.capture.shadows import Seed, Shadows
from weft.capture.sharding import CutError, Divided, Partial, RefusedError, State, WantedError, tensors_of
from weft.capture.tape import Ref

PASSES = 12
"""Passes over a unit, at most."""
UNIFORM = frozenset({"aten.zeros", "aten.ones", "aten.full", "aten.new_zeros", "aten.new_ones", "aten.new_full"})
CONSTANT = "@"
"""Seeds that are no parameters have names that begin so."""


class Projection(NamedTuple):
    """A module that multiplies its input by its weight, once; ``input``, ``output``: of the product, features last."""

    module: str
    weight: str
    bias: str
    transposed: bool
    input: Ref
    output: Ref


@dataclass(slots=True)
class Following:
    """A pass. Tags are places of projections, or below zero for seeds.

    Attributes:
        unit, projections: what is followed.
        cuts: known bounds of stretches, by tag.
        seeds: divided parameters, by first name.
        more: whether another pass would know more.
        states: of divided values.
        failed: why tags cannot be divided.
        rows: places of projections that contract divided features, and whose; ``stretches`` of these features.
        touched: operations on divided values, and whose.
        summed: whole parameters whose gradient is partial, and on whose account.
    """

    unit: Unit
    projections: Mapping[int, Projection]
    cuts: dict[int, set[int]] = field(default_factory=dict)
    seeds: dict[str, Seed] = field(default_factory=dict)
    more: bool = False
    states: dict[Ref, State] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    rows: dict[int, frozenset[int]] = field(default_factory=dict)
    stretches: dict[int, tuple[int, ...]] = field(default_factory=dict)
    touched: dict[int, frozenset[int]] = field(default_factory=dict)
    summed: dict[str, frozenset[int]] = field(default_factory=dict)
    _parent: dict[int, int] = field(default_factory=dict)
    _made_of: dict[Ref, frozenset[str]] = field(default_factory=dict)
    _shadows: Shadows = field(default_factory=Shadows)
    _whole: set[str] = field(default_factory=set)
    _written: dict[int, frozenset[int]] = field(default_factory=dict)

    def again(self) -> Following:
        """The next pass, which knows what this one found."""
        return Following(self.unit, self.projections, self.cuts, self.seeds)

    def go(self) -> None:
        """Follow every operation."""
        names = self.unit.names
        biases = {p.bias: place for place, p in self.projections.items() if p.bias}
        for place, op in enumerate(self.unit.cost.forward):
            refs = tensors_of((op.args, op.kwargs))
            for ref in refs:
                self._begin(ref, names.get(ref.storage), biases)
            given = {r: self.states[r] for r in refs if r in self.states}
            tags = frozenset[int]().union(*(s.tags for s in given.values()))
            tags |= frozenset[int]().union(*(self._written.get(r.storage, ()) for r in refs if r not in given))
            if given:
                self.touched[place] = tags
            if any(r.storage in self._written and r not in given for r in refs):
                self._fail(tags, f"{op.name} reads another view of what divided values were written to")
                self._join(tags)
            elif place in self.projections:
                self._project(place, op, given, tags)
            elif given:
                self._apply(op, given, tags)
            self._derive(place, op, refs, given)
        for ref in self.unit.cost.returned:
            if ref in self.states:
                self._fail(self.states[ref].tags, "its features leave the unit")
        for name, tags in self.summed.items():
            self._join(tags)
            if name in self._whole:
                self._fail(tags, f"{name} is used on divided values and on whole ones")

    def components(self) -> dict[int, frozenset[int]]:
        """Tags that meet, by the first of their projections."""
        found: dict[int, set[int]] = {}
        for tag in (*self.projections, *(self._seed_tag(name) for name in self.seeds)):
            found.setdefault(self._root(tag), set()).add(tag)
        return {min((t for t in tags if t >= 0), default=-1): frozenset(tags) for tags in found.values()}

    def parameter(self, tag: int) -> str:
        """The seed of a tag below zero."""
        return list(self.seeds)[-1 - tag]

    def parts(self, place: int, size: int) -> tuple[int, ...]:
        """The stretches of a projection's outputs."""
        bounds = [0, *sorted(self.cuts.get(place, ())), size]
        return tuple(b - a for a, b in itertools.pairwise(bounds))

    def _seed_tag(self, name: str) -> int:
        return -1 - list(self.seeds).index(name)

    def _begin(self, ref: Ref, name: str | None, biases: Mapping[str, int]) -> None:
        """Give a parameter, when it is first read, the state it has or the states it could have."""
        if name is None or ref in self.states or ref in self._made_of:
            return
        parameter = self.unit.parameters.get(name)
        if parameter is None or tuple(parameter.shape) != ref.size:
            return
        if name in self.seeds:
            self.states[ref] = self.seeds[name].state(self._seed_tag(name))
            return
        self._made_of[ref] = frozenset({name})
        if name in biases and ref.size[0] > 1:
            place = biases[name]
            if ref not in tensors_of(self.unit.cost.forward[place].args):
                self.states[ref] = Divided(0, self.parts(place, ref.size[0]), frozenset({place}))
        else:
            self._shadows.begin(ref, name)

    def _project(self, place: int, op: RawOp, given: dict[Ref, State], tags: frozenset[int]) -> None:
        projection = self.projections[place]
        self._parent.setdefault(place, place)
        if given:
            self._join(tags)
            state = given.get(projection.input)
            last = len(projection.input.size) - 1
            if len(given) == 1 and isinstance(state, Divided) and state.dim == last and state.stretches:
                self.rows[place], self.stretches[place] = tags, state.stretches
            else:
                self._fail(tags, f"{projection.module} does not contract the divided features")
        if projection.output.size[-1] > 1:
            parts = self.parts(place, projection.output.size[-1])
            self.states[projection.output] = Divided(len(projection.output.size) - 1, parts, frozenset({place}))

    def _apply(self, op: RawOp, given: dict[Ref, State], tags: frozenset[int]) -> None:
        self._join(tags)
        try:
            results = apply(op, given)
            for ref in op.gradients:
                if ref not in given:
                    self._sum(op, ref, tags)
            if any(isinstance(state, Partial) for state in results):
                raise RefusedError(f"{op.name} sums over the divided features")
        except RefusedError as error:
            self._learn(error, given)
            self._fail(tags, str(error))
            return
        written = op.func._schema.is_mutable
        for ref, state in zip(op.outputs, results, strict=True):
            if state is not None:
                self.states[ref] = state
                if written:
                    self._written[ref.storage] = tags

    def _sum(self, op: RawOp, ref: Ref, tags: frozenset[int]) -> None:
        """A whole parameter works on divided values: its gradient is a part of the sum."""
        names = self._made_of.get(ref)
        if names is None:
            raise RefusedError(f"{op.name} combines divided values with a whole one, whose gradient would be partial")
        for name in names:
            self.summed[name] = self.summed.get(name, frozenset()) | tags

    def _learn(self, error: RefusedError, given: Mapping[Ref, State]) -> None:
        """Note what would make a refused operation exact."""
        if isinstance(error, CutError):
            state = given[error.ref]
            assert isinstance(state, Divided)
            size = error.ref.size[state.dim]
            for tag in state.tags:
                whole = (
                    self.projections[tag].output.size[-1]
                    if tag >= 0
                    else sum(self.seeds[self.parameter(tag)].stretches)
                )
                cuts = {x * (whole // size) for x in error.at if 0 < x < size}
                if whole % size or not cuts:
                    continue
                if tag < 0:
                    name = self.parameter(tag)
                    cut = cut_into(self.seeds[name].stretches, cuts)
                    self.more |= cut != self.seeds[name].stretches
                    self.seeds[name] = self.seeds[name]._replace(stretches=cut)
                elif not cuts <= self.cuts.setdefault(tag, set()):
                    self.cuts[tag] |= cuts
                    self.more = True
        elif isinstance(error, WantedError):
            for name, seed in self._shadows.seeds(error).items():
                if name not in self.seeds:
                    self.seeds[name], self.more = seed, True
                    return

    def _derive(self, place: int, op: RawOp, refs: list[Ref], given: Mapping[Ref, State]) -> None:
        """Follow what is made of parameters alone, whole; and how whole values would be divided, were it they."""
        if given:
            return
        if op.name in UNIFORM:
            self._constant(place, op.outputs[0])
        self._shadows.follow(op, refs)
        sources = [ref for ref in dict.fromkeys(refs) if ref in self._made_of]
        if not sources:
            return
        if not op.gradients <= set(sources) or len(sources) < len({r for r in refs if r.dtype.is_floating_point}):
            self._whole.update(name for ref in sources for name in self._made_of[ref])
            return
        names = frozenset[str]().union(*(self._made_of[ref] for ref in sources))
        for out in op.outputs:
            self._made_of.setdefault(out, names)

    def _constant(self, place: int, ref: Ref) -> None:
        """A tensor of equal numbers is divided by making it smaller, which the unit's code has to do."""
        name = f"{CONSTANT}{place}"
        if name in self.seeds:
            self.states[ref] = Divided(*self.seeds[name], frozenset({self._seed_tag(name)}))
        else:
            self._shadows.begin(ref, name)

    def _root(self, tag: int) -> int:
        while self._parent.setdefault(tag, tag) != tag:
            tag = self._parent[tag]
        return tag

    def _join(self, tags: Iterable[int]) -> None:
        roots = sorted({self._root(tag) for tag in tags})
        self._parent.update(dict.fromkeys(roots[1:], roots[0]) if roots else {})

    def _fail(self, tags: Iterable[int], reason: str) -> None:
        for tag in tags:
            self.failed.setdefault(tag, reason)


def cut_into(stretches: tuple[int, ...], cuts: set[int]) -> tuple[int, ...]:
    bounds = {0, *cuts, *itertools.accumulate(stretches)}
    ordered = sorted(bounds)
    return tuple(b - a for a, b in itertools.pairwise(ordered))
