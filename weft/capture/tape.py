"""Tape: operations recorded on fake tensors, so that they can be replayed for real (replay.py).

Tensors are written down by storage and geometry, so views need no record of their own, and an in-place write is a write
to a storage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten

EMPTY = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")
OVERWRITES = ("aten::fill_", "aten::zero_", "aten::copy_")
FIRST_MARK = 1 << 62
"""Recording draws nothing, so it marks generators instead: after random step i the seed is FIRST_MARK + i. Whoever
seeds or restores the generator in between is then noticed at the next random step."""


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
        return empty.set_(storage, self.offset, self.size, self.stride)


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


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's class has an untyped __init_subclass__
    """Records what runs while it is active, above a FakeTensorMode.

    Args:
        mode: that mode.
        value: what a fake tensor holds, for code that looks at it; None if that is not known.
    """

    def __init__(self, mode: FakeTensorMode, value: Callable[[Tape, Tensor], Tensor | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # untyped in torch
        self.mode = mode
        self.value = value
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
        targets = flat_tensors(written_arguments(func, args, kwargs))
        written = [self.ref(t) for t in targets if isinstance(t, FakeTensor)]
        encoded = self._encode(args), {name: self._encode(value) for name, value in kwargs.items()}
        known = len(self._storages)
        out = self._look(func, args) if func is aten._local_scalar_dense.default else func(*args, **kwargs)
        # Module.to() swaps fake parameters, which weak references to them, such as the mode's memos, would forbid.
        self.mode.fake_tensor_converter.tensor_memo.clear()
        self.mode.fake_tensor_converter.constant_storage_mapping.clear()
        outputs = [(i, self.ref(t)) for i, t in enumerate(flat_tensors(out)) if isinstance(t, FakeTensor)]
        creates = tuple((i, ref) for i, ref in outputs if ref.storage >= known)
        name = func._schema.name
        if written or (creates and name not in EMPTY):
            random = torch.Tag.nondeterministic_seeded in func.tags
            overwrites = random or name in OVERWRITES or func._schema.overload_name.endswith("out")
            self._append(
                func, *encoded, refs=refs, written=written, overwrites=overwrites, creates=creates, random=random
            )
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
            run=run,
            args=args,
            kwargs=kwargs,
            reads=frozenset(reads),
            kills=frozenset(kills),
            writes=frozenset(writes),
            creates=creates,
            random=random,
            start=None,
            default_dtype=torch.get_default_dtype(),
        )
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
            value = self.value(self, args[0])
            if value is None:
                raise
            with _disable_current_modes():
                return value.item()


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
