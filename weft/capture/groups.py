"""Groups: what tensor parallelism divides together, and the modules it divides. tensor.py says how they are found."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import nn

from weft.capture.comparison import differs
from weft.capture.recording import Cost, Example
from weft.capture.rehearsal import Run, Step, Visit, join, rehearse
from weft.capture.sharding import State, tensors_of
from weft.capture.tape import Ref
from weft.plan import TensorStyle


@dataclass(frozen=True, slots=True)
class Work:
    """Divided operations of a forward, by their place in it; their autograd nodes; divided storages; and what is
    all-reduced or gathered in the forward (``sent``) and in the backward (``back``)."""

    operations: frozenset[int] = frozenset()
    nodes: frozenset[int] = frozenset()
    storages: frozenset[int] = frozenset()
    sent: tuple[Ref, ...] = ()
    back: tuple[Ref, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """A tensor group at one size of the batch; see profile.TensorGroup.

    Attributes:
        unit: the unit.
        styles: names of modules, parameters and numbers, to their styles.
        sizes: what the degree must divide.
        uneven: lengths that are cut as ``torch.chunk`` cuts them: no rank may be left without.
        dims: the divided dimension of each parameter, by first name.
        work: what is divided in a call, by the kind of the call.
    """

    unit: str
    styles: dict[str, TensorStyle]
    sizes: tuple[tuple[str, int], ...]
    dims: dict[str, int]
    work: dict[int, Work]
    uneven: tuple[int, ...] = ()

    @property
    def forward_bytes(self) -> int:
        """Bytes all-reduced or gathered in a forward of one call."""
        return _bytes(next(iter(self.work.values()), Work()).sent)

    @property
    def backward_bytes(self) -> int:
        """Likewise in the backward."""
        return _bytes(next(iter(self.work.values()), Work()).back)


class Leaf(NamedTuple):
    """A module with a weight of its own.

    Attributes:
        weight, bias: first names of its parameters; bias may be "".
        visits: its calls.
        plain: whether it multiplies by its weight, adds its bias, and does nothing else.
    """

    module: str
    weight: str
    bias: str
    visits: tuple[Visit, ...]
    plain: bool


VIEWS = frozenset({"aten.t", "aten.view", "aten._unsafe_view", "aten.reshape", "aten.transpose", "aten.permute"})
PLAIN = (["aten.mm"], ["aten.addmm"], ["aten.mm", "aten.add"])


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
KNOWN_FORWARDS = {kind.forward for kind in (nn.Embedding, *CONVOLUTIONS)}
"""Forwards without code of the user's."""


@dataclass(slots=True)
class Unit:
    """One recorded call of a unit, as the searches in it see it.

    Attributes:
        kind: of the call.
        example, cost: its arguments and operations.
        model: the model, fake.
        names: first names of parameters and buffers, by storage.
        first: every name of a parameter to its first.
        run: the unit rehearsed whole: one step for each operation. An error in it means there is nothing to search.
        leaves: modules with one weight, by name.
        readers: modules whose code reads each parameter (the innermost).
        parameters: the unit's, by first name.
    """

    kind: int
    example: Example
    cost: Cost
    model: nn.Module
    names: dict[int, str]
    first: dict[str, str]
    run: Run = field(init=False)
    leaves: dict[str, Leaf] = field(init=False, default_factory=dict)
    readers: dict[str, set[str]] = field(init=False, default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for key, parameter in self.model.get_submodule(self.name).named_parameters():
            self.parameters[self.first[join(self.name, key)]] = parameter
        self.run = rehearse(self.model, self.example, self.cost.forward, {}, 1, frozenset())
        names = [op.name for op in self.cost.forward]
        if not self.run.error and names != [step.name for step in self.run.steps]:
            self.run.error = "it does not do the same twice"
        for place, op in enumerate(self.cost.forward):
            inside = self.run.steps[place].inside if not self.run.error else ()
            for ref in tensors_of((op.args, op.kwargs)):
                if ref.storage in self.names:
                    self.readers.setdefault(self.names[ref.storage], set()).add(inside[-1] if inside else "")
        if not self.run.error:
            self._find_leaves()

    @property
    def name(self) -> str:
        """The unit's name."""
        return self.example.unit

    @property
    def steps(self) -> Sequence[Step]:
        """The rehearsed steps."""
        return self.run.steps

    @property
    def plain(self) -> frozenset[str]:
        """Leaves that only multiply and add."""
        return frozenset(name for name, leaf in self.leaves.items() if leaf.plain)

    @property
    def opaque(self) -> frozenset[str]:
        """Leaves whose inside is known: that they do on shares what they should needs no comparing."""
        return self.plain | {
            name for name in self.leaves if type(self.model.get_submodule(name)).forward in KNOWN_FORWARDS
        }

    def own(self, module: str) -> dict[str, nn.Parameter]:
        """A module's own parameters, by first name."""
        parameters = self.model.get_submodule(module).named_parameters(recurse=False)
        return {self.first[join(module, key)]: p for key, p in parameters}

    def aliases(self, name: str) -> list[str]:
        """The names that the parameter with this first name has in the unit."""
        registered = self.model.get_submodule(self.name).named_parameters(remove_duplicate=False)
        return [join(self.name, key) for key, _ in registered if self.first[join(self.name, key)] == name]

    def reads(self, place: int) -> set[str]:
        """Parameters and buffers an operation reads."""
        op = self.cost.forward[place]
        return {self.names[r.storage] for r in tensors_of((op.args, op.kwargs)) if r.storage in self.names}

    def work(
        self, places: Collection[int], storages: Collection[int], sent: Sequence[Ref], back: Sequence[Ref]
    ) -> Work:
        """The work of a group: these operations, with these values divided."""
        made: dict[int, int] = {}
        for place, op in enumerate(self.cost.forward):
            # An operation that made no autograd node shows the last one made, which is an earlier operation's.
            made.setdefault(op.node, place)
        return Work(
            frozenset(places),
            frozenset(node for node, place in made.items() if place in places),
            frozenset(storages),
            tuple(dict.fromkeys(sent)),
            tuple(dict.fromkeys(back)),
        )

    def try_on_shares(
        self, styles: Mapping[str, TensorStyle], states: Mapping[Ref, State], degree: int
    ) -> tuple[int, str]:
        """Rehearse the unit with these styles; how far it does as the whole, and why not further."""
        run = rehearse(self.model, self.example, self.cost.forward, styles, degree, self.plain)
        styled = frozenset(n for n in styles if n in self.opaque)
        count, reason = differs(self.steps, run, self.cost.forward, states, styled, degree)
        if not reason and run.shapes != [ref.size for ref in self.cost.returned]:
            reason = f"the unit's outputs change shape on 1/{degree} of the features"
        return count, reason

    def _find_leaves(self) -> None:
        visits: dict[str, list[Visit]] = {}
        for visit in self.run.visits:
            visits.setdefault(visit.module, []).append(visit)
        for module, calls in visits.items():
            own = self.own(module)
            matrices = [name for name, p in own.items() if p.dim() > 1]
            others = [name for name in own if name not in matrices]
            if len(matrices) != 1 or len(others) > 1 or any(own[name].dim() != 1 for name in others):
                continue
            if next(self.model.get_submodule(module).children(), None) is not None:
                continue
            work = [[self.steps[i].name for i in range(v.start, v.end)] for v in calls]
            products = all([name for name in names if name not in VIEWS] in PLAIN for names in work)
            plain = products and own[matrices[0]].dim() == 2
            self.leaves[module] = Leaf(module, matrices[0], others[0] if others else "", tuple(calls), plain)


def degree_for(sizes: Sequence[tuple[str, int]]) -> int:
    """The smallest degree that divides all sizes; 0 if none does, 2 if there is nothing to divide."""
    common = math.gcd(*(size for _, size in sizes)) if sizes else 2
    return next((n for n in range(2, common + 1) if common % n == 0), 0)


def _bytes(refs: Sequence[Ref]) -> int:
    """Bytes of tensors."""
    return sum(math.prod(ref.size) * ref.dtype.itemsize for ref in refs)


def renamed(group: Group, unit: str, model: nn.Module, first: Mapping[str, str]) -> Group:
    """A group of one unit as that of another unit of the same kind."""
    if group.unit == unit:
        return group
    registered = dict(model.get_submodule(group.unit).named_parameters(remove_duplicate=False))
    dims = {}
    for key in registered:
        old = first[join(group.unit, key)]
        if old in group.dims:
            dims[first[join(unit, key)]] = group.dims[old]
    styles = {unit + name[len(group.unit) :]: style for name, style in group.styles.items()}
    return replace(group, unit=unit, styles=styles, dims=dims)
