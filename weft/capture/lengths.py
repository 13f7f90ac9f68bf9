"""Lengths: tensor groups that were found in a recording, in one of the same model on sequences of another length, which
may keep keys and values.

What can be divided does not depend on the length, but a cache stands between projections and hides it: keys are written
to a tensor that somebody made before. So groups are looked for without one, on sequences of PLAIN tokens, and carried
over: the operations of both are the same in the same order, but for what writes and reads the cache. An operation that
reads a divided parameter is divided, and so is what is new between two that are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher

from weft.capture.alignment import halved
from weft.capture.groups import Group, Work
from weft.capture.recording import Recording
from weft.capture.sharding import tensors_of
from weft.capture.tape import Ref

PLAIN = (37, 13)
"""Lengths of sequences, and of those of a decoder that has an encoder: primes, so that a dimension of a tensor which is
a multiple of one is the sequence's."""


@dataclass(slots=True)
class Lengths:
    """Two recordings of as many sequences.

    Attributes:
        plain: in the parameters' own precision, without a cache.
        other: in a lower precision if it is ``lower``.
        lengths: of sequences in the plain recording, to those in the other.
        kinds: of calls with the same name.
    """

    plain: Recording
    other: Recording
    lengths: Mapping[int, int]
    lower: bool
    kinds: dict[int, set[int]] = field(init=False)

    def __post_init__(self) -> None:
        of_name = {call.name: call.kind for call in self.other.calls}
        self.kinds = {}
        for call in self.plain.calls:
            if call.name in of_name:
                self.kinds.setdefault(call.kind, set()).add(of_name[call.name])

    def groups(self, groups: Iterable[Group]) -> list[Group]:
        """Groups of the plain recording, as those of the other."""
        known: dict[tuple[int, Work, tuple[str, ...]], dict[int, Work]] = {}
        found = []
        for group in groups:
            works: dict[int, Work] = {}
            for kind, work in group.work.items():
                key = (kind, work, tuple(name.removeprefix(group.unit) for name in group.dims))
                if key not in known:
                    known[key] = {new: self._work(kind, new, work, group.dims) for new in self.kinds.get(kind, ())}
                works |= known[key]
            found.append(replace(group, work=works))
        return found

    def _work(self, kind: int, new: int, work: Work, divided: Collection[str]) -> Work:
        before, after = self.plain.costs[kind].forward, self.other.costs[new].forward
        matcher = SequenceMatcher(None, [op.name for op in before], [op.name for op in after], autojunk=False)
        places = {i + k: j + k for i, j, length in matcher.get_matching_blocks() for k in range(length)}
        own = {places[place] for place in work.operations if place in places}
        weights = {storage for storage, name in self.other.names.items() if name in divided}
        for place, op in enumerate(after):
            if any(ref.storage in weights for ref in tensors_of((op.args, op.kwargs))):
                own.add(place)
                if op.name == "aten._to_copy":  # in the lower precision
                    weights |= {ref.storage for ref in op.outputs}
        if own:
            matched = set(places.values())
            own |= {place for place in range(min(own), max(own)) if place not in matched}
        sent = tuple(self._at_length(halved(ref) if self.lower else ref) for ref in work.sent)
        return Work(operations=frozenset(own), sent=sent)

    def _at_length(self, ref: Ref) -> Ref:
        def there(size: int) -> int:
            return next((size // a * b for a, b in self.lengths.items() if size and size % a == 0), size)

        return ref._replace(size=tuple(map(there, ref.size)))
