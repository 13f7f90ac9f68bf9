"""Workload: what to compute, as the user wrote it for one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import default_collate

from weft.containers import opened
from weft.errors import BatchError, InputError

Loss = Tensor | tuple[Tensor, Tensor | int | float]
Box = tuple[slice, ...]
"""A box of a tensor: where it starts and stops along every dimension."""


class Stored(Protocol):
    """A tensor that is kept somewhere and can be read in boxes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""

    def read(self, box: Box) -> Tensor:
        """The values in a box of the whole tensor."""


Weights = Callable[[nn.Module], Mapping[str, Stored]]
"""Tells, for a model, where the values of all its parameters and persistent buffers are, by any of a tensor's names."""


def no_loss(model: nn.Module, batch: Any) -> Loss:
    """What a workload that was given no loss has for one. Raises InputError."""
    raise InputError(
        "this Workload has no loss; give it loss=lambda model, batch: ... to train, verify or compare it, or plan it "
        "with --purpose inference"
    )


def no_optimizer(parameters: Parameters) -> torch.optim.Optimizer:
    """What a workload that was given no optimizer has for one. Raises InputError."""
    raise InputError("this Workload has no optimizer; give it optimizer=lambda params: torch.optim.AdamW(params)")


class Parameters(Sequence[nn.Parameter]):
    """The parameters of the model, in its order, with the names a single device gives them.

    Parameter groups are made from the names::

        optimizer=lambda params: torch.optim.AdamW([
            {"params": [p for name, p in params.named() if name.endswith("bias")], "weight_decay": 0.0},
            {"params": [p for name, p in params.named() if not name.endswith("bias")], "weight_decay": 0.1},
        ])

    Every process sees all of them, so that it makes the same groups. What another process holds is a fake tensor: it
    has a name, a shape and ``requires_grad``, takes no memory, and leaves the groups once the optimizer is made.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._named = list(named)

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters."""
        return list(self._named)

    @overload
    def __getitem__(self, index: int) -> nn.Parameter: ...
    @overload
    def __getitem__(self, index: slice) -> list[nn.Parameter]: ...
    def __getitem__(self, index: int | slice) -> nn.Parameter | list[nn.Parameter]:
        chosen = self._named[index]
        return [parameter for _, parameter in chosen] if isinstance(chosen, list) else chosen[1]

    def __len__(self) -> int:
        return len(self._named)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, its loss, its data and its optimizer, written for one device.

    Args:
        model: factory of the model. It is called on fake tensors, so it costs no memory, and its random
            draws are repeated for real by the processes that own the weights.
        loss: ``loss(model, batch)``: a scalar mean over the samples of ``batch``, or ``(sum, count)`` for an exact
            weighted mean over the global batch (padding, for example).
        data: map-style data set (``len`` and ``[i]``); a sample is a tensor, a tuple or a dict.
        optimizer: factory of the optimizer from the parameters, a ``Parameters``: an iterable of parameters that also
            tells their names, for parameter groups with settings of their own.
        batch_size: global batch size, in samples.
        units: names of the modules to place as a whole; None finds them (the repeated blocks).
        seed: seeds the weights, the order of the samples and the random streams.
        shuffle: draw the samples of every epoch in a new order.
        collate: makes a batch of a list of samples; every tensor in it has the samples in dimension 0.
        max_grad_norm: clip gradients to this global L2 norm; None leaves them.
        weights: where the model's weights are, if they are not to be drawn: see ``Weights``. Each process reads what it
            owns of them, and no more.
        predict: ``predict(model, batch)``: what inference gives for a batch, tensors in any nesting with the samples in
            dimension 0. A workload that is never trained needs neither ``loss`` nor ``optimizer``.
        scheduler: factory of the learning-rate scheduler from the optimizer; it steps after every optimizer step.

    Raises:
        InputError: a value of the wrong kind.
    """

    model: Callable[[], nn.Module]
    data: Any
    batch_size: int
    loss: Callable[[nn.Module, Any], Loss] = no_loss
    optimizer: Callable[[Parameters], torch.optim.Optimizer] = no_optimizer
    predict: Callable[[nn.Module, Any], Any] | None = None
    weights: Weights | None = None
    units: Sequence[str] | None = None
    seed: int = 0
    shuffle: bool = True
    collate: Callable[[list[Any]], Any] = default_collate
    max_grad_norm: float | None = None
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None

    def __post_init__(self) -> None:
        if self.scheduler is not None and not callable(self.scheduler):
            raise InputError(
                f"Workload.scheduler must be callable, got {type(self.scheduler).__name__} (pass a factory: "
                "scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps))"
            )
        if self.predict is not None and not callable(self.predict):
            raise InputError(f"Workload.predict must be callable, got {type(self.predict).__name__}")
        if self.weights is not None and not callable(self.weights):
            raise InputError(f"Workload.weights must be callable, got {type(self.weights).__name__}")
        for name in ("model", "loss", "optimizer", "collate"):
            if not callable(getattr(self, name)):
                hint = " (pass a factory: model=lambda: MyModel())" if name == "model" else ""
                raise InputError(f"Workload.{name} must be callable, got {type(getattr(self, name)).__name__}{hint}")
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise InputError(
                f"Workload.batch_size must be a whole number of samples of at least 1, got {self.batch_size!r}"
            )
        if not (hasattr(self.data, "__len__") and hasattr(self.data, "__getitem__")):
            raise InputError(
                f"Workload.data must be a map-style data set with len() and [i], got {type(self.data).__name__}"
            )
        if len(self.data) < 1:
            raise BatchError("Workload.data is empty; weft needs at least one sample")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise InputError(f"Workload.max_grad_norm must be positive, got {self.max_grad_norm!r}")

    def sample_batch(self, samples: int) -> Any:
        """The first ``samples`` samples as a batch, repeated from the start where the data set is shorter."""
        return self.batch_of(range(samples))

    def batch_of(self, samples: Iterable[int]) -> Any:
        """A batch of some samples, by their numbers; numbers beyond the data set begin again."""
        return opened(self.collate([self.data[i % len(self.data)] for i in samples]))
