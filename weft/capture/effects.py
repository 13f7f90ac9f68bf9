"""Effects: tensors a unit leaves in an object it was given (a cache, a table that layers share), for others to read.

They count as outputs of the call, after those it returns: where the call is a stand-in they are put into the object
just the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from weft.capture.blocks import PLAIN
from weft.capture.border import form
from weft.capture.isolation import snapshot
from weft.capture.recording import TensorLeaf
from weft.capture.trees import Tree, flatten, held, refill, unflatten


class Before(NamedTuple):
    """What the object held as leaf ``place`` before the call."""

    place: int


@dataclass(frozen=True, slots=True)
class Effect:
    """What a call did to one object.

    Attributes:
        argument: the object's position among the leaves of the arguments.
        tree, leaves: what it holds after the call: a TensorLeaf for every new tensor, Before for what it held, or the
            value itself.
    """

    argument: int
    tree: Tree
    leaves: tuple[Any, ...]

    def apply(self, target: Any, tensors: Iterator[Tensor]) -> None:
        """Do it to an object, with these for the new tensors."""
        before = flatten(held(target))[0]
        filled = []
        for leaf in self.leaves:
            if isinstance(leaf, Before):
                filled.append(before[leaf.place] if leaf.place < len(before) else None)
                continue
            filled.append(next(tensors) if isinstance(leaf, TensorLeaf) else snapshot(leaf))
        refill(target, unflatten(filled, self.tree))


class Leavings:
    """Finds the effects of a call: made before it, asked after it.

    Args:
        leaves: of its arguments.
    """

    def __init__(self, leaves: Sequence[Any]) -> None:
        self.objects = [(i, leaf) for i, leaf in enumerate(leaves) if held(leaf) is not None]
        self.before = [flatten(held(leaf))[0] for _, leaf in self.objects]

    def effects(self) -> tuple[tuple[Effect, ...], list[Tensor]]:
        """What has changed, and the new tensors in order."""
        effects: list[Effect] = []
        new: list[Tensor] = []
        for (argument, target), before in zip(self.objects, self.before, strict=True):
            leaves, tree = flatten(held(target))
            old = {id(leaf): i for i, leaf in enumerate(before) if not isinstance(leaf, PLAIN)}
            fresh = [leaf for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) not in old]
            if fresh:
                described = (Before(old[id(x)]) if id(x) in old else form(snapshot(x)) for x in leaves)
                effects.append(Effect(argument, tree, tuple(described)))
                new += fresh
        return tuple(effects), new


def exchange(leaves: Sequence[Any], tensors: dict[int, Tensor]) -> None:
    """Put tensors in the place of others, by id, in the objects among some arguments."""
    for leaf in leaves if tensors else ():
        if held(leaf) is not None:
            inside, tree = flatten(held(leaf))
            refill(leaf, unflatten([tensors.get(id(x), x) for x in inside], tree))
