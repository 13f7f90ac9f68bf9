"""Singles: modules divided by themselves, whose result is made whole again: exact whatever surrounds them.

A projection or convolution over its outputs, which are gathered; an embedding over the rows of its table, whose
results are summed. This is what is left where no group is exact, and how vocabularies are divided.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

from weft.capture.groups import Group, Leaf, Unit, degree_for
from weft.capture.numbers import candidates, shared_numbers
from weft.capture.rehearsal import output_dim
from weft.capture.rules import apply
from weft.capture.sharding import Divided, RefusedError, State, tensors_of
from weft.capture.tape import Ref
from weft.plan import TensorStyle

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LEAST = 8
"""Outputs of a module that is worth dividing."""
SMALL = 100
"""Modules with a smaller part of a unit's parameters than one in so many stay whole."""


@dataclass(slots=True)
class SingleSearch:
    """The search in one recorded call; ``taken``: modules that are in groups already. ``refused``: as in PairSearch."""

    unit: Unit
    taken: Collection[str]
    refused: dict[str, str] = field(default_factory=dict)

    def groups(self) -> list[Group]:
        """The singles of the unit."""
        unit, groups = self.unit, []
        total = sum(p.numel() for p in unit.parameters.values())
        for leaf in unit.leaves.values():
            weight = unit.parameters[leaf.weight]
            if leaf.module in self.taken or weight.numel() < total / SMALL:
                continue
            alike = {other.module for other in unit.leaves.values() if other.weight == leaf.weight}
            if not unit.readers.get(leaf.weight, set()) | unit.readers.get(leaf.bias, set()) <= alike:
                self.refused[leaf.module] = "the unit's code uses its weight without calling it"
                continue
            reason = "it has no outputs to divide"
            for name in self._styles(leaf):
                if weight.shape[0 if name == "embedding_rowwise" else _outputs(unit, leaf, name)] < LEAST:
                    reason = f"it has fewer than {LEAST} outputs"
                    continue
                group, reason = self._single(leaf, TensorStyle(name))
                if group is not None:
                    groups.append(group)
                    break
            if reason:
                self.refused[leaf.module] = reason
        return groups

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

    def _single(self, leaf: Leaf, style: TensorStyle) -> tuple[Group | None, str]:
        unit = self.unit
        module = unit.model.get_submodule(leaf.module)
        out = _outputs(unit, leaf, style.name)
        dims = {leaf.weight: out, **({leaf.bias: 0} if leaf.bias else {})}
        if style.name == "embedding_rowwise":
            dims, out = {leaf.weight: 0}, 0
        states: dict[Ref, State] = {}
        try:
            touched = self._follow(leaf, style, dims, states)
        except RefusedError as error:
            return None, str(error)
        size = int(unit.parameters[leaf.weight].shape[out])
        styles = {leaf.module: style}
        sizes: tuple[tuple[str, int], ...] = ()
        values = {size}
        degree = 2 if size % 2 == 0 else degree_for([("features", size)])
        names = candidates(unit.model, leaf.module, [leaf.module], values, degree) if degree else []
        shares, reason = shared_numbers(names, lambda more: unit.try_on_shares({**styles, **more}, {}, degree or 2))
        if reason:
            return None, reason
        if shares:
            sizes = (("features", size),)
        ends = [v.end for v in leaf.visits]
        sent = [unit.cost.forward[end - 1].outputs[0] for end in ends]
        back = [] if isinstance(module, nn.Embedding) else [self._input(leaf, v.start) for v in leaf.visits]
        work = unit.work(touched, states, sent, back)
        return Group(unit.name, {**styles, **shares}, sizes, dims, {unit.kind: work}, () if sizes else (size,)), ""

    def _input(self, leaf: Leaf, start: int) -> Ref:
        own = {leaf.weight, leaf.bias}
        for op in self.unit.cost.forward[start:]:
            for ref in tensors_of(op.args):
                if self.unit.names.get(ref.storage) not in own:
                    return ref
        raise AssertionError("a projection has an input")

    def _follow(self, leaf: Leaf, style: TensorStyle, dims: Mapping[str, int], states: dict[Ref, State]) -> set[int]:
        """Follow the outputs through the module, to where they are gathered.

        Raises:
            RefusedError: they are not its last dimension, or its channels, when they leave.
        """
        unit, touched = self.unit, set()
        weight = unit.parameters[leaf.weight]
        for visit in leaf.visits:
            last: Ref | None = None
            for place in range(visit.start, visit.end):
                op = unit.cost.forward[place]
                refs = tensors_of((op.args, op.kwargs))
                for ref in refs:
                    name = unit.names.get(ref.storage, "")
                    if name in dims and tuple(unit.parameters[name].shape) == ref.size:
                        states.setdefault(ref, Divided(dims[name], (ref.size[dims[name]],)))
                given = {ref: states[ref] for ref in refs if ref in states}
                if style.name == "embedding_rowwise":
                    touched |= {place} if given else set()
                elif given:
                    touched.add(place)
                    for ref, state in zip(op.outputs, apply(op, given), strict=True):
                        if state is not None:
                            states[ref] = state
                last = next(iter(op.outputs), last)
            if style.name == "embedding_rowwise":
                states.clear()
                continue
            end = states.get(last) if last is not None else None
            if last is None or not isinstance(end, Divided) or end.dim != len(last.size) - max(weight.dim() - 1, 1):
                raise RefusedError("its divided outputs are not the last dimension of what it returns")
        return touched


def _outputs(unit: Unit, leaf: Leaf, style: str) -> int:
    return output_dim(unit.model.get_submodule(leaf.module), TensorStyle(style))
