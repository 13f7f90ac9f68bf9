"""Singles: modules divided by themselves, whose result is made whole again: exact whatever surrounds them.

A projection or convolution over its outputs, which are gathered; an embedding over the rows of its table, whose
results are summed. This is what is left where no group is exact, and how vocabularies are divided.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from weft.capture.groups import CONVOLUTIONS, Group, Leaf, Unit, degree_for
from weft.capture.numbers import candidates, shared_numbers
from weft.capture.rehearsal import Visit, join
from weft.capture.rules import apply
from weft.capture.sharding import Divided, RefusedError, State, tensors_of
from weft.capture.shares import output_dim
from weft.capture.tape import Ref
from weft.plan import TensorStyle

LEAST = 8
"""Outputs of a module that is worth dividing."""
SMALL = 100
"""Modules with a smaller part of a unit's parameters than one in so many stay whole."""


class Single(NamedTuple):
    """A module and how it is divided: its outputs, the divided dimension of its parameters, operations, and values
    inside it."""

    leaf: Leaf
    style: TensorStyle
    size: int
    dims: dict[str, int]
    places: set[int]
    states: dict[Ref, State]


@dataclass(slots=True)
class SingleSearch:
    """The search in one recorded call; ``taken``: modules that are in groups already. ``refused``: as in PairSearch."""

    unit: Unit
    taken: Collection[str]
    refused: dict[str, str] = field(default_factory=dict)

    def groups(self) -> list[Group]:
        """The singles of the unit."""
        unit = self.unit
        total = sum(p.numel() for p in unit.parameters.values())
        found: list[list[Single]] = []
        for leaf in unit.leaves.values():
            if leaf.module in self.taken or unit.parameters[leaf.weight].numel() < total / SMALL:
                continue
            alike = {other.module for other in unit.leaves.values() if other.weight == leaf.weight}
            if not unit.readers.get(leaf.weight, set()) | unit.readers.get(leaf.bias, set()) <= alike:
                self.refused[leaf.module] = "the unit's code uses its weight without calling it"
            elif proposals := self._proposals(leaf):
                found.append(proposals)
        first = {singles[0].leaf.module: singles[0].style for singles in found}
        inside = {ref: state for singles in found for ref, state in singles[0].states.items()}
        even = all(self._any_size(singles[0]) or singles[0].size % 2 == 0 for singles in found)
        if first and even and not unit.try_on_shares(first, inside, 2)[1]:
            return [self._group(singles[0], {}) for singles in found]
        groups = []
        for singles in found:  # something in one of them: by themselves, then, with numbers of the module's
            for single in singles:
                shares, reason = self._tried(single)
                if not reason:
                    groups.append(self._group(single, shares))
                    break
                self.refused[single.leaf.module] = reason
        return groups

    def _proposals(self, leaf: Leaf) -> list[Single]:
        """Ways to divide a module, best first."""
        unit, result = self.unit, []
        reason = "it has no outputs to divide"
        for name in self._styles(leaf):
            rows = name == "embedding_rowwise"
            out = 0 if rows else output_dim(unit.model.get_submodule(leaf.module), TensorStyle(name))
            dims = {leaf.weight: out, **({leaf.bias: 0} if leaf.bias and not rows else {})}
            size = int(unit.parameters[leaf.weight].shape[out])
            if size < LEAST:
                reason = f"it has fewer than {LEAST} outputs"
                continue
            try:
                places, states = self._follow(leaf, rows, dims)
            except RefusedError as error:
                reason = str(error)
                continue
            result.append(Single(leaf, TensorStyle(name), size, dims, places, states))
        if not result:
            self.refused[leaf.module] = reason
        return result

    def _styles(self, leaf: Leaf) -> list[str]:
        """Names of styles to try, best first."""
        module = self.unit.model.get_submodule(leaf.module)
        if isinstance(module, nn.Embedding):
            special = module.max_norm or module.scale_grad_by_freq or module.sparse
            reading = {
                op.name
                for v in leaf.visits
                for op in self.unit.cost.forward[v.start : v.end]
                if any(self.unit.names.get(ref.storage) == leaf.weight for ref in tensors_of(op.args))
            }
            own = reading == {"aten.embedding"}
            rows = ["embedding_rowwise"] if own and not special else []
            return [*rows, "colwise_gather_transposed"]
        if isinstance(module, CONVOLUTIONS):
            return ["colwise_gather"]
        if self.unit.parameters[leaf.weight].dim() != 2:
            return []
        return ["colwise_gather", "colwise_gather_transposed"]

    def _tried(self, single: Single) -> tuple[dict[str, TensorStyle], str]:
        unit, module = self.unit, single.leaf.module
        degree = degree_for([("outputs", single.size)])
        names = candidates(unit.model, module, [module], unit.plain, {single.size}, degree) if degree else []
        styles = {module: single.style}
        if not self._any_size(single) and not degree:
            return {}, f"no degree divides its {single.size} outputs"
        return shared_numbers(names, lambda more: unit.try_on_shares({**styles, **more}, single.states, degree or 2))

    def _any_size(self, single: Single) -> bool:
        """Whether any number of outputs can be cut: those of a module without code that might count them."""
        return single.leaf.module in self.unit.opaque or single.style.name == "embedding_rowwise"

    def _group(self, single: Single, shares: Mapping[str, TensorStyle]) -> Group:
        unit, leaf = self.unit, single.leaf
        sent = [unit.cost.forward[v.end - 1].outputs[0] for v in leaf.visits]
        table = isinstance(unit.model.get_submodule(leaf.module), nn.Embedding)
        back = [] if table else [ref for v in leaf.visits for ref in self._input(leaf, v)]
        return Group(
            unit=unit.name,
            styles={leaf.module: single.style, **shares},
            sizes=() if self._any_size(single) else (("outputs", single.size),),
            dims=dict(single.dims),
            work={unit.kind: unit.work(single.places, {ref.storage for ref in single.states}, sent, back)},
            uneven=(single.size,) if self._any_size(single) else (),
        )

    def _input(self, leaf: Leaf, visit: Visit) -> list[Ref]:
        """What goes into a module, if anything does (a table of positions takes nothing)."""
        own = {leaf.weight, leaf.bias}
        for op in self.unit.cost.forward[visit.start : visit.end]:
            for ref in tensors_of(op.args):
                if self.unit.names.get(ref.storage) not in own and ref.dtype.is_floating_point:
                    return [ref]
        return []

    def _follow(self, leaf: Leaf, rows: bool, dims: Mapping[str, int]) -> tuple[set[int], dict[Ref, State]]:
        """Follow the outputs through the module to where they are gathered: divided operations and values.

        Raises:
            RefusedError: they are not the last dimension, or the channels, of all that leaves.
        """
        unit, touched, inside = self.unit, set[int](), dict[Ref, State]()
        for visit in leaf.visits:
            states: dict[Ref, State] = {}
            for place in range(visit.start, visit.end):
                op = unit.cost.forward[place]
                refs = tensors_of((op.args, op.kwargs))
                for ref in refs:
                    name = unit.names.get(ref.storage, "")
                    if name in dims and tuple(unit.parameters[name].shape) == ref.size:
                        states.setdefault(ref, Divided(dims[name], (ref.size[dims[name]],)))
                given = {ref: states[ref] for ref in refs if ref in states}
                if given:
                    touched.add(place)
                if given and not rows:
                    for ref, state in zip(op.outputs, apply(op, given), strict=True):
                        if state is not None:
                            states[ref] = state
            if rows:
                continue
            inside.update(states)
            last = unit.cost.forward[visit.end - 1].outputs[0]
            end = states.get(last)
            channels = len(last.size) - max(unit.parameters[leaf.weight].dim() - 1, 1)
            whole = visit.returned != unit.steps[visit.end - 1].made[:1]
            if whole or not isinstance(end, Divided) or end.dim != channels:
                raise RefusedError("its divided outputs are not the last dimension of what it returns")
        return touched, inside


def unread(units: Sequence[str], model: nn.Module, first: Mapping[str, str], read: Collection[str]) -> Iterator[Group]:
    """Singles of modules that the recorded forward does not call (a tower for images, on text): all that is theirs.

    Args:
        units: names of the units.
        model: the model.
        first: every name of a parameter to its first.
        read: first names of parameters that something reads.
    """
    forwards = {nn.Linear.forward: "colwise_gather", nn.Embedding.forward: "embedding_rowwise"}
    forwards |= {kind.forward: "colwise_gather" for kind in CONVOLUTIONS}
    for unit in units:
        for name, module in model.get_submodule(unit).named_modules(prefix=unit):
            style = forwards.get(type(module).forward)
            own = {key: p for key, p in module.named_parameters(recurse=False)}
            if style is None or "weight" not in own or any(first[join(name, key)] in read for key in own):
                continue
            rows = style == "embedding_rowwise"
            out = 0 if rows else output_dim(module, TensorStyle(style))
            size = own["weight"].shape[out]
            if size >= LEAST and getattr(module, "groups", 1) == 1 and not getattr(module, "max_norm", None):
                dims = {first[join(name, key)]: out if key == "weight" else 0 for key in own}
                yield Group(unit, {name: TensorStyle(style)}, (), dims, {}, (size,))
