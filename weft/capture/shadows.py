"""Shadows: how whole values would be divided, were the parameter divided that they are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from weft.capture.frames import RawOp
from weft.capture.rules import apply
from weft.capture.sharding import Divided, OnceError, Partial, RefusedError, State, WantedError
from weft.capture.tape import Ref


class Seed(NamedTuple):
    """A parameter that is divided without being a projection's, or (ONCE) that only one rank counts."""

    dim: int
    stretches: tuple[int, ...]

    def state(self, tag: int) -> State:
        """The state of the parameter itself."""
        tags = frozenset({tag})
        return Partial(tags) if self == ONCE else Divided(self.dim, self.stretches, tags)


ONCE = Seed(-1, ())


@dataclass(slots=True)
class Shadows:
    """Of every value the states it would have, by parameter and the dimension that would be divided."""

    known: dict[Ref, dict[tuple[str, int], State]] = field(default_factory=dict)
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def begin(self, ref: Ref, name: str) -> None:
        """A parameter, or another value of which any dimension could be divided."""
        self.sizes[name] = ref.size
        self.known[ref] = {(name, d): Divided(d, (n,)) for d, n in enumerate(ref.size) if n > 1}
        self.known[ref][name, ONCE.dim] = Partial()

    def follow(self, op: RawOp, refs: list[Ref]) -> None:
        """Go on to what is made of one such value."""
        sources = [ref for ref in dict.fromkeys(refs) if ref in self.known]
        if len(sources) != 1 or op.kind in ("matmul", "convolution", "attention"):
            return
        for key, shadow in self.known[sources[0]].items():
            try:
                states = apply(op, {sources[0]: shadow})
            except RefusedError:
                continue
            for out, state in zip(op.outputs, states, strict=True):
                if isinstance(state, Divided) or (state is not None and key[1] == ONCE.dim):
                    self.known.setdefault(out, {})[key] = state

    def seeds(self, error: WantedError | OnceError) -> dict[str, Seed]:
        """The parameters that, divided so, make a value what an operation wants."""
        if isinstance(error, OnceError):
            states = self.known.get(error.ref, {})
            return {name: ONCE for name, dim in states if dim == ONCE.dim}
        total, found = sum(error.stretches), dict[str, Seed]()
        for (name, dim), shadow in self.known.get(error.ref, {}).items():
            if isinstance(shadow, Partial):
                continue
            size = self.sizes[name][dim]
            if shadow.dim == error.dim and sum(shadow.stretches) == total and size % total == 0:
                found.setdefault(name, Seed(dim, tuple(n * (size // total) for n in error.stretches)))
        return found
