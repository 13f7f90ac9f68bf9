"""Reference: the single device, in plain PyTorch. What every plan is held against.

Where the model draws nothing, a step is what the user would write: the loss of the whole batch, ``backward``, clip,
``step``. Where it draws (dropout), one batch in one piece would draw other masks than microbatches do, so the batch is
cut as the plan cuts it and every piece draws from the plan's streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from weft.capture.initial import build_fake
from weft.capture.recorder import Recording
from weft.capture.units import find_units
from weft.plan import Plan
from weft.runtime.batches import Sampler, count_samples, cut, layout
from weft.runtime.placement import Placement, Run, split_loss
from weft.runtime.randomness import Seeds
from weft.runtime.recordings import Recordings
from weft.runtime.routes import Routes
from weft.workload import Loss, Parameters, Workload


@dataclass(frozen=True)
class ReferenceStep:
    """One step of the single device.

    Attributes:
        loss: mean over the batch.
        gradients: by first name, after clipping.
    """

    loss: float
    gradients: dict[str, Tensor]


class SingleDevice:
    """The workload trained on one device, from the same weights and on the same batches as any plan.

    Args:
        workload: what to train.
        device: where.
        plan: the plan it is compared with; decides how a batch is cut if the model draws random numbers.
    """

    def __init__(self, workload: Workload, device: torch.device, *, plan: Plan) -> None:
        self.workload, self.device, self.plan = workload, device, plan
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(workload.seed)
            self.model = workload.model().to(device)
        self.optimizer = workload.optimizer(Parameters(self.model.named_parameters()))
        self.sampler = Sampler(workload)
        self._fake = build_fake(workload.model, workload.seed)
        self._units = find_units(self._fake.model, workload.units)
        self._recordings = Recordings(workload, self._fake, self._units)
        longest = self._recordings.longest(workload.sample_batch(plan.samples_per_microbatch))
        routes = self._routes(longest)
        in_python = longest.python_draws or any(call.python_draws for call in longest.calls)
        self._random = routes.glue_random or bool(routes.random) or in_python
        self._placement = (
            Placement(self.model, self._units, stage=0, mode=self._fake.mode, device=device) if self._random else None
        )

    def steps(self, count: int) -> Iterator[ReferenceStep]:
        """Train; yields after every step."""
        for step in range(count):
            batch = tree_map(
                lambda leaf: leaf.to(self.device) if isinstance(leaf, Tensor) else leaf, self.sampler.global_batch(step)
            )
            self.optimizer.zero_grad()
            loss = self._pieces(batch, step) if self._random else self._whole(batch)
            if self.workload.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.workload.max_grad_norm)
            self.optimizer.step()
            yield ReferenceStep(loss, {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None})

    def _whole(self, batch: Any) -> float:
        value, count = split_loss(self.workload.loss(self.model, batch))
        mean = value if count is None else value / count
        mean.backward()  # type: ignore[no-untyped-call]  # torch's
        return float(mean.detach())

    def _pieces(self, batch: Any, step: int) -> float:
        assert self._placement is not None
        total = count_samples(batch)
        pieces = [
            (r, m, piece)
            for r, part in enumerate(layout(total, self.plan.replicas, self.plan.microbatches))
            for m, piece in enumerate(part)
            if len(piece)
        ]
        sums, counts = [], []
        for replica, m, piece in pieces:
            microbatch = cut(batch, piece)
            seeds = Seeds(self.workload.seed, step, m, replica)
            recording = self._recordings.of(microbatch, seeds)
            run = Run(recording, self._routes(recording), {}, seeds)
            value, count = split_loss(self._placement.forward(self.workload, microbatch, run))
            sums.append(value if count is not None else value * len(piece))
            counts.append(float(count) if count is not None else float(len(piece)))
        mean = torch.stack(sums).sum() / sum(counts)
        mean.backward()  # type: ignore[no-untyped-call]  # torch's
        return float(mean.detach())

    def _routes(self, recording: Recording) -> Routes:
        names = tuple(call.name for call in recording.calls[:-1])
        return Routes.find(recording, Plan(stages=(names,), batch_size=self.plan.batch_size))


def in_dtype(workload: Workload, dtype: torch.dtype) -> Workload:
    """The workload with its parameters and floating-point inputs in another dtype."""

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    def loss(model: nn.Module, batch: Any) -> Loss:
        with InsteadOfFloat32(dtype):
            return workload.loss(model, tree_map(cast, batch))

    return replace(workload, model=lambda: workload.model().to(dtype), loss=loss)


class InsteadOfFloat32(TorchFunctionMode):
    """Code that asks for float32 (norms and softmax often do) gets another dtype.

    Rounding to float32 inside a float64 model turns a difference in the last bit of a float64 into one of float32.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run with the dtype exchanged."""
        if func is Tensor.float:
            return args[0].to(self.dtype)
        args = tuple(self.dtype if arg is torch.float32 else arg for arg in args)
        kwargs = {key: self.dtype if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)
