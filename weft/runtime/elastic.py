"""Elastic: recordings for any number of sequences and tokens, worked out from a few.

What is generated together changes with every request that comes or goes, and recording anew each time would take longer
than the step. A length in a recording is ``a + b B + c T + d B T`` for B sequences and T tokens; recordings at two of
each tell the coefficients. A single token is a case of its own, as models make it one. Where recordings differ in more
than lengths, there is one for every B and T.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from weft.capture.profile import Source
from weft.capture.recorder import Recording, TensorLeaf
from weft.plan import Plan
from weft.runtime.routes import Routes

BATCHES, TOKENS = (2, 3), (5, 7)
"""Numbers of sequences and tokens that are recorded."""

MOST = 512
"""Recordings that are kept."""


class Like(NamedTuple):
    """What is recorded in a microbatch's place.

    Attributes:
        sequences, tokens: of the microbatch.
        form: a microbatch of so many sequences and tokens.
        key: what else its shapes depend on.
    """

    sequences: int
    tokens: int
    form: Callable[[int, int], Any]
    key: Hashable = None


class Known(NamedTuple):
    """What is known of a microbatch's forward: its recording, its routes, and what travels with a length along more
    than one dimension that depends on its tokens, and so perhaps on those before them."""

    recording: Recording
    routes: Routes
    squares: frozenset[Source]


@dataclass(frozen=True)
class Grown:
    """A whole number by sequences and tokens: its values at BATCHES x TOKENS, or BATCHES x 1, ``[B][T]``."""

    values: tuple[tuple[int, ...], ...]

    def at(self, sequences: int, tokens: int) -> int:
        """Its value, on the plane through those known."""
        share = (sequences - BATCHES[0]) / (BATCHES[1] - BATCHES[0])
        first, second = (self._along(row, tokens) for row in self.values)
        return round(first + share * (second - first))

    def _along(self, row: tuple[int, ...], tokens: int) -> float:
        if len(row) == 1:
            return row[0]
        return row[0] + (tokens - TOKENS[0]) / (TOKENS[1] - TOKENS[0]) * (row[1] - row[0])

    @property
    def with_tokens(self) -> bool:
        """Whether it depends on the tokens."""
        return any(value != row[0] for row in self.values for value in row)


class Elastic:
    """Recordings of one function.

    Args:
        record: records it for so many sequences and tokens.
        plan: of the job.
    """

    def __init__(self, record: Callable[[int, int], Recording], plan: Plan) -> None:
        self._record, self._plan = record, plan
        self._grids: dict[bool, list[list[Recording]]] = {}
        self._known: dict[tuple[int, int], Known] = {}

    def of(self, sequences: int, tokens: int) -> Known:
        """What is known for so many sequences and tokens."""
        key = sequences, tokens
        if key not in self._known:
            recording = self._recording(sequences, tokens)
            routes = Routes.find(recording, self._plan, leaves_out=True)
            squares = self._squares(routes, recording) if routes.leaves else frozenset()
            self._known[key] = Known(recording, routes, squares)
            if len(self._known) > MOST:
                del self._known[next(iter(self._known))]
        return self._known[key]

    def _grid(self, several: bool) -> list[list[Recording]]:
        if several not in self._grids:
            self._grids[several] = [[self._record(b, t) for t in (TOKENS if several else (1,))] for b in BATCHES]
        return self._grids[several]

    def _recording(self, sequences: int, tokens: int) -> Recording:
        grid = self._grid(tokens > 1)
        corners = [recording for row in grid for recording in row]
        if len({tuple(call.name for call in recording.calls) for recording in corners}) > 1:
            return self._record(sequences, tokens)
        calls = []
        for number, call in enumerate(corners[0].calls):
            every = [[recording.calls[number].leaves for recording in row] for row in grid]
            leaves = self._leaves(every, sequences, tokens)
            if leaves is None:
                return self._record(sequences, tokens)
            calls.append(replace(call, leaves=leaves))
        return replace(corners[0], calls=tuple(calls))

    def _leaves(self, every: list[list[tuple[Any, ...]]], sequences: int, tokens: int) -> tuple[Any, ...] | None:
        """What a call returns; None where recordings differ in more than lengths."""
        first = every[0][0]
        if any(len(leaves) != len(first) for row in every for leaves in row):
            return None
        found: list[Any] = []
        for index, leaf in enumerate(first):
            at = [[leaves[index] for leaves in row] for row in every]
            if isinstance(leaf, TensorLeaf):
                forms = [form_of(x) for row in at for x in row]
                if any(form != forms[0] for form in forms):
                    return None
                shape, stride = (
                    tuple(g.at(sequences, tokens) for g in grown([[getattr(x, of) for x in row] for row in at]))
                    for of in ("shape", "stride")
                )
                found.append(replace(leaf, shape=shape, stride=stride))
            elif any(x is not leaf and x != leaf for row in at for x in row):
                return None
            else:
                found.append(leaf)
        return tuple(found)

    def _squares(self, routes: Routes, recording: Recording) -> frozenset[Source]:
        grid = self._grid(True)
        found = set()
        for source in routes.leaves:
            name = recording.calls[source.call].name
            at = [
                [next(c for c in other.calls if c.name == name).tensors[source.leaf].shape for other in row]
                for row in grid
            ]
            if sum(length.with_tokens for length in grown(at)) > 1:
                found.add(source)
        return frozenset(found)


def grown(every: Sequence[Sequence[Sequence[int]]]) -> list[Grown]:
    """Lengths of each dimension, of shapes or strides by sequences and tokens."""
    dimensions = range(len(every[0][0]))
    return [Grown(tuple(tuple(shape[d] for shape in row) for row in every)) for d in dimensions]


def form_of(leaf: Any) -> Any:
    """What recordings of one function have in common in a tensor."""
    return (len(leaf.shape), leaf.dtype, leaf.device_type) if isinstance(leaf, TensorLeaf) else None
