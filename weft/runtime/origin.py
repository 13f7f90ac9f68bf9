"""Origin: where a number that is not finite first appeared.

A step that turned out NaN or infinite is run again, with the same numbers (parameters, buffers and random streams are
those of the first run) and watched: the outputs of all calls, then the loss, then every node of the backward. First
comes

    forward     the earliest call whose output is not finite; then the loss itself
    backward    the latest call with an operation that was given finite gradients and returned others
    sums        where all of these are finite: the parameter whose gradients overflow when microbatches and replicas
                are added

Watching asks the device for every tensor, so nothing is watched in other steps. An output that is infinite on purpose
(a unit that returns a mask) is taken for the origin if it comes first.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from weft.runtime.placement import Run

FORWARD, BACKWARD, SUMS = range(3)


@dataclass(frozen=True, order=True)
class Origin:
    """Where it appeared; the least of several came first.

    Attributes:
        order: FORWARD, BACKWARD or SUMS, the place in it, and the place there.
        microbatch, replica, rank: in which, and who saw it.
        unit: the call's name, ``"the loss"``, or the parameter's.
        what: what happened, in words that follow the unit's name.
    """

    order: tuple[int, int, int]
    microbatch: int
    replica: int
    rank: int
    unit: str
    what: str

    def describe(self) -> str:
        """In a line."""
        if self.order[0] == SUMS:
            return f"{self.unit} {self.what}"
        return f"{self.unit} {self.what} (microbatch {self.microbatch} of replica {self.replica}, rank {self.rank})"


@dataclass
class Finder:
    """Watches one run of a step on one rank.

    Attributes:
        replica: whose samples these are.
        found: by phase, place and microbatch, what came first there.
    """

    replica: int
    found: dict[tuple[tuple[int, int, int], int], Origin] = field(default_factory=dict)

    def after_forward(self, m: int, run: Run, batch: Any, loss: Tensor | None) -> None:
        """Note what a forward gave.

        Args:
            m: the microbatch's number.
            run: the forward, its outputs checked.
            batch: the microbatch.
            loss: its loss, on the last stage.
        """
        calls = run.recording.calls
        if run.unfinite is not None:
            fine = all(map(is_finite, tree_leaves(batch)))
            given = "" if fine else "; the samples hold such numbers themselves"
            self._note((FORWARD, run.unfinite, fine), m, calls[run.unfinite].name, f"returned NaN or infinity{given}")
        elif loss is not None and not is_finite(loss):
            self._note((FORWARD, len(calls), 0), m, "the loss", "is NaN or infinity, though no unit's output is")

    def before_backward(self, m: int, run: Run, roots: Sequence[Tensor]) -> None:
        """Watch every node of a backward.

        Args:
            m: the microbatch's number.
            run: its forward, with the numbers of the nodes that each call made.
            roots: what the backward begins with.
        """
        for node in nodes(root.grad_fn for root in roots):
            node.register_hook(self._watch(m, node, *place_of(node, run)))

    def after_sums(self, gradients: Mapping[str, Tensor]) -> None:
        """Note the last parameter of the model whose gradient, now complete, is not finite."""
        for number, (name, gradient) in enumerate(reversed([*gradients.items()])):
            if not is_finite(gradient):
                what = "has a gradient that overflows where microbatches and replicas are added"
                return self._note((SUMS, number, 0), 0, name, what)

    def first(self) -> Origin | None:
        """What came first on any rank; all ranks call it. None: every number is finite but the norm of all."""
        every: list[Origin | None] = [None] * dist.get_world_size()
        dist.all_gather_object(every, min(self.found.values(), default=None))
        return min((each for each in every if each is not None), default=None)

    def _watch(self, m: int, node: Node, place: tuple[int, int], unit: str) -> Callable[[Any, Any], None]:
        name = node.name().removeprefix("torch::autograd::")

        def hook(returned: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
            if not all(map(is_finite, returned)) and all(map(is_finite, given)):
                what = f"gave a gradient that is NaN or infinity ({name}), though the loss is finite"
                self._note((BACKWARD, *place), m, unit, what)

        return hook

    def _note(self, order: tuple[int, int, int], m: int, unit: str, what: str) -> None:
        self.found.setdefault((order, m), Origin(order, m, self.replica, dist.get_rank(), unit, what))


def is_finite(value: Any) -> bool:
    """Whether a value holds no NaN and no infinity; what is no tensor of floating point holds none."""
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return True
    values = value.detach()
    return bool((values._values() if values.is_sparse else values).isfinite().all())


def nodes(roots: Iterable[Node | None]) -> Iterator[Node]:
    """Every node of a graph but those that add to a parameter's gradient."""
    waiting = [root for root in roots if root is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        following = [each for each, _ in node.next_functions if each is not None and each not in seen]
        if node.next_functions:
            yield node
        seen.update(following)
        waiting += following


def place_of(node: Node, run: Run) -> tuple[tuple[int, int], str]:
    """When the backward comes to a node, in calls from the last and then in nodes of the same code, which are as many
    on all replicas; and what to call the code that made it."""
    calls, number = run.recording.calls, node._sequence_nr()
    at = bisect(run.spans, number, key=lambda span: span[0]) - 1
    if at >= 0 and number < run.spans[at][1]:
        _, end, call = run.spans[at]
        return (-2 * call, end - number), calls[call].name
    if at + 1 < len(run.spans):
        begin, _, call = run.spans[at + 1]
        return (-2 * call + 1, begin - number), f"the code before {calls[call].name}"
    call, end = (run.spans[-1][2] + 1, run.spans[-1][1]) if run.spans else (len(calls) - 1, number)
    before = "the loss" if call >= len(calls) - 1 else f"the code before {calls[call].name}"
    return (-2 * call + 1, end - number), before
