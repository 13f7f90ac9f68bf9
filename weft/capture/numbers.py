"""Numbers: head counts and widths written into a module's attributes, which code on shares needs divided.

Hand-written tensor parallel code says ``self.n_heads //= tp`` where it builds the model. Which attributes need it is
found by trying: a whole number that is the size of something divided is divided, too, if that lets the unit do more of
its operations as the whole unit does them, until it does all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch import nn

from weft.capture.rehearsal import join
from weft.plan import TensorStyle

TRIALS = 40
"""Runs of a unit for one group, at most."""


def candidates(model: nn.Module, unit: str, styles: Collection[str], values: Collection[int], degree: int) -> list[str]:
    """Whole numbers on the modules around what is divided: those that are one of ``values`` and can be divided."""
    modules: dict[str, None] = {}
    for name in styles:
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            path = ".".join(parts[:end])
            if path != unit and not path.startswith(f"{unit}."):
                break
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
    chosen: dict[str, TensorStyle] = {}
    best, reason = tried(chosen)
    trials = 0
    while reason:
        results = []
        for name in names:
            if name not in chosen and trials < TRIALS:
                trials += 1
                more = {**chosen, name: TensorStyle("share")}
                count, why = tried(more)
                results.append((count, why, more))
                if not why:
                    break
        done = [more for _, why, more in results if not why]
        if done:
            return done[0], ""
        furthest = max(results, key=lambda r: r[0], default=(best, reason, chosen))
        if furthest[0] <= best:
            break
        best, _, chosen = furthest
    if reason and len(names) > 1:
        together = {name: TensorStyle("share") for name in names}
        if not tried(together)[1]:
            return _needed(together, tried), ""
    return chosen if not reason else {}, reason


def _needed(
    chosen: dict[str, TensorStyle], tried: Callable[[Mapping[str, TensorStyle]], tuple[int, str]]
) -> dict[str, TensorStyle]:
    """Without those it also runs without."""
    for name in list(chosen)[:TRIALS]:
        fewer = {n: style for n, style in chosen.items() if n != name}
        if not tried(fewer)[1]:
            chosen = fewer
    return chosen
