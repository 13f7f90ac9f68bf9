"""Optimizer: the user's, over what this rank holds, and the user's scheduler over the optimizer.

The factory sees the parameters of the whole model, as on one device: those that live elsewhere are fake tensors of the
right shape. So it makes the same groups everywhere, whatever it selects by; then what is fake leaves the groups. A
group may be left empty, as may all of them.

What groups and schedulers keep goes into checkpoints as ``plain`` data, and is ``restored`` over what the factories
make in a later job.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from weft.capture.blame import first_line
from weft.errors import CheckpointError, InputError
from weft.plain import shown
from weft.workload import Parameters, Workload

RATES = ("lr", "initial_lr")
HOW = ("foreach", "fused", "capturable", "differentiable")
"""Settings of a group that say how it computes, not what."""

MOST_NUMBERS = 2**16
"""Of a tensor that is kept as text."""


def make_optimizer(workload: Workload, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """The workload's optimizer.

    Args:
        workload: whose.
        named: the parameters of the whole model; those that are not here are fake.

    Raises:
        InputError: the factory raised, or gave something else.
    """
    try:
        optimizer = workload.optimizer(Parameters(named))
    except Exception as error:  # the user's code: whatever it raises is told once
        raise InputError(
            f"Workload.optimizer raised {type(error).__name__}: {first_line(error)}; it must be a function of the "
            "model's parameters that returns a torch optimizer"
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"Workload.optimizer must return a torch.optim.Optimizer, got {type(optimizer).__name__}; "
            "write optimizer=lambda params: torch.optim.AdamW(params)"
        )
    for group in optimizer.param_groups:
        group["params"][:] = [p for p in group["params"] if not isinstance(p, FakeTensor)]
    for parameter in [p for p in optimizer.state if isinstance(p, FakeTensor)]:
        del optimizer.state[parameter]
    return optimizer


def make_scheduler(workload: Workload, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
    """The workload's learning-rate scheduler; None if it has none.

    Raises:
        InputError: the factory raised, or gave something else, or a scheduler that needs a metric to step.
    """
    if workload.scheduler is None:
        return None
    try:
        scheduler = workload.scheduler(optimizer)
    except Exception as error:  # the user's code: whatever it raises is told once
        raise InputError(
            f"Workload.scheduler raised {type(error).__name__}: {first_line(error)}; it must be a function of the "
            "optimizer that returns a torch learning-rate scheduler"
        ) from error
    if isinstance(scheduler, ReduceLROnPlateau):
        raise InputError(
            "Workload.scheduler returned a ReduceLROnPlateau, which needs a metric to step; use a scheduler that "
            "follows the number of steps"
        )
    if not isinstance(scheduler, LRScheduler):
        raise InputError(
            f"Workload.scheduler must return a torch.optim.lr_scheduler.LRScheduler, got {type(scheduler).__name__}; "
            "write scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)"
        )
    return scheduler


# -- what checkpoints keep --------------------------------------------------------------------------------------------


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """The name of an optimizer's class: PyTorch's own, where it is one of those or made of one."""
    own = type(optimizer)
    torchs = (c for c in own.__mro__ if c.__module__.startswith("torch.optim.") and c is not torch.optim.Optimizer)
    return next(torchs, own).__name__


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of an optimizer's groups, as plain data.

    Raises:
        CheckpointError: a learning rate, or a number, that cannot be kept.
    """
    kept = []
    for group in optimizer.param_groups:
        kept.append(plain({key: x for key, x in group.items() if key != "params"}, "a parameter group"))
        if lost := [key for key in RATES if key in group and key not in kept[-1]]:
            kind = type(group[lost[0]]).__name__
            raise CheckpointError(f"{lost[0]} of a parameter group is of type {kind}; make it a number or a tensor")
    return kept


def restore_settings(optimizer: torch.optim.Optimizer, kept: Sequence[Mapping[str, Any]], where: object) -> None:
    """Give an optimizer's groups what ``settings_of`` gave. Parameters, and how a group computes, stay as they are.

    Args:
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: these are settings of another optimizer's groups.
    """
    for number, (group, settings) in enumerate(zip(optimizer.param_groups, kept, strict=True)):
        of = f"parameter group {number} of {where}"
        if "lr" in group and "lr" not in settings:
            raise CheckpointError(f"{of} has no learning rate; go on from another checkpoint")
        for key, value in settings.items():
            if key in ("params", "param_names", *HOW):
                continue
            now = group.get(key)
            if value is None and now is not None:
                raise misfit(now, value, f"{key} of {of}")
            group[key] = restored(now, value, f"{key} of {of}")


def plain(value: Any, name: str = "the scheduler") -> Any:
    """What JSON keeps of a value: numbers (of tensors and arrays too), text, lists, and dicts with text for keys.

    Of the rest None, and in dicts nothing: functions and other objects are as the factory makes them. A scheduler
    inside another one is kept as its state.

    Args:
        value: of a group's settings or a scheduler's state.
        name: of it, for messages.

    Raises:
        CheckpointError: a number, or numbers, of a kind that JSON has not.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        if isinstance(value, FakeTensor) or value.numel() > MOST_NUMBERS or value.is_complex():
            raise CheckpointError(
                f"{name} is a tensor of {value.dtype} and shape {tuple(value.shape)}, which a checkpoint does not "
                "hold; keep what belongs to a parameter in optimizer.state[parameter]"
            )
        return value.item() if value.numel() == 1 else value.tolist()
    if _is_array(value):
        if value.size > MOST_NUMBERS:
            raise CheckpointError(f"{name} is an array of shape {value.shape}, which a checkpoint does not hold")
        return value.item() if value.size == 1 else value.tolist()
    if isinstance(value, Number):
        raise CheckpointError(f"{name} is {shown(value)}, a number that JSON has not; make it an int or a float")
    if isinstance(value, Mapping):
        kept = {key: plain(x, f"{key} of {name}") for key, x in value.items() if isinstance(key, str)}
        return {key: x for key, x in kept.items() if x is not None or value[key] is None}
    if isinstance(value, (list, tuple, deque)):
        return [plain(x, name) for x in value]
    return plain(value.state_dict(), name) if isinstance(value, LRScheduler) else None


def restored(now: Any, kept: Any, name: str = "the scheduler") -> Any:
    """A value with what ``plain`` kept of an earlier one put in place.

    Args:
        now: as the factory made it. Tensors are filled where they are; of lists, what was not kept stays.
        kept: of the earlier one.
        name: of it, for messages.

    Raises:
        CheckpointError: one is not of the other's kind.
    """
    if now is None or kept is None:
        return kept
    if isinstance(now, Tensor):
        return _tensor(now, kept, name)
    if _is_array(now):
        return _array(now, kept, name)
    if isinstance(now, (bool, int, float)) and isinstance(kept, (bool, int, float)):
        return kept
    if isinstance(now, str) and isinstance(kept, str):
        return kept
    if isinstance(now, Mapping) and isinstance(kept, Mapping):
        if not set(now) & set(kept):
            return now
        return {key: restored(x, kept[key], f"{key} of {name}") if key in kept else x for key, x in now.items()}
    if isinstance(now, (list, tuple, deque)) and isinstance(kept, list):
        if isinstance(now, tuple) and len(now) != len(kept):
            raise misfit(now, kept, name)
        both = [x if y is None else restored(x, y, name) for x, y in zip(now, kept, strict=False)]
        found = both + kept[len(both) :]
        return deque(found, now.maxlen) if isinstance(now, deque) else type(now)(found)
    if isinstance(now, LRScheduler) and isinstance(kept, Mapping):
        now.load_state_dict(restored(now.state_dict(), kept, name))
        return now
    if isinstance(now, (bool, int, float, str, Mapping, list, tuple, deque, LRScheduler)):
        raise misfit(now, kept, name)
    return now  # a function, or another object: as the factory makes it


def _tensor(now: Tensor, kept: Any, name: str) -> Tensor:
    """A tensor with numbers put in place; a new one where there are more or fewer of them."""
    if not _are_numbers(kept):
        raise misfit(now, kept, name)
    try:
        given = torch.tensor(kept, dtype=now.dtype)
    except (TypeError, ValueError, RuntimeError) as error:  # lists of several lengths, a number that is too large
        raise misfit(now, kept, name) from error
    if given.dim() == 0 and now.numel() == 1:
        given = given.reshape(now.shape)
    if given.shape == now.shape:
        with torch.no_grad():
            return now.copy_(given)
    if now.dim() == 0:
        raise misfit(now, kept, name)
    return given.to(now.device)


def _array(now: Any, kept: Any, name: str) -> Any:
    """Numbers as numpy had them. A number that its dtype would round stays as it is."""
    if not _are_numbers(kept):
        raise misfit(now, kept, name)
    try:
        given = np.asarray(kept, dtype=now.dtype)
    except (TypeError, ValueError, OverflowError) as error:  # as above
        raise misfit(now, kept, name) from error
    if isinstance(now, np.ndarray):
        return given.reshape(now.shape) if given.size == now.size else given
    if given.ndim:
        raise misfit(now, kept, name)
    return given[()] if given.item() == kept else kept


def _is_array(value: Any) -> bool:
    """Whether a value is a number or numbers as numpy has them, and JSON too."""
    return isinstance(value, (np.generic, np.ndarray)) and value.dtype.kind in "biuf" and value.itemsize <= 8


def _are_numbers(kept: Any) -> bool:
    return isinstance(kept, (bool, int, float)) or (isinstance(kept, list) and all(map(_are_numbers, kept)))


def misfit(now: Any, kept: Any, name: str) -> CheckpointError:
    """The error for a value that was kept of something else."""
    return CheckpointError(
        f"{name}: the checkpoint has {shown(kept)} in the place of {shown(now)}; go on with the optimizer and the "
        "scheduler it was saved with"
    )
