"""Tape: operations recorded on fake tensors, replayed for real as far as somebody wants their results.

Tensors are written down by storage and geometry, so views need no record of their own, and an in-place write is a write to
a storage. A replay runs

- every random operation, in order, so that the generator advances as it did for the program that was recorded. If nobody
  needs what it draws, it draws into a temporary;
- any other operation only if something wanted depends on it, and as early as it can: a cast of the whole model at the end
  of its constructor follows each weight's own initialisation, so that one weight is alive at a time.

A write that covers a whole storage without reading it (``normal_``, ``fill_``, ``copy_``) makes what was there before dead.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
Key = TypeVar("Key", bound=Hashable)

EMPTY = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")
OVERWRITES = ("aten::fill_", "aten::zero_", "aten::copy_")
FIRST_MARK = 1 << 62
"""Recording draws nothing, so it marks generators instead: after random step i the seed is FIRST_MARK + i. Whoever seeds or
restores the generator in between is then noticed at the next random step."""


class Ref(NamedTuple):
    """A tensor on the tape: a storage and the tensor's geometry in it."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def covers(self, nbytes: int) -> bool:
        """Whether this is every byte of a storage of that size, each once."""
        expected = 1
        for stride, size in sorted(zip(self.stride, self.size, strict=True)):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return expected * self.dtype.itemsize == nbytes

    def of(self, storage: torch.UntypedStorage) -> Tensor:
        """This tensor in a real storage."""
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.size, self.stride)  # type: ignore[call-overload, no-any-return] # missing in the stub


@dataclass(slots=True, eq=False)
class Step:
    """One recorded operation.

    Attributes:
        run: the operator.
        args, kwargs: its arguments, with a Ref for every fake tensor; real tensors are constants.
        reads: storages it reads.
        kills: storages it overwrites whole without reading them.
        writes: storages it changes otherwise.
        creates: (index among the flat outputs, tensor) of outputs in a storage of their own.
        random: whether it draws from a generator.
        start: where that generator stands before: None: where the last step left it; a number: where that step left it;
            a tensor: in this state.
        default_dtype: what operators fall back on.
    """

    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: frozenset[int]
    kills: frozenset[int]
    writes: frozenset[int]
    creates: tuple[tuple[int, Ref], ...]
    random: bool
    start: Tensor | int | None
    default_dtype: torch.dtype

    @property
    def results(self) -> frozenset[int]:
        """Storages whose content this step decides."""
        return self.kills | self.writes | {ref.storage for _, ref in self.creates}

    @property
    def generator(self) -> torch.Generator:
        """The generator it draws from, if it is random."""
        given = (x for x in (*self.args, *self.kwargs.values()) if isinstance(x, torch.Generator))
        return next(given, torch.default_generator)


class Tape(TorchDispatchMode):
    """Records what runs while it is active, above a FakeTensorMode."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        self.steps: list[Step] = []
        # Storages are kept: a freed one's address would soon be another's.
        self._storages: list[torch.UntypedStorage] = []
        self._index: dict[int, int] = {}
        self._last_draw: dict[torch.Generator, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run on fake tensors and write down."""
        kwargs = kwargs or {}
        # The arguments are written down first: an operator may change its argument's geometry (t_, resize_).
        refs = [self.ref(t) for t in flat_tensors((args, kwargs)) if isinstance(t, FakeTensor)]
        written = [self.ref(t) for t in flat_tensors(written_arguments(func, args, kwargs)) if isinstance(t, FakeTensor)]
        encoded = self._encode(args), {name: self._encode(value) for name, value in kwargs.items()}
        known = len(self._storages)
        out = self._look(func, args) if func is aten._local_scalar_dense.default else func(*args, **kwargs)
        # Module.to() swaps fake parameters, which weak references to them, such as the mode's memo, would forbid.
        self.mode.fake_tensor_converter.tensor_memo.clear()
        outputs = [(i, self.ref(t)) for i, t in enumerate(flat_tensors(out)) if isinstance(t, FakeTensor)]
        creates = tuple((i, ref) for i, ref in outputs if ref.storage >= known)
        name = func._schema.name
        if written or (creates and name not in EMPTY):
            random = torch.Tag.nondeterministic_seeded in func.tags
            overwrites = random or name in OVERWRITES or func._schema.overload_name.endswith("out")
            self._append(func, *encoded, refs=refs, written=written, overwrites=overwrites, creates=creates, random=random)
        return out

    def draw(self, run: Callable[..., Tensor], tensor: Tensor, *args: Any) -> Tensor:
        """Write down ``run(tensor, *args)``, which overwrites a tensor with random numbers, without running it."""
        ref = self.ref(tensor)
        self._append(run, (ref, *args), {}, refs=[ref], written=[ref], overwrites=True, creates=(), random=True)
        return tensor

    def ref(self, tensor: Tensor) -> Ref:
        """The tensor as the tape writes it down."""
        storage = tensor.untyped_storage()
        index = self._index.setdefault(storage._cdata, len(self._storages))
        if index == len(self._storages):
            self._storages.append(storage)
        return Ref(index, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def value(self, tensor: Tensor) -> Tensor | None:
        """What a fake tensor holds; None if random numbers or unknown values decide it."""
        ref = self.ref(tensor)
        needed = self._needed({ref.storage})
        if any(self.steps[i].random for i in needed):
            return None
        values: list[Tensor] = []
        self.replay({0: ref}, lambda _, t: values.append(t.clone()), draws=False)
        return values[0]

    def replay(self, wanted: Mapping[Key, Ref], keep: Callable[[Key, Tensor], None], *, draws: bool = True) -> None:
        """Run what is wanted for real, on the device it was recorded for.

        Args:
            wanted: tensors whose last content is wanted.
            keep: called with each, once, as soon as it is final. The storage is freed with its last use.
            draws: run random operations nobody needs, too. The caller's generators are left as they are.
        """
        needed = self._needed({ref.storage for ref in wanted.values()}, draws=draws)
        finals: dict[int, int] = {s: i for i in sorted(needed) if needed[i] for s in self.steps[i].results}
        keys: defaultdict[int | None, list[Key]] = defaultdict(list)
        for key, ref in wanted.items():
            keys[finals.get(ref.storage)].append(key)
        default_dtype = torch.get_default_dtype()
        with _disable_current_modes(), torch.random.fork_rng(devices=[]), torch.no_grad():
            player = _Player(self, needed)
            for i in (None, *_order(self.steps, needed)):
                if i is not None:
                    player.run(i)
                for key in keys.pop(i, ()):
                    keep(key, player.tensor(wanted[key]))
                if i is not None:
                    player.free(i)
            torch.set_default_dtype(default_dtype)

    def nbytes(self, storage: int) -> int:
        """Size of a storage."""
        return self._storages[storage].nbytes()

    def _append(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        refs: Sequence[Ref],
        written: Sequence[Ref],
        overwrites: bool,
        creates: tuple[tuple[int, Ref], ...],
        random: bool,
    ) -> None:
        others = Counter(refs) - Counter(written) if overwrites else Counter(refs)
        reads = {ref.storage for ref in others}
        kills = {r.storage for r in written if overwrites and r.covers(self.nbytes(r.storage))} - reads
        writes = {r.storage for r in written} - kills
        step = Step(
            run, args, kwargs, frozenset(reads), frozenset(kills), frozenset(writes), creates, random, None,
            torch.get_default_dtype(),
        )  # fmt: skip
        if random:
            step.start = self._mark(step.generator)
        self.steps.append(step)

    def _mark(self, generator: torch.Generator) -> Tensor | int | None:
        mark = generator.initial_seed() - FIRST_MARK
        last = self._last_draw.get(generator)
        self._last_draw[generator] = len(self.steps)
        start = None if mark == last else mark if 0 <= mark < len(self.steps) else generator.get_state()
        generator.manual_seed(FIRST_MARK + len(self.steps))
        return start

    def _encode(self, value: Any) -> Any:
        if isinstance(value, FakeTensor):
            return self.ref(value)
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._encode, value))
        return value

    def _look(self, func: Any, args: tuple[Any, ...]) -> Any:
        try:
            return func(*args)
        except DataDependentOutputException:
            value = self.value(args[0]) if isinstance(args[0], FakeTensor) else args[0]
            if value is None:
                raise
            with _disable_current_modes():
                return value.item()

    def _needed(self, wanted: Iterable[int], *, draws: bool = False) -> dict[int, bool]:
        """Steps to run; False for those that only advance a generator."""
        live = set(wanted)
        needed: dict[int, bool] = {}
        for i in range(len(self.steps) - 1, -1, -1):
            step = self.steps[i]
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
            storage = torch.UntypedStorage(self.tape.nbytes(ref.storage), device="cpu")
            # Memory that nobody initialised is whatever it was on one device; here it is zeros, on every rank.
            self.storages[ref.storage] = storage if blank else storage.fill_(0)
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


def flat_tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in the arguments or results of an operator, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from flat_tensors(x)
    elif isinstance(value, dict):
        for x in value.values():
            yield from flat_tensors(x)


def written_arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Arguments an operator writes to, by its schema."""
    written = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.is_write:
            written.append(args[i] if i < len(args) else kwargs.get(argument.name))
    return written
