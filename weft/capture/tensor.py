"""What tensor parallelism can divide, found in the recorded operations of a model's units.

In each unit, in this order:

- *pairs*: projections divided over their outputs, and those that contract these features (pairs.py);
- *scopes*: modules that multiply by several weights of their own, as experts do (scopes.py);
- *singles*: whatever is left, divided by itself, its result made whole again (singles.py).

What is divided is exact by rules about operators (rules.py) and because the unit, run on shares, does what the whole
unit does (rehearsal.py). A parameter that several modules use is divided if all of them divide it alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from weft.capture.groups import Group, Unit, Work, renamed
from weft.capture.isolation import quiet, restored
from weft.capture.pairs import PairSearch
from weft.capture.recording import Cost, Recording
from weft.capture.rehearsal import join
from weft.capture.scopes import ScopeSearch
from weft.capture.sharding import tensors_of
from weft.capture.shares import WHOLE
from weft.capture.singles import SingleSearch, unread
from weft.plan import TensorStyle

Refusals = list[tuple[str, str]]
GLUE = "code between units"


def tensor_groups(recording: Recording, model: nn.Module) -> tuple[list[Group], Refusals]:
    """Groups of every unit, and ``(module, reason)`` of modules with weights that are in none.

    Args:
        recording: of the model.
        model: the model it was recorded from, still fake.
    """
    first = _first_names(model)
    with quiet(), restored(model):
        return _Search(recording, model, first).go()


def groups_at_both(small: Recording, large: Recording, model: nn.Module) -> tuple[list[tuple[Group, Group]], Refusals]:
    """The groups found in a recording, with what they divide in another one, of more samples."""
    groups, refused = tensor_groups(small, model)
    kinds: dict[int, int] = {}
    for a, b in zip(small.calls, large.calls, strict=True):
        kinds.setdefault(a.kind, b.kind)
    works: dict[tuple[int, Work], Work] = {}
    pairs = []
    for group in groups:
        found = {}
        for kind, work in group.work.items():
            if (kind, work) not in works:
                works[kind, work] = _elsewhere(work, small.costs[kind], large.costs[kinds[kind]])
            found[kinds[kind]] = works[kind, work]
        pairs.append((group, replace(group, work=found)))
    return pairs, refused


def _elsewhere(work: Work, here: Cost, there: Cost) -> Work:
    """The work of a group in another recording of the same operations, on more samples."""
    if [op.name for op in here.forward] != [op.name for op in there.forward]:
        return Work(sent=work.sent, back=work.back)  # other operations: only what is sent is known, about
    refs = {
        a: b
        for x, y in zip(here.forward, there.forward, strict=True)
        for a, b in zip(
            (*tensors_of((x.args, x.kwargs)), *x.outputs), (*tensors_of((y.args, y.kwargs)), *y.outputs), strict=True
        )
    }
    storages = {a.storage: b.storage for a, b in refs.items()}
    nodes = {x.node: y.node for x, y in zip(here.forward, there.forward, strict=True)}
    return Work(
        work.operations,
        frozenset(nodes[n] for n in work.nodes),
        frozenset(storages[s] for s in work.storages),
        tuple(refs[ref] for ref in work.sent),
        tuple(refs[ref] for ref in work.back),
    )


class _Search:
    def __init__(self, recording: Recording, model: nn.Module, first: Mapping[str, str]) -> None:
        self.recording, self.model, self.first = recording, model, dict(first)
        self.found: dict[int, tuple[Unit, list[Group]]] = {}
        self.singles: dict[tuple[int, frozenset[str]], list[Group]] = {}
        self.reasons: dict[int, dict[str, str]] = {}
        self.refused: dict[str, str] = {}

    def go(self) -> tuple[list[Group], Refusals]:
        kinds: dict[str, list[int]] = {}
        for call in self.recording.calls[:-1]:
            kinds.setdefault(call.unit, []).append(call.kind)
        groups: list[Group] = []
        for unit, own in kinds.items():
            found = list(dict.fromkeys(own))
            together = self._common(unit, [self._of_kind(kind)[1] for kind in found])
            taken = {name for group in together for name in group.styles}
            groups += together
            groups += self._common(unit, [self._singles(kind, unit, taken) for kind in found])
        groups += unread(self.recording.units, self.model, self.first, set(self._readers()))
        groups = self._at_one_degree(self._whole_ties(groups))
        return self._with_aliases(groups), list(self.refused.items())

    def _common(self, unit: str, per_kind: list[list[Group]]) -> list[Group]:
        """Groups of a unit that is called in several ways: those that suit them all."""
        ways = [[renamed(g, unit, self.model, self.first) for g in groups] for groups in per_kind]
        result = []
        for group in ways[0]:
            alike = [g for others in ways for g in others if g.styles == group.styles]
            if len(alike) == len(ways):
                result.append(replace(group, work={k: w for g in alike for k, w in g.work.items()}))
        return result

    def _of_kind(self, kind: int) -> tuple[Unit, list[Group]]:
        """A recorded call as the searches see it, and its pairs and scopes."""
        if kind not in self.found:
            recording = self.recording
            example, cost = recording.examples[kind], recording.costs[kind]
            unit = Unit(kind, example, cost, self.model, recording.names, self.first)
            groups: list[Group] = []
            if unit.run.error:
                self.refused[unit.name] = f"it cannot be run again on shares: {unit.run.error}"
            else:
                pairs = PairSearch(unit)
                groups += pairs.groups()
                scopes = ScopeSearch(unit, pairs.used)
                groups += scopes.groups()
                self.reasons[kind] = {**scopes.refused, **pairs.refused}
            self.found[kind] = unit, groups
        return self.found[kind]

    def _singles(self, kind: int, called: str, taken: set[str]) -> list[Group]:
        """Singles of a kind beside what is divided together in a unit of it."""
        unit, _ = self._of_kind(kind)
        if unit.run.error:
            return []
        scopes = [name for name in taken if self._is_scope(name)]
        inside = {m for m in unit.leaves if any(_in(called + m[len(unit.name) :], scope) for scope in scopes)}
        mine = frozenset(unit.name + name[len(called) :] for name in taken) | inside
        if (kind, mine) not in self.singles:
            search = SingleSearch(unit, mine)
            self.singles[kind, mine] = search.groups()
            done = {name for group in self.singles[kind, mine] for name in group.styles} | mine
            for module, reason in {**search.refused, **self.reasons[kind]}.items():
                if module not in done:
                    self.refused.setdefault(module, reason)
        return self.singles[kind, mine]

    def _is_scope(self, name: str) -> bool:
        return any(
            group.styles[name].name == "reduce"
            for _, groups in self.found.values()
            for group in groups
            if name in group.styles
        )

    def _readers(self) -> dict[str, set[tuple[str, str]]]:
        """Who reads each parameter: (unit, module), by first name."""
        readers: dict[str, set[tuple[str, str]]] = {}
        known: set[tuple[str, int]] = set()
        for call in self.recording.calls:
            for name in call.glue_reads:
                readers.setdefault(name, set()).add((GLUE, ""))
            if not call.unit or (call.unit, call.kind) in known:
                continue
            known.add((call.unit, call.kind))
            unit = self._of_kind(call.kind)[0]
            own: dict[str, str] = {}
            for key, _ in self.model.get_submodule(unit.name).named_parameters(remove_duplicate=False):
                own[self.first[join(unit.name, key)]] = self.first[join(call.unit, key)]
            for name, modules in unit.readers.items():
                for module in modules:
                    path = call.unit + module[len(unit.name) :] if module else ""
                    readers.setdefault(own.get(name, name), set()).add((call.unit, path))
        return readers

    def _whole_ties(self, groups: list[Group]) -> list[Group]:
        """Groups without those that divide a parameter something uses whole, or divides in another way."""
        readers = self._readers()
        aliases = self._aliases()
        while True:
            ways: dict[str, set[tuple[int, tuple[int, ...]]]] = {}
            covered: dict[str, set[tuple[str, str]]] = {}
            for group in groups:
                for name, dim in group.dims.items():
                    style = _style_of(group, aliases[name])
                    ways.setdefault(name, set()).add((dim, style.parts))
                    for unit, module in readers.get(name, ()):
                        if unit == group.unit and (module in group.styles or style.name == "shard"):
                            covered.setdefault(name, set()).add((unit, module))
            bad = {n for n in ways if len(ways[n]) > 1 or readers.get(n, set()) != covered.get(n, set())}
            # A gradient is summed only if all of it is partial: every unit that reads the parameter divides its work.
            summed: dict[str, set[str]] = {}
            for group in groups:
                for name in self._summed(group):
                    summed.setdefault(name, set()).add(group.unit)
            bad |= {n for n, units in summed.items() if {unit for unit, _ in readers.get(n, ())} != units}
            kept = [group for group in groups if bad.isdisjoint((*group.dims, *self._summed(group)))]
            if len(kept) == len(groups):
                return groups
            for group in groups:
                for name in sorted(bad.intersection((*group.dims, *self._summed(group)))):
                    others = readers.get(name, set()) - covered.get(name, set())
                    who = GLUE if any(unit == GLUE for unit, _ in others) else "a module that is not divided alike"
                    reason = f"{name} is shared with {who}"
                    self.refused.update((module, reason) for module in group.styles)
            groups = kept

    def _with_aliases(self, groups: list[Group]) -> list[Group]:
        """Groups that name every place a divided parameter is registered in."""
        aliases = self._aliases()
        modules = {name for group in groups for name in group.styles}
        result = []
        for group in groups:
            more = {}
            for name, dim in group.dims.items():
                parts = _style_of(group, aliases[name]).parts
                for alias in aliases[name]:
                    if alias not in modules and alias.rpartition(".")[0] not in modules:
                        more[alias] = TensorStyle("shard", parts, dim)
            result.append(replace(group, styles={**group.styles, **more}))
        return result

    def _at_one_degree(self, groups: list[Group]) -> list[Group]:
        """Groups that divide one parameter together are divided at the same degrees."""
        result = list(groups)
        owners: dict[str, list[int]] = {}
        for i, group in enumerate(groups):
            for name in (*group.dims, *self._summed(group)):
                owners.setdefault(name, []).append(i)
        for _ in groups:  # as far as ties reach
            before = list(result)
            for tied in owners.values():
                if len(tied) > 1:
                    sizes = tuple(dict.fromkeys(size for i in tied for size in result[i].sizes))
                    uneven = tuple(dict.fromkeys(n for i in tied for n in result[i].uneven))
                    for i in tied:
                        result[i] = replace(result[i], sizes=sizes, uneven=uneven)
            if [(g.sizes, g.uneven) for g in before] == [(g.sizes, g.uneven) for g in result]:
                break
        return result

    def _summed(self, group: Group) -> list[str]:
        """First names of whole parameters whose gradient a group sums."""
        return [self.first[name] for name, style in group.styles.items() if style.name in WHOLE]

    def _aliases(self) -> dict[str, list[str]]:
        aliases: dict[str, list[str]] = {}
        for name, one in self.first.items():
            aliases.setdefault(one, []).append(name)
        return aliases


def _in(module: str, scope: str) -> bool:
    return module == scope or module.startswith(f"{scope}.")


def _style_of(group: Group, aliases: list[str]) -> TensorStyle:
    """The style a group has for a parameter with these names."""
    for alias in aliases:
        style = group.styles.get(alias) or group.styles.get(alias.rpartition(".")[0])
        if style is not None and style.name not in ("reduce", "share", *WHOLE):
            return style
    raise AssertionError("a group divides what its styles name")


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter to its first."""
    firsts: dict[int, str] = {}
    return {n: firsts.setdefault(id(p), n) for n, p in model.named_parameters(remove_duplicate=False)}
