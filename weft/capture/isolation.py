"""Isolation: running a user's model leaves no trace in it."""

from __future__ import annotations

import gc
import io
import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from weft.adapters import running
from weft.capture.blocks import FUNCTIONS, PLAIN

COLLECTED = 1_000_000
"""Objects more than there were, before Python looks for garbage among the new ones."""


@contextmanager
def restored(model: nn.Module, *, only_if_it_raises: bool = False) -> Iterator[None]:
    """Put every module's attributes back: forwards cache tensors in them; and gradients, which an autograd function may
    have left. Fake tensors are on the CPU."""
    before = [
        (module, dict(vars(module)), {k: dict(vars(module)[k]) for k in ("_parameters", "_buffers", "_modules")})
        for module in model.modules()
    ]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    completed = False
    try:
        with running("cpu"):
            yield
        completed = True
    finally:
        for parameter, gradient in gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient
        for module, attributes, registries in before if not (completed and only_if_it_raises) else ():
            vars(module).clear()
            vars(module).update(attributes)
            for key, values in registries.items():
                vars(module)[key].clear()
                vars(module)[key].update(values)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the fake tensors' log to ourselves: what it would say is raised as an error."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def seldom_collecting() -> Iterator[None]:
    """Let Python look for garbage in cycles less often: it walks the objects of torch and of the user's libraries, too,
    a million at times, and a recording or a search makes so many that it would do so all the while."""
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], COLLECTED) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def saving(note: Callable[[Tensor], None]) -> Iterator[None]:
    """Tell what autograd saves. It saves tensors as they are (by itself it detaches results, which is an operation) and
    only in this block: for longer, results, their graph and whoever is told would keep each other for good."""
    kept: list[list[Any]] = [[note]]

    def pack(tensor: Tensor) -> list[Tensor]:
        kept[0][0](tensor)
        kept.append([tensor])
        return kept[-1]

    try:
        with saved_tensors_hooks(pack, lambda box: box[0]):
            yield
    finally:
        for box in kept:
            box.clear()


def snapshot(leaf: Any) -> Any:
    """An argument as it is now: a copy of an object the unit may change (a cache), whose tensors are not copied."""
    if isinstance(leaf, (Tensor, nn.Module, *PLAIN)):
        return leaf
    kept: list[Any] = []

    class Pickler(pickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:  # unlike persistent_id not asked of every number and string
            if obj is _kept or not isinstance(obj, (Tensor, nn.Module, *FUNCTIONS)):
                return NotImplemented
            kept.append(obj)
            return _kept, (len(kept) - 1,)

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return (
                kept.__getitem__ if (module, name) == (__name__, _kept.__name__) else super().find_class(module, name)
            )

    buffer = io.BytesIO()
    try:
        Pickler(buffer).dump(leaf)
        return Unpickler(io.BytesIO(buffer.getvalue())).load()
    except Exception:  # the user's object: what cannot be copied is used as it is
        return leaf


def _kept(place: int) -> Any:
    """Stands in a pickle for what is not copied."""


def revert(leaf: Any, before: Any) -> None:
    """Put an argument back to what a snapshot of it says."""
    if leaf is before:
        return
    if isinstance(leaf, dict):
        leaf.clear()
        leaf.update(before)
    if hasattr(leaf, "__dict__"):
        vars(leaf).clear()
        vars(leaf).update(vars(before))
