"""Initial weights: those the single device would have, on whoever owns them.

The factory runs once on fake tensors (``build_fake``) while a Tape records its operations. Each process then replays
the tape (``materialize``): random operations draw as they would on one device, and what is not wanted here is never
kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from weft.adapters import adapt, making
from weft.capture.blame import first_line, place_of
from weft.capture.replay import replay, value
from weft.capture.tape import Ref, Tape
from weft.errors import ModelError
from weft.workload import Box, Stored, Weights

Cut = Callable[[Tensor], Tensor]
"""Takes the part of a full tensor that is to be kept."""


@dataclass(frozen=True, eq=False)
class FakeModel:
    """A model without memory, and how to make its values.

    Attributes:
        model: the module the factory made; its tensors are fake tensors of ``mode``.
        mode: their mode.
        names: every name a tensor of the model has, by its first: parameters, buffers and plain tensor attributes.
        refs: where each of them is on the tape, by first name; a tensor the factory did not make itself is there as
            it is.
        tape: the operations of the factory.
        seed: the seed the weights are drawn from.
        stored: of tensors that are not drawn, by first name, where their values are.
    """

    model: nn.Module
    mode: FakeTensorMode
    names: dict[str, tuple[str, ...]]
    refs: dict[str, Ref | Tensor]
    tape: Tape
    seed: int
    stored: Mapping[str, Stored] = field(default_factory=dict)

    def first(self, name: str) -> str:
        """The first name of the tensor that has this one. Raises KeyError for a name the model does not have."""
        return name if name in self.names else next((f for f, all_ in self.names.items() if name in all_), name)


def build_fake(factory: Callable[[], nn.Module], seed: int, weights: Weights | None = None) -> FakeModel:
    """Run a model factory on fake tensors. The caller's random generator is left as it was.

    Args:
        factory: of the model.
        seed: to draw its weights from.
        weights: where they are, if they are not to be drawn.

    Raises:
        ModelError: the factory raised, made no module, or looked at values it had drawn.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tape = Tape(mode, value)
    with seeded(seed), making(), mode, tape, _truncated_normal_on(tape):
        try:
            model = factory()
        except DataDependentOutputException as error:
            raise ModelError(
                f"the model factory looks at a value that depends on random numbers ({place_of(error)}), which is "
                "not known before the weights are drawn; compute it from plain Python numbers"
            ) from error
        except Exception as error:  # the user's code: whatever it raises is told once, with its place
            raise ModelError(
                f"the model factory raised {type(error).__name__}: {first_line(error)} ({place_of(error)})"
            ) from error
    adapt(model)
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model factory must return a torch.nn.Module, got {type(model).__name__}")
    names: dict[int, list[str]] = {}
    refs: dict[str, Ref | Tensor] = {}

    def note(name: str, tensor: Tensor) -> Tensor:
        if id(tensor) not in names:
            refs[name] = tape.ref(tensor) if isinstance(tensor, FakeTensor) else tensor
        names.setdefault(id(tensor), []).append(name)
        return tensor

    map_tensors(model, note)
    fake = FakeModel(model, mode, {all_[0]: tuple(all_) for all_ in names.values()}, refs, tape, seed)
    if weights is None:
        return fake
    return replace(fake, stored={fake.first(name): stored for name, stored in weights(model).items()})


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a seed inside the block: torch on the CPU, Python and numpy, which some frameworks draw weights from.
    The caller's generators are left as they were."""
    python, legacy_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy_numpy)


def materialize(
    fake: FakeModel, wanted: Mapping[str, Cut | None], *, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The values of tensors of a model, bit for bit those of ``torch.manual_seed(seed); factory()``, or as stored.

    They are computed on the CPU, about one at a time, each cut and moved as soon as it is final.

    Args:
        fake: the model.
        wanted: names (parameters, buffers, plain attributes) and what to keep of each: a function of the full tensor,
            or None for all of it. Tied names need to be given once.
        device: where to put them.

    Returns:
        Tensors under the names wanted; names that are tied share one tensor.
    """
    kept: dict[str, Tensor] = {}
    cuts = {fake.first(name): cut for name, cut in wanted.items()}

    def keep(name: str, full: Tensor) -> None:
        cut = cuts[name]
        part = full if cut is None else cut(full)
        if part.untyped_storage().nbytes() > part.numel() * part.itemsize:
            part = part.clone()  # a view would keep all of the full tensor
        kept[name] = part.to(device)

    made: dict[str, Ref] = {}
    for name in cuts:
        ref = fake.refs[name]
        if (stored := fake.stored.get(name)) is not None:
            keep(name, stored.read(whole(stored)).to(ref.dtype))
        elif isinstance(ref, Tensor):
            keep(name, ref.detach().clone())
        else:
            made[name] = ref
    replay(fake.tape, made, keep, draws=not fake.stored)
    return {name: kept[fake.first(name)] for name in wanted}


def whole(stored: Stored) -> Box:
    """The box that is all of a tensor."""
    return tuple(slice(0, length) for length in stored.shape)


@torch.no_grad()
def fill(model: nn.Module, weights: Weights | None) -> nn.Module:
    """A real model with the values that are stored for it, if there are any, in place of its own."""
    if weights is not None:
        held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        for name, stored in weights(model).items():
            held[name].copy_(stored.read(whole(stored)))
    return model


def assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into a model and leave no fake tensor in it.

    Args:
        model: the model; a parameter stays a Parameter, with its ``requires_grad``, under every name it is tied to.
        tensors: by name; one of the names of a tied tensor is enough. Other fake tensors become meta tensors.
    """
    new: dict[int, Tensor] = {}
    old: list[Tensor] = []  # keeps ids from being used again

    def given(name: str, tensor: Tensor) -> Tensor:
        if name in tensors:
            value = tensors[name]
            if isinstance(tensor, nn.Parameter) and not isinstance(value, nn.Parameter):
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            new.setdefault(id(tensor), value)
        return tensor

    def put(name: str, tensor: Tensor) -> Tensor:
        old.append(tensor)
        if id(tensor) not in new and isinstance(tensor, FakeTensor):
            meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            new[id(tensor)] = nn.Parameter(meta, requires_grad=tensor.requires_grad) if is_parameter else meta
        return new.get(id(tensor), tensor)

    map_tensors(model, given)
    map_tensors(model, put)


def map_tensors(model: nn.Module, change: Callable[[str, Tensor], Tensor], *, deep: bool = True) -> None:
    """Put ``change(name, tensor)`` in the place of every tensor of a model, under each of its names.

    Parameters come first, then buffers, then plain attributes of modules, lists, tuples and dicts of tensors included
    (``"rope.tables.0"``). ``deep=False`` leaves submodules alone.
    """
    modules = list(model.named_modules(remove_duplicate=False)) if deep else [("", model)]
    # A module registered twice is changed once, under all its names.
    for registry in ("_parameters", "_buffers", ""):
        results: dict[tuple[int, str], Any] = {}
        for prefix, module in modules:
            for key, held in vars(module)[registry].items() if registry else vars(module).items():
                if key not in ("_parameters", "_buffers", "_modules"):
                    results[id(module), key] = _map(held, f"{prefix}.{key}" if prefix else key, change)
        for _, module in modules:
            slots = vars(module)[registry] if registry else vars(module)
            for key, old in list(slots.items()):
                slots[key] = results.get((id(module), key), old)


def _map(value: Any, name: str, change: Callable[[str, Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(name, value)
    if type(value) in (list, tuple):
        changed = [_map(x, f"{name}.{i}", change) for i, x in enumerate(value)]
        return value if all(a is b for a, b in zip(changed, value, strict=True)) else type(value)(changed)
    if type(value) is dict:
        mapped = {key: _map(x, f"{name}.{key}", change) for key, x in value.items()}
        return value if all(mapped[key] is x for key, x in value.items()) else mapped
    return value


@contextmanager
def _truncated_normal_on(tape: Tape) -> Iterator[None]:
    """Let ``trunc_normal_`` be one step of the tape: it draws until all numbers are in range, which only real numbers
    tell."""
    original = torch.nn.init._no_grad_trunc_normal_

    def record(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(tensor, FakeTensor):
            return original(tensor, *args, **kwargs)
        return tape.draw(original, tensor, *args, *kwargs.values())

    with mock.patch.object(torch.nn.init, "_no_grad_trunc_normal_", record):
        yield
