"""Placement: the user's forward runs on every rank, with stand-ins for the calls that live elsewhere.

A unit's ``forward`` is replaced on the instance. A call of this stage runs the original. Any other call is a stand-in:
it costs nothing and returns, leaf by leaf, the tensor received from its owner where something on this stage needs it,
and an empty fake tensor of the recorded shape where nothing does. Glue code between units runs where its inputs are
real, and gives fake tensors where they are not.

Once a stage has made its last call, nothing it computes matters to anybody, and what code would look at is not here. So
the stage's forward ends there (``ending``), or, where it goes on, with whatever fails on fake tensors, silently.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.hooks import RemovableHandle

from weft.adapters import running
from weft.capture.blame import first_line, place_of
from weft.capture.draws import Draws, derived, python_stream
from weft.capture.effects import Leavings
from weft.capture.profile import Source
from weft.capture.recorder import RecordedCall, Recording, TensorLeaf
from weft.capture.trace import sequence_number
from weft.capture.trees import flatten, leaves_of, unflatten
from weft.errors import ModelError, WeftError
from weft.runtime.compiled import Compiled, Shared
from weft.runtime.dtensor import is_dtensor
from weft.runtime.ending import Ending, Function
from weft.runtime.logbook import Logbook
from weft.runtime.randomness import Seeds, stream
from weft.runtime.recompute import Recompute
from weft.runtime.recordings import decisions_seed
from weft.runtime.routes import Routes
from weft.runtime.touch import touch

Call = Callable[..., Any]


@dataclass
class Run:
    """One forward of one microbatch on one stage.

    Attributes:
        recording: the recording of this microbatch's shapes.
        routes: what travels, for these shapes.
        received: outputs of other stages that this stage needs.
        seeds: of the random streams.
        produced: outputs of this stage's calls, filled as they run.
        seen: how often every unit has been called.
        draws: seeds the glue's random operations.
        last: number of the call that was last begun.
        unfinite: if values are checked, the number of the first call that gave a NaN or an infinity.
        check: whether to check.
        spans: if values are checked, for every call of this stage the number of the first autograd node it made, that
            of the first one after it, and the call's own.
        ending: where the forward ends, if it may end before the function does.
    """

    recording: Recording
    routes: Routes
    received: Mapping[Source, Tensor]
    seeds: Seeds
    produced: dict[Source, Tensor] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)
    draws: Draws | None = None
    last: int = -1
    check: bool = False
    unfinite: int | None = None
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    ending: Ending | None = None

    def produce(self, source: Source, tensor: Tensor) -> None:
        """Note an output of this stage."""
        self.produced[source] = tensor
        if self.check and self.unfinite is None and not bool(tensor.detach().isfinite().all()):
            self.unfinite = source.call


class Arrived(torch.autograd.Function):
    """A received tensor as the glue gets it: in the same memory, but no leaf, so that it may be written to."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """The same memory; a view would not do, since views of leaves cannot be written to either."""
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """As it comes."""
        return gradients[0]


class Placement:
    """One stage's view of the model.

    Args:
        model: the user's model; units of this stage have real parameters, all others fake ones of ``mode``.
        units: names of the units.
        stage: the stage this rank runs.
        mode: the mode of this rank's fake tensors.
        device: the device of this rank.
        recompute: as in the plan.
        compiled: units to run through ``torch.compile``.
        logbook: told of units whose parameters are gathered, if they are.
    """

    def __init__(
        self,
        model: nn.Module,
        units: list[str],
        *,
        stage: int,
        mode: FakeTensorMode,
        device: torch.device,
        recompute: Mapping[str, str] = MappingProxyType({}),
        compiled: Collection[str] = (),
        logbook: Logbook | None = None,
    ) -> None:
        self.model, self.stage, self.mode, self.device = model, stage, mode, device
        self._run: Run | None = None
        self._empty: dict[TensorLeaf, Tensor] = {}
        self._entered = False
        self._sharded = any(is_dtensor(parameter) for parameter in model.parameters())
        self._gathers = logbook if self._sharded else None
        shared: dict[Call, Shared] = {}
        self._units: list[tuple[str, nn.Module, Call, Call]] = []
        for name in units:
            module = model.get_submodule(name)
            original = Compiled(name, module, shared) if name in compiled else module.forward
            again = Recompute(module, recompute[name]) if name in recompute else None
            self._units.append((name, module, original, self._placed(name, module, original, again)))
        self._hooks = self._placing()

    def _placing(self) -> list[RemovableHandle]:
        """Put the units under this object's eyes."""
        hooks = []
        for name, module, _, placed in self._units:
            module.forward = placed
            if self._gathers is not None:  # before fully_shard's own hook; ``_enter`` comes after it
                hooks.append(module.register_forward_pre_hook(self._gathers.hook(name), prepend=True))
            hooks.append(module.register_forward_pre_hook(self._enter))
            # registered last: sees what leaves the unit after PyTorch's own hooks
            hooks.append(module.register_forward_hook(self._note(name)))
        return hooks

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The units as they are without placement, inside the block: for many short forwards on a stage that has all
        calls."""
        for hook in self._hooks:
            hook.remove()
        for _, module, original, _ in self._units:
            module.forward = original
        try:
            yield
        finally:
            self._hooks = self._placing()

    def forward(self, function: Function, batch: Any, run: Run) -> Any:
        """Run a function of the model, as the user's loss, for one microbatch; ``run.produced`` holds this stage's
        outputs afterwards.

        Returns:
            What the function gives: real on the last stage, fake, NOTHING or None on the others.

        Raises:
            ModelError: the forward took another path than the recorded one.
        """
        assert self._run is None
        self._run = run
        try:
            with running(self.device), self._streams(run):
                return function(self.model, batch)
        except Exception as error:  # the user's code, on fake tensors: see the top of this page
            if isinstance(error, WeftError):
                raise
            if run.routes.is_done(self.stage, run.last):
                return None
            if any(call.seen for call in run.recording.calls) and len(set(run.routes.stage_of)) > 1:
                raise ModelError(
                    f"the forward raised {type(error).__name__}: {first_line(error)} ({place_of(error)}); it looks at "
                    "values that units compute, which may have led it another way than when the model was captured; "
                    "use pp=1"
                ) from error
            raise
        finally:
            self._run = None

    @contextmanager
    def _streams(self, run: Run) -> Iterator[None]:
        """Give the glue its random streams."""
        decisions, own, shared = run.recording.conditions.decisions, run.seeds.glue(), decisions_seed(run.seeds)
        with ExitStack() as stack:
            stack.enter_context(python_stream(shared, when=run.recording.python_draws))
            stack.enter_context(stream(own, self.device, when=run.routes.glue_random))
            if run.routes.glue_random:
                run.draws = Draws(lambda number: derived(shared if number in decisions else own, number))
                stack.enter_context(run.draws)
            yield

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._entered = True
        if self._gathers is not None:
            self._gathers.resume()

    def _placed(self, unit: str, module: nn.Module, original: Call, again: Recompute | None) -> Call:
        def forward(*args: Any, **kwargs: Any) -> Any:
            run, entered, self._entered = self._run, self._entered, False
            if run is None:  # outside a step: the user calls the module by hand
                return original(*args, **kwargs)
            if not entered:  # ``module.forward(x)`` would pass by all hooks, ours and those that gather weights
                return module(*args, **kwargs)
            run.seen[unit] += 1
            number = run.routes.numbers.get((unit, run.seen[unit]))
            if number is None:
                raise ModelError(
                    f"{unit} was called {run.seen[unit]} times in a step, less often when the model was captured; the "
                    "forward depends on something that changes from step to step"
                )
            call = run.recording.calls[number]
            run.last = number
            if run.routes.stage_of[number] > self.stage and run.ending is not None:
                run.ending.reach()
            if run.routes.stage_of[number] != self.stage:
                return self._stand_in(run, number, call, args, kwargs)
            leaves = leaves_of(args, kwargs)
            given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if any(isinstance(leaf, FakeTensor) and i in call.used for i, leaf in enumerate(given)):
                raise ModelError(
                    f"{call.name} was given a tensor that lives on another stage and was not used when the "
                    "model was captured; the forward depends on something that changes from step to step. Keep it on "
                    "one stage, or use pp=1"
                )
            watch = Leavings(leaves) if call.effects else None
            begin = sequence_number()
            output = self._compute(run, number, call, again, original, args, kwargs)
            if run.check:
                run.spans.append((begin, sequence_number(), number))
            if call.looks and self._sharded:
                output = touch(output, module)
            if watch is not None:
                _, left = watch.effects()
                for i, tensor in enumerate(left, len(call.tensors) - len(left)):
                    run.produce(Source(number, i), tensor)
            return output

        return forward

    def _compute(
        self,
        run: Run,
        number: int,
        call: RecordedCall,
        again: Recompute | None,
        original: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a call of this stage on its random streams."""
        draws = number in run.routes.random
        seed = run.seeds.call(number) if draws or call.python_draws else 0

        def drawing(*args: Any, **kwargs: Any) -> Any:  # the same numbers whenever it runs
            if not (draws or call.python_draws):
                return original(*args, **kwargs)
            with stream(seed, self.device, when=draws), python_stream(seed, when=call.python_draws):
                return original(*args, **kwargs)

        with paused(run.draws) if run.draws is not None else nullcontext():
            if again is None:
                return drawing(*args, **kwargs)
            return again(drawing, args, kwargs, run.recording.costs[call.kind])

    def _note(self, unit: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            run = self._run
            if run is None:
                return None
            number = run.routes.numbers[unit, run.seen[unit]]
            if run.routes.stage_of[number] == self.stage:
                return self._hand_out(run, number, output)
            return None

        return hook

    def _hand_out(self, run: Run, number: int, output: Any) -> Any:
        """Note what a call gave. What travels is kept from the glue, where it would be written to."""
        call = run.recording.calls[number]
        if type(output) is Tensor and not call.rewritten:
            run.produce(Source(number, 0), output)
            return None
        leaves, tree = flatten(output)
        count = 0
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                if isinstance(leaf, FakeTensor):
                    raise ModelError(
                        f"{call.name} used a tensor that lives on another stage and that it did not use when the model "
                        "was captured; the forward depends on something that changes from step to step; use pp=1"
                    )
                source = Source(number, count)
                run.produce(source, leaf)
                if count in call.rewritten and source in run.routes.leaves:
                    leaves[place] = leaf.clone()
                count += 1
        return unflatten(leaves, tree) if call.rewritten else None

    def _stand_in(
        self, run: Run, number: int, call: RecordedCall, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        count = itertools.count()
        leaves = [
            self._leaf(run, Source(number, next(count)), leaf) if isinstance(leaf, TensorLeaf) else leaf
            for leaf in call.leaves
        ]
        if call.effects:
            given, left = leaves_of(args, kwargs), iter(leaves[call.tree.leaves :])
            for effect in call.effects:
                effect.apply(given[effect.argument], left)
        return unflatten(leaves, call.tree)

    def _leaf(self, run: Run, source: Source, leaf: TensorLeaf) -> Tensor:
        if source in run.received:
            tensor = run.received[source]
            return Arrived.apply(tensor) if tensor.requires_grad else tensor  # type: ignore[no-untyped-call] # in torch
        if leaf not in self._empty:
            self._empty[leaf] = torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device="meta")
        # A new one every time: the glue may hang something on a tensor (Keras its masks).
        return FakeTensor(self.mode, self._empty[leaf], self.device)


@contextmanager
def paused(draws: Draws) -> Iterator[None]:
    """Leave a unit's random operations to its own stream."""
    draws.paused = True
    try:
        yield
    finally:
        draws.paused = False
