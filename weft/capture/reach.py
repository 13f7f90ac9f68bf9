"""Reach: where gradients go, found by walking the graphs autograd has made, without running a backward.

A value may reach the loss without a gradient coming back: it is detached on the way, compared, or thrown away. One
device then leaves ``None`` where a gradient would be; to do the same, stages must know which of the tensors between
them get none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from weft.capture.profile import Source


def reached(roots: Iterable[Tensor], ends: Mapping[int, Any], seen: set[Any]) -> list[Any]:
    """What backwards from some tensors get to.

    Args:
        roots: where they start.
        ends: by ``id`` of a leaf, what to tell when it is reached.
        seen: nodes that earlier walks have been to; these are not walked again, new ones are added.
    """
    nodes: list[Any] = [root.grad_fn for root in roots]
    found = [ends[id(root)] for root in roots if root.grad_fn is None and id(root) in ends]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # nodes that end in a leaf have one
        if variable is not None and id(variable) in ends:
            found.append(ends[id(variable)])
        nodes += [following for following, _ in node.next_functions]
    return found


def with_gradient(
    loss: Tensor,
    sources: Mapping[int, Source],
    given: Sequence[Sequence[Tensor]],
    reach: Sequence[Sequence[frozenset[int]]],
    hidden: Sequence[frozenset[Source]],
) -> frozenset[Source]:
    """Outputs of calls that get a gradient from the loss.

    Args:
        loss: it.
        sources: the leaf that stands for an output in the glue's graph, by ``id``.
        given: the tensors each call was given, in the glue's graph.
        reach: for each call and each of its outputs, which of the given tensors its gradient goes on to.
        hidden: outputs of other calls that each call reads in another way than as an argument (in an object); they are
            taken to get a gradient where the call does.
    """
    seen: set[Any] = set()
    live = set(reached([loss], sources, seen))
    for call in range(len(given) - 1, -1, -1):
        outputs = [leaf for leaf in range(len(reach[call])) if Source(call, leaf) in live]
        live |= hidden[call] if outputs else frozenset()
        wanted = {place for leaf in outputs for place in reach[call][leaf]}
        live.update(reached([given[call][place] for place in sorted(wanted)], sources, seen))
    return frozenset(live)
