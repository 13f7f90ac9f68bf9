"""Numbers: head counts and widths written into a module's attributes, which code on shares needs divided.

Hand-written tensor parallel code says ``self.n_heads //= tp`` where it builds the model. Which attributes need it is
found by trying: a whole number that is the size of something divided is divided, too, if that lets the unit do more of
its operations as the whole unit does them, until it does all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping

from torch import nn

from weft.capture.rehearsal import join
from weft.plan import TensorStyle

FEW = 5
"""Of so many numbers every choice is tried, the smallest first."""
TRIALS = 32
"""Of more, as many are tried one after the other as go into so many runs of the unit."""


def candidates(
    model: nn.Module, unit: str, styles: Collection[str], plain: Collection[str], values: Collection[int], degree: int
) -> list[str]:
    """Whole numbers on the modules around what is divided: those that are one of ``values`` and can be divided.

    Args:
        model, unit: where they are.
        styles: names of what is divided.
        plain: modules whose own code is not run.
        values: sizes of what is divided.
        degree: into how many shares.
    """
    modules: dict[str, None] = {}
    for name in styles:
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            path = ".".join(parts[:end])
            if path != unit and not path.startswith(f"{unit}."):
                break
            if path not in plain:
                modules[path] = None
    found = []
    for path in modules:
        try:
            module = model.get_submodule(path)
        except AttributeError:  # the name of a parameter
            continue
        for key, value in vars(module).items():
            if type(value) is int and value > 1 and value in values and value % degree == 0:
                found.append(join(path, key))
    return found


def shared_numbers(
    names: list[str], tried: Callable[[Mapping[str, TensorStyle]], tuple[int, str]]
) -> tuple[dict[str, TensorStyle], str]:
    """Numbers to divide for a unit to run on shares; and why it does not, whatever is divided ("": it does).

    Args:
        names: of the candidates.
        tried: rehearses the unit with more styles; how many operations are as they should be, and why not all.
    """
    share = TensorStyle("share")
    chosen: dict[str, TensorStyle] = {}
    best, reason = tried(chosen)
    if not reason:
        return chosen, ""
    if len(names) <= FEW:
        for size in range(1, len(names) + 1):
            for some in itertools.combinations(names, size):
                if not tried(dict.fromkeys(some, share))[1]:
                    return dict.fromkeys(some, share), ""
        return {}, reason
    for _ in range(TRIALS // len(names)):
        results = []
        for name in names:
            if name not in chosen:
                more = {**chosen, name: share}
                count, why = tried(more)
                if not why:
                    return more, ""
                results.append((count, more))
        count, more = max(results, key=lambda result: result[0], default=(best, chosen))
        if count <= best:
            break
        best, chosen = count, more
    together = dict.fromkeys(names, share)
    return (_needed(together, tried), "") if not tried(together)[1] else ({}, reason)


def _needed(
    chosen: dict[str, TensorStyle], tried: Callable[[Mapping[str, TensorStyle]], tuple[int, str]]
) -> dict[str, TensorStyle]:
    """Without those it also runs without."""
    for name in list(chosen)[:TRIALS]:
        fewer = {n: style for n, style in chosen.items() if n != name}
        if not tried(fewer)[1]:
            chosen = fewer
    return chosen
