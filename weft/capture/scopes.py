"""Scopes: modules that multiply by weights of their own more than once, as a mixture's experts do.

Their parameters are divided one by one, so that what leaves the module is partial on every rank, and is summed there
(style ``reduce``). What enters is whole; since everything that leaves is a sum over shares, the gradient of whatever is
whole inside is a part of a sum: of what entered it is summed at the entrance, of whole parameters with
``sum_gradient``.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from weft.capture.following import PASSES, cut_into
from weft.capture.groups import Group, Unit, degree_for
from weft.capture.numbers import candidates, shared_numbers
from weft.capture.rehearsal import Visit
from weft.capture.rules import apply
from weft.capture.shadows import ONCE, Seed, Shadows
from weft.capture.sharding import CutError, Divided, OnceError, Partial, RefusedError, State, WantedError, tensors_of
from weft.capture.tape import Ref
from weft.plan import TensorStyle

ZEROS = frozenset({"aten.zeros_like", "aten.zeros", "aten.new_zeros", "aten.zero_"})


@dataclass(slots=True)
class ScopeSearch:
    """The search in one recorded call; ``taken``: modules that are in groups already. ``refused``: as in PairSearch."""

    unit: Unit
    taken: set[str]
    refused: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def groups(self) -> list[Group]:
        """The scopes of the unit."""
        groups = []
        total = sum(p.numel() for p in self.unit.parameters.values())
        for visit in self.unit.run.visits:
            name = visit.module
            own = self.unit.own(name)
            matrices = [n for n, p in own.items() if p.dim() > 1]
            if name in self.unit.leaves or sum(own[n].numel() for n in matrices) < total / 100:
                continue
            if any(other == name or other.startswith(f"{name}.") for other in self.taken):
                continue
            if sum(v.module == name for v in self.unit.run.visits) > 1:
                self.refused[name] = "it is called more than once in a unit"
                continue
            reason = ""
            for seed in matrices:
                for dim in reversed(range(own[seed].dim())):
                    group, why = self._try(visit, seed, dim)
                    reason = reason or why
                    if group is not None:
                        break
                else:
                    continue
                break
            else:
                self.refused[name] = reason
                continue
            groups.append(group)
            self.used.update(v.module for v in self.unit.run.visits if visit.start <= v.start and v.end <= visit.end)
        return groups

    def _try(self, visit: Visit, seed: str, dim: int) -> tuple[Group | None, str]:
        size = self.unit.parameters[seed].shape[dim]
        seeds = {seed: Seed(dim, (size,))}
        scope = Scope(self.unit, visit, seeds)
        for _ in range(PASSES):
            scope = Scope(self.unit, visit, seeds)
            try:
                scope.go()
                break
            except (CutError, OnceError, WantedError) as error:
                if not scope.learn(error):
                    return None, str(error)
            except RefusedError as error:
                return None, str(error)
        else:
            return None, "it divides its parameters in too many ways"
        return self._group(visit, scope)

    def _group(self, visit: Visit, scope: Scope) -> tuple[Group | None, str]:
        unit = self.unit
        inside = {v.module for v in unit.run.visits if visit.start <= v.start and v.end <= visit.end}
        styles = {visit.module: TensorStyle("reduce")}
        for name in (*scope.seeds, *scope.whole):
            if not unit.readers[name] <= inside:
                return None, f"{name} is used outside, too"
            seed = scope.seeds.get(name)
            if seed is None or seed == ONCE:
                styles[unit.aliases(name)[0]] = TensorStyle("first_rank" if seed else "sum_gradient")
                continue
            parts = seed.stretches if len(seed.stretches) > 1 else ()
            styles.update((alias, TensorStyle("shard", parts, seed.dim)) for alias in unit.aliases(name))
        lengths = {n for s in scope.states.values() if isinstance(s, Divided) for n in s.stretches}
        sizes = tuple(("features", n) for n in sorted(lengths))
        degree = degree_for(sizes)
        if not degree:
            return None, f"{', '.join(map(str, sorted(lengths)))} features have no common divisor"
        values = {v for s in scope.states.values() if isinstance(s, Divided) for v in (sum(s.stretches), *s.stretches)}
        names = [
            n
            for n in candidates(unit.model, unit.name, styles, unit.plain, values, degree)
            if n.startswith(f"{visit.module}.")
        ]
        shares, reason = shared_numbers(names, lambda m: unit.try_on_shares({**styles, **m}, scope.states, degree))
        if reason:
            return None, reason
        dims = {name: seed.dim for name, seed in scope.seeds.items() if seed != ONCE}
        work = unit.work(scope.touched, {ref.storage for ref in scope.states}, scope.outputs, scope.inputs)
        return Group(unit.name, {**styles, **shares}, sizes, dims, {unit.kind: work}), ""


class Scope:
    """One pass over the operations of a module's call."""

    def __init__(self, unit: Unit, visit: Visit, seeds: dict[str, Seed]) -> None:
        self.unit, self.visit, self.seeds = unit, visit, seeds
        self.states: dict[Ref, State] = {}
        self.touched: set[int] = set()
        self.whole: dict[str, None] = {}
        self.outputs: list[Ref] = []
        self.inputs: list[Ref] = []
        self._shadows = Shadows()

    def go(self) -> None:
        """Follow the operations.

        Raises:
            RefusedError: what leaves would not be a sum over shares.
        """
        unit, visit = self.unit, self.visit
        zeros: set[Ref] = set()
        made: set[int] = set()
        written: set[int] = set()
        storages: dict[int, Ref] = {}
        entered = set(visit.given)
        for place in range(visit.start, visit.end):
            op, step = unit.cost.forward[place], unit.steps[place]
            refs = tensors_of((op.args, op.kwargs))
            for ref, storage in zip(refs, step.given, strict=True):
                self._begin(ref)
                if ref in op.gradients and ref.storage not in made and ref.storage not in unit.names:
                    if storage not in entered:
                        raise RefusedError("it works on values that are not given to it")
                    self.inputs.append(ref)
            given = {ref: self.states[ref] for ref in refs if ref in self.states}
            if any(ref.storage in written and ref not in given for ref in refs):
                raise RefusedError(f"{op.name} reads another view of what divided values were written to")
            names = {unit.names[ref.storage] for ref in refs if ref in op.gradients and ref.storage in unit.names}
            self.whole.update(dict.fromkeys(sorted(names - set(self.seeds))))
            results: list[State | None] = [None] * len(op.outputs)
            if given:
                self.touched.add(place)
                results = apply(op, given, zeros)
            elif op.name in ZEROS:
                zeros.update(op.outputs)
            elif op.func._schema.is_mutable:
                zeros.difference_update(op.outputs)
            for ref, storage, state in zip(op.outputs, step.made, results, strict=True):
                made.add(ref.storage)
                storages[storage] = ref
                if state is not None:
                    self.states[ref] = state
                    zeros.discard(ref)
                    if op.func._schema.is_mutable:
                        written.add(ref.storage)
            if not given and sum(r.dtype.is_floating_point for r in dict.fromkeys(refs)) == 1:
                self._shadows.follow(op, refs)
        for storage in visit.returned:
            if storage not in storages:
                raise RefusedError("it returns what it was given")
            ref = storages[storage]
            if ref.dtype.is_floating_point and not isinstance(self.states.get(ref), Partial):
                raise RefusedError("not all that it returns is a sum over the divided features")
            self.outputs.append(ref)
        if not any(isinstance(self.states.get(ref), Partial) for ref in self.outputs):
            raise RefusedError("nothing that it returns is a sum over the divided features")

    def learn(self, error: CutError | OnceError | WantedError) -> bool:
        """Divide what would make a refused operation exact; whether there is such."""
        if isinstance(error, CutError):
            state = self.states[error.ref]
            assert isinstance(state, Divided)
            size = error.ref.size[state.dim]
            for tag in state.tags:
                name = list(self.seeds)[tag]
                seed = self.seeds[name]
                whole = sum(seed.stretches)
                cut = cut_into(seed.stretches, {x * (whole // size) for x in error.at})
                if whole % size == 0 and cut != seed.stretches:
                    self.seeds[name] = seed._replace(stretches=cut)
                    return True
            return False
        found = self._shadows.seeds(error)
        self.seeds.update(itertools.islice(found.items(), 1))
        return bool(found)

    def _begin(self, ref: Ref) -> None:
        name = self.unit.names.get(ref.storage)
        if name is None or ref in self.states or ref in self._shadows.known:
            return
        parameter = self.unit.parameters.get(name)
        if parameter is None or tuple(parameter.shape) != ref.size:
            return
        if name in self.seeds:
            self.states[ref] = self.seeds[name].state(list(self.seeds).index(name))
        else:
            self._shadows.begin(ref, name)
