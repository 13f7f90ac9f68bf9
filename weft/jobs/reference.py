"""Reference: the single device, in plain PyTorch. What every plan is held against.

A step is what the user would write: the loss of the whole batch, ``backward``, clip, ``step``. There are two reasons
to cut the batch as the plan does, since one piece would then be another computation:

    the forward takes statistics over the batch, or changes buffers: one piece for each microbatch, of the samples that
    all replicas have in it
    the model or the loss draws random numbers: a piece for each microbatch of each replica, which draws from the
    plan's streams; where there are statistics over the batch too, the replicas run in ``lockstep``
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from weft.adapters import adapt, making, running
from weft.capture.initial import fill, seeded
from weft.capture.recorder import Recording
from weft.capture.watch import plain_synchronised
from weft.jobs.lockstep import run_together
from weft.plan import Plan
from weft.precision import in_precision
from weft.runtime.batches import Sampler, layout
from weft.runtime.loss import split_loss
from weft.runtime.optimizer import make_optimizer, make_scheduler
from weft.runtime.placement import Placement, Run
from weft.runtime.randomness import Seeds
from weft.runtime.recordings import Recordings
from weft.runtime.routes import Routes
from weft.runtime.scaling import LossScale
from weft.runtime.totals import squared_norm
from weft.workload import Loss, Workload

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
        recordings: of this very workload, where there are some; they tell whether it does.
    """

    def __init__(
        self, workload: Workload, device: torch.device, *, plan: Plan, recordings: Recordings | None = None
    ) -> None:
        workload = in_precision(workload, plan.precision)
        self.workload, self.device, self.plan = workload, device, plan
        self.loss_scale = LossScale() if plan.precision == "fp16" else None
        with seeded(workload.seed), making():
            self.model = fill(adapt(workload.model()).to(device), workload.weights)
        plain_synchronised(self.model)
        self.optimizer = make_optimizer(workload, self.model.named_parameters())
        self.scheduler = make_scheduler(workload, self.optimizer)
        self.sampler = Sampler(workload)
        self._recordings = recordings or Recordings(workload)
        self._watch = self._recordings.watch
        longest = self._recordings.longest(workload.sample_batch(plan.samples_per_microbatch))
        routes = self._routes(longest)
        in_python = longest.python_draws or any(call.python_draws for call in longest.calls)
        self._random = routes.glue_random or bool(routes.random) or in_python
        self._changed = self._watch.changed_in(longest)
        self._replicas = [self.model]
        if self._random and (self._changed or self._watch.remade):  # each replica changes a model of its own
            shared = {id(p): p for p in self.model.parameters()}
            self._replicas += [copy.deepcopy(self.model, dict(shared)) for _ in range(plan.replicas - 1)]
        self._placements = [
            Placement(model, list(longest.units), stage=0, mode=FakeTensorMode(), device=device)
            for model in self._replicas
            if self._random
        ]

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers."""
        return {n: t.detach() for n, t in self.model.named_parameters()} | dict(self.model.named_buffers())

    def steps(self, count: int | None = None) -> Iterator[ReferenceStep]:
        """Train, for ever if there is no count; yields after every step."""
        for step in itertools.count() if count is None else range(count):
            self.optimizer.zero_grad()
            loss = self._separate(step) if self._random else self._joined(step)
            self._unscale()
            if self.workload.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.workload.max_grad_norm)
            taken = self.loss_scale is None or self.loss_scale.finite
            if taken:
                self.optimizer.step()
                if self.scheduler is not None:
                    self.scheduler.step()
            gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
            yield ReferenceStep(loss, gradients, taken)

    def _joined(self, step: int) -> float:
        """One piece, or one for each microbatch."""
        samples = self.sampler.samples_of(step)
        parts: list[Sequence[int]] = [range(len(samples))]
        if self._watch.batch_statistics or self._changed:
            every = layout(len(samples), self.plan.portions, self.plan.microbatches)
            parts = [[i for piece in m for i in piece] for m in zip(*every, strict=True)]
        total = Total(self.model, len(samples), self._scale)
        for part in parts:
            if part:
                batch = self._to_device(self.sampler.collate([samples[i] for i in part], step))
                with running(self.device):
                    result = self.workload.loss(self.model, batch)
                total.add(*split_loss(result), len(part))
                total.backward()
        return total.mean()

    def _separate(self, step: int) -> float:
        """A piece for each microbatch of each replica."""
        replicas, microbatches = self.plan.replicas, self.plan.microbatches
        batches = [self.sampler.load(step, r, self.plan.portions, microbatches) for r in range(replicas)]
        total = Total(self.model, batches[0].total, self._scale)
        for m in range(microbatches):
            present = [r for r in range(replicas) if batches[r].samples[m]]
            jobs = [self._forward(self._to_device(batches[r].microbatches[m]), step, m, r) for r in present]
            together = self._watch.batch_statistics and len(jobs) > 1
            for r, result in zip(present, run_together(jobs) if together else (job() for job in jobs), strict=True):
                total.add(*split_loss(result), batches[r].samples[m])
                if not together:
                    total.backward()
            total.backward()
            if present and len(self._replicas) > 1:
                if self._watch.batch_statistics:  # the last one's normalisations have updated the running statistics
                    self._take_statistics(present[-1])
                self._join_buffers([batch.samples[m] / batch.together[m] for batch in batches])
        return total.mean()

    def _forward(self, microbatch: Any, step: int, m: int, replica: int) -> Callable[[], Loss | None]:
        seeds = Seeds(self.workload.seed, step, m, replica)
        recording = self._recordings.of(microbatch, seeds)
        placement = self._placements[replica % len(self._placements)]
        return partial(
            placement.forward, self.workload.loss, microbatch, Run(recording, self._routes(recording), {}, seeds)
        )

    def _take_statistics(self, source: int) -> None:
        """Give all replicas the running statistics of one."""
        norms = [[m for m in model.modules() if isinstance(m, _BatchNorm)] for model in self._replicas]
        for theirs in zip(*norms, strict=True):
            for buffers in zip(*(module.buffers() for module in theirs), strict=True):
                for buffer in buffers:
                    buffer.copy_(buffers[source])

    def _join_buffers(self, shares: list[float]) -> None:
        """Other buffers: floating-point ones become the mean over the replicas, others the first one's."""
        running = {f"{n}." for n, m in self.model.named_modules() if isinstance(m, _BatchNorm)}
        for name in self._changed:
            if name.startswith(tuple(running)):
                continue
            buffers = [model.get_buffer(name) for model in self._replicas]
            value = buffers[0].clone()
            if value.is_floating_point() or value.is_complex():
                value = torch.stack([b * share for b, share in zip(buffers, shares, strict=True)]).sum(0)
            for buffer in buffers:
                buffer.detach().copy_(value)

    def _to_device(self, batch: Any) -> Any:
        return tree_map(lambda leaf: leaf.to(self.device) if isinstance(leaf, Tensor) else leaf, batch)

    @property
    def _scale(self) -> float:
        return 1.0 if self.loss_scale is None else self.loss_scale.value

    def _unscale(self) -> None:
        if self.loss_scale is not None:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            for gradient in gradients:
                gradient.div_(self.loss_scale.value)
            self.loss_scale.settle(bool(squared_norm(gradients, self.device).isfinite()))

    def _routes(self, recording: Recording) -> Routes:
        names = tuple(call.name for call in recording.calls[:-1])
        return Routes.find(recording, Plan(stages=(names,), batch_size=self.plan.batch_size))


class Total:
    """The loss of a batch, piece by piece, and its gradient."""

    def __init__(self, model: nn.Module, samples: int, scale: float) -> None:
        self.model, self.samples, self.scale = model, samples, scale
        self.sum, self.count, self.counted = 0.0, 0.0, False
        self._pending: list[Tensor] = []

    def add(self, value: Tensor, count: Tensor | float | None, samples: int) -> None:
        """Add the loss of a piece: a mean over its samples, or ``(sum, count)``."""
        self.counted = count is not None
        self.count += samples if count is None else float(count)
        part = value * (samples / self.samples) if count is None else value
        self.sum += float(part.detach())
        self._pending.append(part)

    def backward(self) -> None:
        """Add the gradient of what was added last."""
        if self._pending:
            (torch.stack(self._pending).sum() * self.scale).backward()  # type: ignore[no-untyped-call]  # torch's
        self._pending = []

    def mean(self) -> float:
        """The mean; gradients become its."""
        if not self.counted:
            return self.sum
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= self.count
        return self.sum / self.count


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
        if func is torch._grouped_mm and args[0].dtype is torch.float64 and args[1].dim() == 3:
            return grouped_product(args[0], args[1], (kwargs or {})["offs"])
        args = tuple(self.dtype if arg is torch.float32 else arg for arg in args)
        kwargs = {key: self.dtype if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def grouped_product(rows: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    """``torch.nn.functional.grouped_mm`` in float64, which its kernel does not have: every row by the weight of its
    group. Shapes: [rows, in], [groups, in, out] and the groups' ends, [groups], to [rows, out]."""
    group = torch.searchsorted(offs, torch.arange(len(rows), device=rows.device, dtype=offs.dtype), right=True)
    products = [torch.where((group == i)[:, None], rows @ weight, 0.0) for i, weight in enumerate(weights)]
    return torch.stack(products).sum(0)
