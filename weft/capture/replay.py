"""Replay: run a tape for real, as far as somebody wants its results.

A replay runs

- every random operation, in order, so that the generator advances as it did for the program that was recorded. If
  nobody needs what it draws, it draws into a temporary;
- any other operation only if something wanted depends on it, and as early as it can: a cast of the whole model at the
  end of its constructor follows each weight's own initialisation, so that one weight is alive at a time.

A write that covers a whole storage without reading it (``normal_``, ``fill_``, ``copy_``) makes what was there before
dead.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from weft.capture.tape import Ref, Step, Tape, flat_tensors

aten = torch.ops.aten
Key = TypeVar("Key", bound=Hashable)


def replay(tape: Tape, wanted: Mapping[Key, Ref], keep: Callable[[Key, Tensor], None], *, draws: bool = True) -> None:
    """Run what is wanted for real, on the device it was recorded for.

    Args:
        tape: the operations.
        wanted: tensors whose last content is wanted.
        keep: called with each, once, as soon as it is final. The storage is freed with its last use.
        draws: run random operations nobody needs, too. The caller's generators are left as they are.
    """
    needed = _needed(tape.steps, {ref.storage for ref in wanted.values()}, draws=draws)
    finals: dict[int, int] = {s: i for i in sorted(needed) if needed[i] for s in tape.steps[i].results}
    keys: defaultdict[int | None, list[Key]] = defaultdict(list)
    for key, ref in wanted.items():
        keys[finals.get(ref.storage)].append(key)
    default_dtype = torch.get_default_dtype()
    with _disable_current_modes(), torch.random.fork_rng(devices=[]), torch.no_grad():
        player = _Player(tape, needed)
        try:
            for key in keys.pop(None, ()):
                keep(key, player.tensor(wanted[key]))
            for i in _order(tape.steps, needed):
                player.run(i)
                for key in keys.pop(i, ()):
                    keep(key, player.tensor(wanted[key]))
                player.free(i)
        finally:
            torch.set_default_dtype(default_dtype)


def value(tape: Tape, tensor: Tensor) -> Tensor | None:
    """What a fake tensor holds at this point of a tape; None if random numbers decide it."""
    ref = tape.ref(tensor)
    if any(tape.steps[i].random for i in _needed(tape.steps, {ref.storage}, draws=False)):
        return None
    values: list[Tensor] = []
    replay(tape, {0: ref}, lambda _, t: values.append(t.clone()), draws=False)
    return values[0]


def _needed(steps: Sequence[Step], wanted: Iterable[int], *, draws: bool) -> dict[int, bool]:
    """Steps to run; False for those that only advance a generator."""
    live = set(wanted)
    needed: dict[int, bool] = {}
    for i in range(len(steps) - 1, -1, -1):
        step = steps[i]
        if not live.isdisjoint(results := step.results):
            needed[i] = True
            live -= results - step.writes
            live |= step.reads | step.writes
        elif draws and step.random:
            needed[i] = False
            live |= step.reads
    return needed


class _Player:
    """Real storages while a tape is replayed."""

    def __init__(self, tape: Tape, needed: Mapping[int, bool]) -> None:
        self.tape = tape
        self.needed = needed
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.uses = Counter(s for i in needed for s in self._touched(i))
        self.generators: dict[torch.Generator, torch.Generator] = {torch.default_generator: torch.default_generator}
        self.revisited = {tape.steps[i].start for i in needed if isinstance(tape.steps[i].start, int)}
        self.left: dict[Any, Tensor] = {}

    def run(self, i: int) -> None:
        step = self.tape.steps[i]
        if step.random:
            generator = self.generators.setdefault(step.generator, torch.Generator(step.generator.device))
            if step.start is not None:
                generator.set_state(step.start if isinstance(step.start, Tensor) else self.left[step.start])
        torch.set_default_dtype(step.default_dtype)
        args = [self._decode(value, i) for value in step.args]
        if step.run is aten.lift_fresh.default:
            args = [args[0].clone()]  # a later write must not reach the constant
        out = step.run(*args, **{name: self._decode(value, i) for name, value in step.kwargs.items()})
        if i in self.revisited:
            self.left[i] = generator.get_state()
        if self.needed[i] and step.creates:
            leaves = list(flat_tensors(out))
            for position, ref in step.creates:
                self._adopt(ref, leaves[position])

    def tensor(self, ref: Ref, *, blank: bool = False) -> Tensor:
        if ref.storage not in self.storages:
            # Memory that nobody initialised is whatever it was on one device; here it is zeros, on every rank.
            make = torch.empty if blank else torch.zeros
            content = make(self.tape.nbytes(ref.storage), dtype=torch.uint8)
            self.storages[ref.storage] = content.untyped_storage()
        return ref.of(self.storages[ref.storage])

    def free(self, i: int) -> None:
        for s in self._touched(i):
            self.uses[s] -= 1
            if not self.uses[s]:
                self.storages.pop(s, None)

    def _touched(self, i: int) -> frozenset[int]:
        step = self.tape.steps[i]
        return step.reads | step.results if self.needed[i] else step.reads

    def _decode(self, value: Any, i: int) -> Any:
        if isinstance(value, Ref):
            step = self.tape.steps[i]
            if not self.needed[i] and value.storage not in step.reads:
                return torch.empty_strided(value.size, value.stride, dtype=value.dtype)
            return self.tensor(value, blank=value.storage in step.kills)
        if isinstance(value, (list, tuple)):
            return type(value)(self._decode(x, i) for x in value)
        return self.generators[value] if isinstance(value, torch.Generator) else value

    def _adopt(self, ref: Ref, tensor: Tensor) -> None:
        """Make an operator's result the content of a storage; kernels may lay theirs out differently than fake ones."""
        same = (tensor.stride(), tensor.storage_offset()) == (ref.stride, ref.offset)
        if same and tensor.untyped_storage().nbytes() == self.tape.nbytes(ref.storage):
            self.storages[ref.storage] = tensor.untyped_storage()
        else:
            self.tensor(ref).copy_(tensor)


def _order(steps: Sequence[Step], needed: Mapping[int, bool]) -> Iterator[int]:
    """Order to run steps in: draws and sources as recorded, each followed by whatever it makes possible."""
    writer: dict[int, int] = {}
    readers: defaultdict[int, list[int]] = defaultdict(list)
    before: dict[int, int] = {}
    after: defaultdict[int, list[int]] = defaultdict(list)
    source: dict[int, bool] = {}
    last_draw: int | None = None
    for i in sorted(needed):
        step = steps[i]
        results = step.results if needed[i] else frozenset[int]()
        earlier = {writer[s] for s in step.reads | results if s in writer}
        earlier.update(r for s in results for r in readers[s])
        source[i] = step.random or not earlier
        if step.random:
            earlier |= {last_draw} if last_draw is not None else set()
            last_draw = i
        earlier.discard(i)
        before[i] = len(earlier)
        for e in earlier:
            after[e].append(i)
        for s in step.reads:
            readers[s].append(i)
        for s in results:
            writer[s], readers[s] = i, []
    ready = [(source[i], i) for i, count in before.items() if not count]
    heapq.heapify(ready)
    while ready:
        _, i = heapq.heappop(ready)
        yield i
        for later in after[i]:
            before[later] -= 1
            if not before[later]:
                heapq.heappush(ready, (source[later], later))
