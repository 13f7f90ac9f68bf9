"""What tensor parallelism can divide: groups of projections, found in the recorded operations of a unit.

A projection is a module with one weight matrix that multiplies its input once. Divided over its outputs (*column*),
it leaves every rank with some of the features; sharding.py's rules follow these through the unit until other
projections contract them (*row*) and the ranks' partial results are added up. Columns whose features meet form one
group with the rows that end them: query, key, value and output; gate, up and down. The group is exact if every use of
a divided value is.

Whether the user's own code accepts shares (a head count written into a reshape) is found by running the unit with
them. A model's tensor-parallel plan (``_tp_plan``, as transformers' models have) adds what no rule would divide by
itself: the rows of the embedding, and an output layer whose result is gathered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from weft.capture.groups import Group, UnitSearch
from weft.capture.isolation import quiet, restored
from weft.capture.recording import Recording


def tensor_groups(recording: Recording, model: nn.Module) -> tuple[list[Group], list[tuple[str, str]]]:
    """Groups of every unit, and ``(module, reason)`` of projections that are in none.

    Args:
        recording: of the model.
        model: the model it was recorded from, still fake.
    """
    first = _first_names(model)
    styles: Mapping[str, str] = getattr(model, "_tp_plan", None) or {}
    with quiet(), restored(model):
        groups, refused = _search(recording, model, first, styles)
        if not any(len(group.styles) > 1 for group in groups):
            # No unit holds both ends of a group: divide the single projections, and make their results whole again.
            singles = dict.fromkeys(recording.units, "colwise_gather")
            groups, refused = _search(recording, model, first, {**singles, **styles})
    return _whole_ties(groups, model, first, refused), refused


def _search(
    recording: Recording, model: nn.Module, first: dict[str, str], styles: Mapping[str, str]
) -> tuple[list[Group], list[tuple[str, str]]]:
    kinds: dict[str, list[int]] = {}
    for call in recording.calls[:-1]:
        kinds.setdefault(call.unit, []).append(call.kind)
    found: dict[int, list[Group]] = {}
    groups: list[Group] = []
    refused: list[tuple[str, str]] = []
    for unit, own in kinds.items():
        per_kind: list[list[Group]] = []
        for kind in dict.fromkeys(own):
            search = UnitSearch(kind, recording.examples[kind], recording.costs[kind], model, recording.names, first)
            whole = search.whole(unit, styles)
            if whole is None and kind not in found:
                found[kind], reasons = search.groups()
                refused += reasons
            per_kind.append([_renamed(g, unit, model, first) for g in found[kind]] if whole is None else [whole])
        for group in per_kind[0]:
            # A unit called in several ways is divided only as suits them all.
            alike = [g for others in per_kind for g in others if g.styles == group.styles]
            if len(alike) == len(per_kind):
                groups.append(replace(group, work={k: w for g in alike for k, w in g.work.items()}))
    return groups, refused


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter to its first."""
    firsts: dict[int, str] = {}
    return {n: firsts.setdefault(id(p), n) for n, p in model.named_parameters(remove_duplicate=False)}


def _renamed(group: Group, unit: str, model: nn.Module, first: dict[str, str]) -> Group:
    """A group of one unit as that of another unit of the same kind."""
    if group.unit == unit:
        return group

    def rename(name: str) -> str:
        return unit + name[len(group.unit) :]

    dims = {}
    for module in group.styles:
        for key, _ in model.get_submodule(module).named_parameters(recurse=False):
            old = first[f"{module}.{key}"]
            if old in group.dims:
                dims[first[rename(f"{module}.{key}")]] = group.dims[old]
    return replace(group, unit=unit, styles={rename(m): style for m, style in group.styles.items()}, dims=dims)


def _whole_ties(
    groups: list[Group], model: nn.Module, first: dict[str, str], refused: list[tuple[str, str]]
) -> list[Group]:
    """Groups without those that divide a parameter some module uses whole, or on another dimension."""
    users: dict[str, set[str]] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        users.setdefault(first[name], set()).add(name.rpartition(".")[0])
    while True:
        dims: dict[str, set[int]] = {}
        divided: dict[str, set[str]] = {}
        for group in groups:
            for name, dim in group.dims.items():
                dims.setdefault(name, set()).add(dim)
                divided.setdefault(name, set()).update(group.styles)
        bad = {n for n in dims if len(dims[n]) > 1 or not users[n] <= divided[n]}
        kept = [group for group in groups if bad.isdisjoint(group.dims)]
        if len(kept) == len(groups):
            return groups
        for group in groups:
            for name in sorted(bad.intersection(group.dims)):
                refused.append((name.rpartition(".")[0], f"{name} is shared with a module that is not divided alike"))
        groups = kept
