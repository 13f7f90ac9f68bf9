"""Optimizer: the user's, over what this rank holds, and the user's scheduler over the optimizer.

The factory sees the parameters of the whole model, as on one device: those that live elsewhere are fake tensors of the
right shape. So it makes the same groups everywhere, whatever it selects by; then what is fake leaves the groups. A
group may be left empty, as may all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from weft.capture.blame import first_line
from weft.errors import InputError
from weft.workload import Parameters, Workload


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


def plain(value: Any) -> Any:
    """What JSON keeps of a value, None of the rest: entries of dicts that are no plain data are left out."""
    if isinstance(value, Mapping):
        kept = {key: plain(x) for key, x in value.items() if isinstance(key, str)}
        return {key: x for key, x in kept.items() if x is not None or value[key] is None}
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else None


def restored(now: Any, kept: Any) -> Any:
    """A value with what was kept of an earlier one put in place."""
    if isinstance(now, Mapping) and isinstance(kept, Mapping):
        if not set(now) & set(kept):
            return now
        return {key: restored(x, kept[key]) if key in kept else x for key, x in now.items()}
    if isinstance(now, (list, tuple)) and isinstance(kept, list):
        if len(now) == len(kept) and any(isinstance(x, Mapping) for x in now):
            return type(now)(restored(x, y) for x, y in zip(now, kept, strict=True))
        return type(now)(kept)
    return kept
