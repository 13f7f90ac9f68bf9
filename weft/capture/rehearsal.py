"""Rehearsal: running a unit on fake tensors, whole or on shares, and comparing the two operation by operation.

That the rules find a proposal exact does not say that the user's code runs on shares: it may have a head count written
into a reshape, or compute a scale from a size. So the unit is run as one rank of so many would run it, and must do what
the whole unit does: the same operators in the same order, on the same numbers, with results of the whole's sizes where
they are whole and of a share's where they are divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from weft.capture.blame import first_line
from weft.capture.border import enter
from weft.capture.frames import RawOp
from weft.capture.isolation import restored, snapshot
from weft.capture.operations import STAND_INS
from weft.capture.recording import Example, TensorLeaf
from weft.capture.sharding import OPAQUE, Divided, State, argument
from weft.capture.tape import Ref, flat_tensors, written_arguments
from weft.plan import TensorStyle

Storage = int


class Step(NamedTuple):
    """One operation of a rehearsal.

    Attributes:
        name: of the operator.
        numbers: its arguments that are no tensors.
        sizes: of its results.
        inside: the modules it runs in, outermost first.
        given, made: storages of its arguments and results.
    """

    name: str
    numbers: tuple[Any, ...]
    sizes: tuple[tuple[int, ...], ...]
    inside: tuple[str, ...]
    given: tuple[Storage, ...]
    made: tuple[Storage, ...]


class Visit(NamedTuple):
    """One call of a module in a rehearsal: its steps ``start`` to ``end``, storages of what went in and came out."""

    module: str
    start: int
    end: int
    given: tuple[Storage, ...]
    returned: tuple[Storage, ...]


@dataclass(slots=True)
class Run:
    """What a rehearsal did; ``error`` is why it stopped, "" if it did not. ``shapes``: of what the unit returned."""

    steps: list[Step] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    error: str = ""


class Stage(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's class has an untyped __init_subclass__
    """Writes down the steps of a unit above a FakeTensorMode. ``hidden``: what runs is none of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # untyped in torch
        self.run, self.hidden = Run(), 0
        self.inside: list[str] = []
        self.storages: dict[int, Storage] = {}
        self.alive: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run on fake tensors and write down."""
        kwargs = kwargs or {}
        out = STAND_INS.get(func, func)(*args, **kwargs)
        made = list(flat_tensors(out))
        if not self.hidden and (made or list(flat_tensors(written_arguments(func, args, kwargs)))):
            self.run.steps.append(
                Step(
                    func._schema.name.replace("::", "."),
                    numbers((args, kwargs)),
                    tuple(tuple(t.shape) for t in made),
                    tuple(self.inside),
                    tuple(self.storage(t) for t in flat_tensors((args, kwargs))),
                    tuple(map(self.storage, made)),
                )
            )
        return out

    def storage(self, tensor: Tensor) -> Storage:
        """A storage by a number; it is kept alive, so that no other has its."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = len(self.alive)
            self.alive.append(storage)
        return self.storages[storage._cdata]

    def watch(self, module: nn.Module, name: str) -> None:
        """Note the calls of a module."""
        forward = module.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            start, given = len(self.run.steps), self._storages((args, kwargs))
            self.inside.append(name)
            result = forward(*args, **kwargs)
            self.inside.pop()
            self.run.visits.append(Visit(name, start, len(self.run.steps), given, self._storages(result)))
            return result

        module.__dict__["forward"] = watched

    def _storages(self, value: Any) -> tuple[Storage, ...]:
        return tuple(self.storage(t) for t in tree_leaves(value) if isinstance(t, Tensor))


def rehearse(
    model: nn.Module, example: Example, styles: Mapping[str, TensorStyle], degree: int, plain: frozenset[str]
) -> Run:
    """Run a unit as one of ``degree`` ranks would.

    Args:
        model: the model, fake.
        example: a call of the unit.
        styles: how it is divided; nothing runs it whole.
        degree: ranks.
        plain: modules that do nothing but multiply by their weight and add their bias.
    """
    unit = model.get_submodule(example.unit)
    mode: FakeTensorMode = next(p for p in unit.parameters()).fake_mode  # type: ignore[attr-defined] # fake
    stage = Stage()
    try:
        with mode, restored(unit), torch.enable_grad():
            shares = Shares(model, unit, styles, degree, stage, plain)
            shares.put()
            for name, module in unit.named_modules():
                stage.watch(module, join(example.unit, name))
            args, kwargs = tree_unflatten([_fake(x) for x in example.arguments], example.spec)
            # As when it was recorded: without hooks, autograd detaches the results it saves.
            with stage, saved_tensors_hooks(_itself, _itself):
                result = unit(*args, **kwargs)
        stage.run.shapes = [tuple(x.shape) for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
    except Exception as error:  # the user's code on sizes it may not expect: any failure means it cannot be divided
        stage.run.error = first_line(error) or type(error).__name__
    return stage.run


class Shares:
    """Puts one rank's shares into a fake unit."""

    def __init__(
        self,
        model: nn.Module,
        unit: nn.Module,
        styles: Mapping[str, TensorStyle],
        degree: int,
        stage: Stage,
        plain: frozenset[str],
    ) -> None:
        self.model, self.unit, self.styles, self.degree, self.stage, self.plain = (
            model,
            unit,
            styles,
            degree,
            stage,
            plain,
        )
        self.new: dict[int, nn.Parameter] = {}

    def put(self) -> None:
        """Divide what the styles name."""
        for name, style in self.styles.items():
            path, _, key = name.rpartition(".")
            if style.name == "share":
                module = self.model.get_submodule(path)
                setattr(module, key, getattr(module, key) // self.degree)
            elif style.name == "shard":
                assert style.dim is not None
                self._cut(self.model.get_parameter(name), style.dim, style.parts)
            elif style.name not in ("reduce", "sum_gradient"):
                self._module(name, style)
        for module in self.unit.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in self.new:
                    module._parameters[key] = self.new[id(parameter)]

    def _module(self, name: str, style: TensorStyle) -> None:
        module = self.model.get_submodule(name)
        whole = {key: p for key, p in module.named_parameters(recurse=False)}
        for key, dim in divided_dims(module, style).items():
            self._cut(whole[key], dim, style.parts)
        own = self._product(module, style) if name in self.plain else module.forward
        (weight,) = (p for p in whole.values() if p.dim() > 1)
        features = weight.shape[output_dim(module, style)]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if style.name == "embedding_rowwise":  # the look-up itself is the runtime's affair
                local, module._parameters["weight"] = module._parameters["weight"], weight
                result = own(*args, **kwargs)
                module._parameters["weight"] = local
                return result
            result = own(*args, **kwargs)
            if style.name.startswith("colwise_gather"):
                self.stage.hidden += 1
                dim = -1 if weight.dim() == 2 else 1 - weight.dim()
                result = torch.cat([result] * self.degree, dim).narrow(dim, 0, features).contiguous()
                self.stage.hidden -= 1
            return result

        module.__dict__["forward"] = forward

    def _product(self, module: nn.Module, style: TensorStyle) -> Callable[[Tensor], Tensor]:
        (key,) = (key for key, p in module.named_parameters(recurse=False) if p.dim() > 1)
        others = [k for k, _ in module.named_parameters(recurse=False) if k != key]

        def product(x: Tensor) -> Tensor:
            weight = module._parameters[key]
            assert weight is not None
            transposed = style.name.endswith("_transposed")
            return F.linear(x, weight.t() if transposed else weight, module._parameters[others[0]] if others else None)

        return product

    def _cut(self, whole: nn.Parameter, dim: int, parts: tuple[int, ...]) -> None:
        if id(whole) not in self.new:
            shape = list(whole.shape)
            shape[dim] = sum(-(-n // self.degree) for n in parts or (shape[dim],))
            local = torch.empty(shape, dtype=whole.dtype, device=whole.device)
            self.new[id(whole)] = nn.Parameter(local, requires_grad=whole.requires_grad)


def output_dim(module: nn.Module, style: TensorStyle) -> int:
    """The dimension of a projection's weight that makes its outputs."""
    return int(style.name.endswith("_transposed") or isinstance(module, nn.modules.conv._ConvTransposeNd))


def divided_dims(module: nn.Module, style: TensorStyle) -> dict[str, int]:
    """The dimension of each parameter of a module that its style divides, by the parameter's own name."""
    outputs = output_dim(module, style)
    column = style.name.startswith("colwise")
    dims = {}
    for key, parameter in module.named_parameters(recurse=False):
        if parameter.dim() > 1:
            dims[key] = 0 if style.name == "embedding_rowwise" else outputs if column else 1 - outputs
        elif column:
            dims[key] = 0
    return dims


def differs(
    whole: Sequence[Step],
    shares: Run,
    ops: Sequence[RawOp],
    states: Mapping[Ref, State],
    styled: frozenset[str],
    degree: int,
) -> tuple[int, str]:
    """How many operations a run on shares does as the whole unit would, and why the next one does not ("": all do).

    Args:
        whole: steps of the whole unit, one for each of ``ops``.
        shares: the run on shares.
        ops: the unit's operations, as recorded.
        states: of values that are divided or partial; others are whole.
        styled: modules whose inside is the runtime's affair.
        degree: the shares are of so many.
    """
    expected = [(step, op) for step, op in zip(whole, ops, strict=True) if _told(step, styled)]
    seen = [step for step in shares.steps if _told(step, styled)]
    for count, ((step, op), mine) in enumerate(zip(expected, seen, strict=False)):
        if mine.name != step.name or mine.inside != step.inside:
            return count, f"the unit's code does something else on 1/{degree} of the features ({mine.name})"
        sizes = tuple(_local(ref, states.get(ref), degree) for ref in op.outputs)
        if any(size is not None and size != had for size, had in zip(sizes, mine.sizes, strict=True)):
            return count, f"the unit's code does not run on 1/{degree} of the features: {mine.name} gives {mine.sizes}"
        if not _alike(step, mine, op, states, degree):
            return count, f"the unit's code computes other numbers on 1/{degree} of the features ({mine.name})"
    count = min(len(expected), len(seen))
    if shares.error:
        return count, f"the unit's code does not run on 1/{degree} of the features: {shares.error}"
    if len(expected) != len(seen):
        return count, f"the unit's code does something else on 1/{degree} of the features"
    return count, ""


LAYOUT = frozenset({"aten.view", "aten._unsafe_view", "aten.reshape", "aten.clone", "aten.alias", "aten.detach"})
"""Operators that a reshape turns into, depending on strides: what follows tells the sizes."""


def _told(step: Step, styled: frozenset[str]) -> bool:
    return step.name not in LAYOUT and styled.isdisjoint(step.inside)


def _local(ref: Ref, state: State | None, degree: int) -> tuple[int, ...] | None:
    if not isinstance(state, Divided):
        return ref.size
    if state.stretches == OPAQUE:
        return None
    size = list(ref.size)
    size[state.dim] //= degree
    return tuple(size)


SIZED = frozenset(
    f"aten.{name}"
    for name in (  # noqa: SIM905 # a table
        "view _unsafe_view reshape expand split split_with_sizes chunk slice new_zeros new_ones new_empty empty zeros "
        "ones narrow"
    ).split()
)
"""Operators whose numbers are sizes and bounds, which the sizes of their results tell."""


def _alike(whole: Step, mine: Step, op: RawOp, states: Mapping[Ref, State], degree: int) -> bool:
    """Whether the numbers are the same, or bounds within a divided dimension are a share's."""
    if whole.name not in SIZED:
        return whole.numbers == mine.numbers
    if whole.name != "aten.slice":
        return True
    given = op.args[0]
    state = states.get(given)
    dim = int(argument(op, 1, "dim", 0)) % len(given.size)
    scale = degree if isinstance(state, Divided) and state.dim == dim else 1
    size = given.size[dim]

    def bounds(step: Step, length: int) -> tuple[int, int, int]:
        start, end, by = (*step.numbers[1:], *(None,) * 3)[:3]
        return slice(start, end, by).indices(length)

    first, last, by = bounds(whole, size)
    a, b, c = bounds(mine, size // scale)
    return (a * scale, b * scale, c) == (first, last, by) or (by > 1 and a == first and by == c)


def numbers(value: Any) -> tuple[Any, ...]:
    """What is no tensor in the arguments of an operation, in order."""
    if isinstance(value, (Tensor, Ref)):
        return ()
    if isinstance(value, dict):
        return tuple((name, x) for name, v in value.items() for x in numbers(v))
    if isinstance(value, (list, tuple)):
        return tuple(x for v in value for x in numbers(v))
    return (value,)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _fake(value: Any) -> Any:
    if not isinstance(value, TensorLeaf):
        return snapshot(value)
    tensor = torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device_type)
    return enter(tensor)[1] if value.requires_grad else tensor


def join(path: str, name: str) -> str:
    """The name of what is called ``name`` inside ``path``."""
    return f"{path}.{name}" if path and name else path or name


def bytes_of(refs: Sequence[Ref]) -> int:
    """Bytes of tensors."""
    return sum(math.prod(ref.size) * ref.dtype.itemsize for ref in refs)
