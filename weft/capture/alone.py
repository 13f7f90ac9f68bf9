"""Alone: a unit's call run by itself, forward and backward, on tensors that share nothing with the glue's.

It is run on fake tensors. What cannot be (an operator without a fake version, a look at values, a kernel that wants
memory) is run once on real ones: the unit's weights are made for the moment, arguments are what is known of them, or
made up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_unflatten

from weft.capture.blame import told
from weft.capture.border import entered, form, gradient_for, gradients_of
from weft.capture.draws import has_drawn, python_state, restore_python
from weft.capture.effects import Effect, Leavings
from weft.capture.frames import Frame
from weft.capture.initial import map_tensors
from weft.capture.names import Names
from weft.capture.reach import reached
from weft.capture.recording import Cost, SavedStorage
from weft.capture.tape import Ref
from weft.capture.trace import Trace
from weft.capture.trees import Tree, flatten

Weights = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Real tensors for fake ones, by first name."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call did.

    Attributes:
        leaves, tree: its outputs, a TensorLeaf for every tensor.
        effects: what it left in objects it was given.
        cost: operations and what is saved.
        changes: which of its tensor arguments it wrote to.
        used: which of them it read, wrote or returned.
        reach: for each tensor it returned, the tensor arguments its gradient goes on to.
        values: the tensors it returned and left, if it ran on real ones.
        left: the tensors it left, as they are.
    """

    leaves: tuple[Any, ...]
    tree: Tree
    cost: Cost
    changes: frozenset[int]
    used: frozenset[int]
    reach: tuple[frozenset[int], ...]
    effects: tuple[Effect, ...] = ()
    values: tuple[Tensor, ...] = ()
    left: tuple[Tensor, ...] = ()


@dataclass(slots=True)
class Alone:
    """One call of a unit.

    Attributes:
        trace: writes down what it does.
        number, unit, module: whose call; ``model``: all of it.
        names: first names of the model's tensors by id.
        backward: whether to run it.
        watches: whether to look for what it leaves in objects it was given.
        frame: what is written down of the forward.
        given: storages of its tensor arguments.
        leaves, tree: its outputs, as in Outcome; ``returned``: the tensors among them.
        python_draws: whether it drew from Python's or NumPy's generator.
        leaves_something: whether it left tensors in objects it was given.
    """

    trace: Trace
    number: int
    unit: str
    module: nn.Module
    model: nn.Module
    names: Names
    backward: bool
    watches: bool
    frame: Frame
    given: list[int] = field(default_factory=list)
    leaves: tuple[Any, ...] = ()
    tree: Tree = field(init=False)
    returned: tuple[Ref, ...] = ()
    python_draws: bool = False
    leaves_something: bool = False

    def run(self, forward: Callable[..., Any], leaves: list[Any], spec: TreeSpec) -> Callable[[], Outcome]:
        """Run the forward on fake tensors; what is returned runs the backward and sums up."""
        arguments, ends = entered(leaves)
        return self._forward(forward, arguments, spec, places_of(leaves, ends))

    def run_for_real(self, forward: Callable[..., Any], leaves: list[Any], spec: TreeSpec, weights: Weights) -> Outcome:
        """Run forward and backward on real tensors."""
        self.frame.real = True
        values = {id(x): self._value(x) for x in leaves if isinstance(x, Tensor)}
        with (
            torch.random.fork_rng(devices=[]),
            _disable_current_modes(),
            real_weights([self.module], weights, self.names, self.trace),
        ):
            torch.manual_seed(self.number)
            ends = {id(x): values[id(x)].requires_grad_() for x in leaves if isinstance(x, Tensor) and x.requires_grad}
            inside = {key: end.clone() if key in ends else end for key, end in values.items()}
            arguments = [inside[id(x)] if isinstance(x, Tensor) else x for x in leaves]
            with self.trace:
                return self._forward(forward, arguments, spec, places_of(leaves, ends))()

    def _forward(
        self, forward: Callable[..., Any], arguments: list[Any], spec: TreeSpec, ends: dict[int, Tensor]
    ) -> Callable[[], Outcome]:
        trace, frame = self.trace, self.frame
        given = self.given = [trace.ref(x).storage for x in arguments if isinstance(x, Tensor)]
        frame.arguments = frozenset(given)
        args, kwargs = tree_unflatten(arguments, spec)
        watch = Leavings(arguments if self.watches else ())
        before = python_state()
        try:
            with trace.recording(frame):
                result = told(self.unit, forward, *args, **kwargs)
            self.python_draws = has_drawn(before)
        finally:
            restore_python(before)
        effects, left = watch.effects()
        self.leaves_something = bool(left)
        workspace = frame.workspace()
        flat, self.tree = flatten(result)
        flat += left
        self.leaves = tuple(map(form, flat))
        tensors = [x for x in flat if isinstance(x, Tensor)]
        self.returned = tuple(map(trace.ref, tensors))

        def finish() -> Outcome:
            returned = [ref.storage for ref in self.returned]
            back = Frame(self.unit, self.number, forward=False, real=frame.real)
            peak = workspace
            roots = [t for t in tensors if t.requires_grad]
            places = {id(end): place for place, end in ends.items()}
            reach = tuple(frozenset(reached([t], places, set())) for t in tensors)
            if self.backward and roots:
                weights = [t for t in self._read() if t.requires_grad]
                gradients = [gradient_for(t) for t in roots]
                for gradient in gradients:
                    trace.ref(gradient)  # seen before recording, so that it is not counted as made here
                with trace.recording(back):
                    results = told(self.unit, gradients_of, roots, [*ends.values(), *weights], gradients)
                passing = frozenset(trace.ref(g).storage for g in results[len(ends) :] if g is not None)
                peak = max(peak, back.workspace(passing))
            saved = tuple(
                SavedStorage(
                    storage,
                    size,
                    given.index(storage) if storage in given else None,
                    returned.index(storage) if storage in returned else None,
                )
                for storage, size in frame.saved.items()
            )
            return Outcome(
                leaves=self.leaves,
                tree=self.tree,
                cost=Cost(tuple(frame.operations), tuple(back.operations), saved, peak, self.returned),
                changes=frozenset(i for i, storage in enumerate(given) if storage in frame.changed),
                used=frozenset(i for i, s in enumerate(given) if frame.real or s in frame.touched or s in returned),
                reach=reach,
                effects=effects,
                values=tuple(t.detach() for t in tensors) if frame.real else (),
                left=tuple(left),
            )

        return finish

    @property
    def own(self) -> tuple[int, ...]:
        """Storages of the tensors the module holds."""
        return tuple(self.trace.ref(tensor).storage for tensor in self.names.tensors_in(self.module))

    def _read(self) -> list[Tensor]:
        """The model's tensors that were read; mostly they are the module's own."""
        for module in (self.module, self.model):
            read = [t for t in self.names.tensors_in(module) if self.names[id(t)] in self.frame.reads]
            if {self.names[id(t)] for t in read} == self.frame.reads:
                break
        return read

    def _value(self, tensor: Tensor) -> Tensor:
        """A real tensor in the place of an argument."""
        if not isinstance(tensor, FakeTensor):
            return tensor.detach().clone()
        known = self.trace.known.of(tensor)
        if known is not None:
            return known.clone()
        return made_up(tensor)


def places_of(leaves: Sequence[Any], ends: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The leaves that stand for tensor arguments, by the arguments' ``id``, as by their position among the tensors."""
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    first = {id(x): place for place, x in reversed([*enumerate(tensors)])}
    return {first[key]: end for key, end in ends.items()}


@contextmanager
def real_weights(
    modules: Sequence[nn.Module], weights: Weights, names: Names, trace: Trace, *, deep: bool = True
) -> Iterator[None]:
    """Put real tensors in the place of the fake ones of some modules.

    Args:
        modules: whose.
        weights: makes them.
        names: first names of the model's tensors by id; knows the real ones meanwhile.
        trace: is told the names of their storages.
        deep: their submodules', too.
    """
    found = [t for module in modules for t in names.tensors_in(module) if isinstance(t, FakeTensor)]
    fakes = {names[id(t)]: t for t in found}
    there: dict[int, Tensor] = {}
    back: dict[int, Tensor] = {}
    for name, value in weights(fakes).items():
        fake = fakes[name]
        if isinstance(fake, nn.Parameter):
            value = nn.Parameter(value, requires_grad=fake.requires_grad)
        there[id(fake)], back[id(value)] = value, fake
        names[id(value)] = name
        trace.names[trace.ref(value).storage] = name
    for module in modules:
        map_tensors(module, deep=deep, change=lambda _, t: there.get(id(t), t))
    try:
        yield
    finally:
        for module in modules:
            map_tensors(module, deep=deep, change=lambda _, t: back.get(id(t), t))
        for key in back:
            del names[key]


def made_up(tensor: Tensor) -> Tensor:
    """A real tensor of the form of a fake one: normal numbers, zeros (which are valid indices), or True."""
    with _disable_current_modes(), torch.no_grad():
        value = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        if tensor.is_floating_point() or tensor.is_complex():
            return value.normal_(generator=torch.Generator().manual_seed(0))
        return value.fill_(tensor.dtype is torch.bool)
