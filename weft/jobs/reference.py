"""Reference: the single device, in plain PyTorch. What every plan is held against.

Where the model draws nothing, a step is what the user would write: the loss of the whole batch, ``backward``, clip,
``step``. Where it draws (dropout), one batch in one piece would draw other masks than microbatches do, so the batch is
cut as the plan cuts it and every piece draws from the plan's streams.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from weft.adapters import adapt, making, running
from weft.capture.initial import build_fake, seeded
from weft.capture.recorder import Recording
from weft.capture.units import find_units
from weft.plan import Plan
from weft.precision import in_precision
from weft.runtime.batches import Sampler, count_samples, cut, layout
from weft.runtime.placement import Placement, Run, split_loss
from weft.runtime.randomness import Seeds
from weft.runtime.recordings import Recordings
from weft.runtime.routes import Routes
from weft.runtime.scaling import LossScale
from weft.workload import Loss, Parameters, Workload

FLOOR = {"float64": 1e-6, "float32": 6e-3}
"""A tensor's norm counts as at least this share of the norm of all of them together: some gradients are zero but for
rounding (the bias of attention keys), and rounding over rounding says nothing. One rounding over the tolerance: what
rounding adds to such a tensor comes from all the others."""


@dataclass(frozen=True)
class ReferenceStep:
    """One step of the single device.

    Attributes:
        loss: mean over the batch.
        gradients: by first name, after clipping.
        taken: whether the optimizer stepped: in float16 not where a gradient overflowed.
    """

    loss: float
    gradients: dict[str, Tensor]
    taken: bool = True


class SingleDevice:
    """The workload trained on one device, from the same weights and on the same batches as any plan.

    Args:
        workload: what to train.
        device: where.
        plan: the plan it is compared with; decides how a batch is cut if the model draws random numbers.
    """

    def __init__(self, workload: Workload, device: torch.device, *, plan: Plan) -> None:
        workload = in_precision(workload, plan.precision)
        self.workload, self.device, self.plan = workload, device, plan
        self.loss_scale = LossScale() if plan.precision == "fp16" else None
        with seeded(workload.seed), making():
            self.model = adapt(workload.model()).to(device)
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

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers."""
        return {n: t.detach() for n, t in self.model.named_parameters()} | dict(self.model.named_buffers())

    def steps(self, count: int | None = None) -> Iterator[ReferenceStep]:
        """Train, for ever if there is no count; yields after every step."""
        for step in itertools.count() if count is None else range(count):
            batch = tree_map(
                lambda leaf: leaf.to(self.device) if isinstance(leaf, Tensor) else leaf, self.sampler.global_batch(step)
            )
            self.optimizer.zero_grad()
            loss = self._pieces(batch, step) if self._random else self._whole(batch)
            self._unscale()
            if self.workload.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.workload.max_grad_norm)
            taken = self.loss_scale is None or self.loss_scale.finite
            if taken:
                self.optimizer.step()
            gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
            yield ReferenceStep(loss, gradients, taken)

    def _whole(self, batch: Any) -> float:
        with running(self.device):
            value, count = split_loss(self.workload.loss(self.model, batch))
        mean = value if count is None else value / count
        self._backward(mean)
        return float(mean.detach())

    def _backward(self, mean: Tensor) -> None:
        scaled = mean if self.loss_scale is None else mean * self.loss_scale.value
        scaled.backward()  # type: ignore[no-untyped-call]  # torch's

    def _unscale(self) -> None:
        if self.loss_scale is not None:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            for gradient in gradients:
                gradient.div_(self.loss_scale.value)
            self.loss_scale.settle(LossScale.count_unfinite(gradients, self.device))

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
        self._backward(mean)
        return float(mean.detach())

    def _routes(self, recording: Recording) -> Routes:
        names = tuple(call.name for call in recording.calls[:-1])
        return Routes.find(recording, Plan(stages=(names,), batch_size=self.plan.batch_size))


def relative_error(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], floor: float = FLOOR["float64"]
) -> tuple[float, str]:
    """The largest ``|ours - theirs| / |theirs|`` over tensors in L2 norm, and the name of the tensor.

    A tensor that one side has and the other has not is an infinite error.
    """
    if missing := sorted(set(ours) ^ set(theirs)):
        return float("inf"), missing[0]
    norms = {name: float(tensor.double().norm()) for name, tensor in theirs.items()}
    least = floor * sum(norm**2 for norm in norms.values()) ** 0.5
    worst, where = 0.0, ""
    for name, tensor in theirs.items():
        distance = float((ours[name].double().cpu() - tensor.double().cpu()).norm())
        error = distance / max(norms[name], least) if distance else 0.0
        if not error <= worst:  # a NaN is worse than anything
            worst, where = error, name
    return worst, where


def in_dtype(workload: Workload, dtype: torch.dtype) -> Workload:
    """The workload with its parameters and floating-point inputs in another dtype."""

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    def loss(model: nn.Module, batch: Any) -> Loss:
        with nullcontext() if dtype is torch.float32 else InsteadOfFloat32(dtype):
            return workload.loss(model, tree_map(cast, batch))

    return replace(workload, model=lambda: adapt(workload.model()).to(dtype), loss=loss)


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
