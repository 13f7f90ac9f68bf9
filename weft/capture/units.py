"""Units: the modules of a model that a plan places as a whole.

The search goes down from the root. A container (ModuleList, Sequential, ModuleDict) is opened, and so is any module
that holds, somewhere below it, a container with two or more children of one class. Such *repeated blocks* are units,
whatever they contain, with one exception: where siblings of one class hold repeated blocks themselves and no two of
that class are built alike (the stages of a convolutional network, each wider than the last), the stages are opened
and their blocks are the units. Every other module with parameters is a unit too, unless it holds more than a third of
all parameters: it is opened down to the members of its containers, so that there is something to divide (one block
that is called again and again makes a unit with many calls). What has no parameters (dropout,
activations, rotary tables) stays glue, and so do parameters that an opened module holds itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from torch import nn

from weft.errors import ModelError

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
LISTS = (nn.ModuleList, nn.ModuleDict)
LARGEST_SHARE = 1 / 3
"""A unit of more than this share of the parameters is opened, if that is possible."""
PARAMETER_LISTS = (nn.ParameterList, nn.ParameterDict)


def find_units(model: nn.Module, wanted: Sequence[str] | None = None) -> list[str]:
    """Names of the modules to place as a whole, in order of registration. Units never nest.

    Args:
        model: the model; its parameters may be fake.
        wanted: names the user gave; None searches.

    Raises:
        ModelError: a name that is no module of the model, is given twice, or lies inside another.
    """
    if wanted is not None:
        return _check(model, wanted)
    root, prefix = model, ""
    while True:
        units = [prefix + name for name in _search(root)]
        if len(units) != 1:
            break
        # One unit that owns everything leaves nothing to divide: look inside it.
        inside = model.get_submodule(units[0])
        if not any(True for _ in _search(inside)):
            break
        root, prefix = inside, f"{units[0]}."
    return list(_opened(model, units))


def _opened(model: nn.Module, units: Sequence[str]) -> Iterator[str]:
    """Units, with those that hold much of the model opened; not blocks, that is members of a container."""
    total = sum(p.numel() for p in model.parameters())
    for unit in units:
        module = model.get_submodule(unit)
        large = sum(p.numel() for p in module.parameters()) > LARGEST_SHARE * total
        block = isinstance(model.get_submodule(unit.rpartition(".")[0]), CONTAINERS)
        holds_lists = any(isinstance(m, LISTS) and _owns(m) for m in module.modules())
        if large and holds_lists and not block:
            yield from _opened(model, [f"{unit}.{name}" for name in _search(module)])
        else:
            yield unit


def _search(root: nn.Module) -> Iterator[str]:
    blocks = _block_classes(root)
    seen: set[nn.Module] = {root}

    def opened(parent: nn.Module, child: nn.Module) -> bool:
        if isinstance(child, LISTS):
            return True  # it has no forward: nobody can call it
        if isinstance(child, CONTAINERS):
            return type(child) not in blocks or not _repeated(parent, child)
        if not any(_repeats(m) for m in child.modules()):
            return False
        return not (_repeated(parent, child) and type(child) in blocks)

    def descend(name: str, module: nn.Module) -> Iterator[str]:
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            if child in seen or isinstance(child, PARAMETER_LISTS) or not _owns(child):
                continue
            seen.add(child)
            if opened(module, child):
                yield from descend(path, child)
            else:
                yield path

    return descend("", root)


def _block_classes(root: nn.Module) -> set[type[nn.Module]]:
    """Classes that some container holds twice with the same parameter shapes."""
    classes: set[type[nn.Module]] = set()
    for container in root.modules():
        if isinstance(container, CONTAINERS):
            built = Counter((type(m), tuple(p.shape for p in m.parameters())) for m in container.children() if _owns(m))
            classes.update(kind for (kind, _), count in built.items() if count > 1)
    return classes


def _repeats(module: nn.Module) -> bool:
    """Whether this is a container of two or more children of one class."""
    return isinstance(module, CONTAINERS) and any(_repeated(module, child) for child in module.children())


def _repeated(parent: nn.Module, child: nn.Module) -> bool:
    """Whether a container has siblings of the child's class."""
    if not isinstance(parent, CONTAINERS) or not _owns(child):
        return False
    return sum(type(m) is type(child) for m in parent.children()) > 1


def _owns(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _check(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    if isinstance(wanted, str):
        raise ModelError(f"Workload.units must be a list of module names, got {wanted!r}; use units=[{wanted!r}]")
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    known, given = set(names), set(wanted)
    for name in wanted:
        if name not in known:
            near = get_close_matches(name, names, n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ModelError(f"Workload.units names {name!r}, which is no module of {type(model).__name__}{hint}")
        for other in given - {name}:
            if name.startswith(f"{other}."):
                raise ModelError(f"Workload.units names both {other!r} and {name!r} inside it; name one of the two")
    if len(given) != len(wanted):
        raise ModelError("Workload.units names a module twice; name each once")
    return sorted(wanted, key=names.index)
