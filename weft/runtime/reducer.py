"""Reducer: sums the gradients of whole copies over their group while the last microbatch's backward runs.

Gradients live in *buckets*: flat buffers of BUCKET_BYTES, filled from the last parameter to the first, about as the
backward makes them. A gradient moves into its bucket when it is first made, and later microbatches are added to it
there, so it is held once. In the last backward a bucket whose gradients are all there is all-reduced at once, in the
order of the buckets, which is the same on every rank whatever its backward leaves out.

DistributedDataParallel's reducer does nearly this (Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating
Data Parallel Training"). It was here first, and went because it wants to know before the backward which parameters will
get a gradient, from one graph per step: in the middle of a pipeline, and with several microbatches, there is none.
Each bucket ends in one number per parameter, which counts the replicas that have a gradient. Where it is zero, the
gradient stays None, as on one device: an optimizer with weight decay tells None from zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn

FIRST_BUCKET_BYTES = 2**20
"""Small, so that the first all-reduce starts early."""
BUCKET_BYTES = 25 * 2**20


@dataclass(eq=False)
class Bucket:
    """Parameters whose gradients are reduced together.

    Attributes:
        parameters: from the last of the model to the first.
        flat: their gradients, then one count per parameter.
        views: the place of every gradient in ``flat``.
        waiting: how many gradients of the last backward are still to come.
        work: the all-reduce, once it has been started.
    """

    parameters: list[nn.Parameter]
    flat: Tensor
    views: list[Tensor]
    waiting: int = 0
    work: dist.Work | None = None

    @classmethod
    def of(cls, parameters: list[nn.Parameter]) -> Bucket:
        """The bucket of some parameters of one dtype and device."""
        sizes = [p.numel() for p in parameters]
        flat = torch.zeros(sum(sizes) + len(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        pieces = torch.split(flat[: sum(sizes)], sizes)
        return cls(parameters, flat, [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)])

    @property
    def counts(self) -> Tensor:
        """How many replicas have a gradient, by parameter."""
        return self.flat[-len(self.parameters) :]


class Reducer:
    """Sums gradients of parameters over a group.

    Args:
        parameters: those that train, in the model's order; the same on every rank of the group.
        group: the replicas.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
        self._group = group
        self._buckets = [Bucket.of(chosen) for chosen in fill(parameters)]
        self._place = {p: (b, i) for b in self._buckets for i, p in enumerate(b.parameters)}
        self._made: set[nn.Parameter] = set()
        self._last = False
        self._next = 0
        # Weakly: Python's collector does not see through a tensor's hooks, and a cycle would keep the group's threads.
        hook = partial(_accumulated, ref(self))
        for parameter in self._place:
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call] # torch's

    def before_backward(self, *, last: bool) -> None:
        """A microbatch's backward begins; ``last``: buckets are reduced as they fill."""
        self._last = last
        if last:
            self._next = 0
            for bucket in self._buckets:
                bucket.waiting, bucket.work = len(bucket.parameters), None

    def finish(self) -> None:
        """Reduce what the last backward left out, and wait for everything."""
        for bucket in self._buckets:
            bucket.waiting = 0
        self._start_full()
        for bucket in self._buckets:
            assert bucket.work is not None
            bucket.work.wait()
            missing = [i for i, p in enumerate(bucket.parameters) if p not in self._made]
            if missing:
                counts = bucket.counts.tolist()
                for i in missing:
                    bucket.parameters[i].grad = bucket.views[i] if counts[i] else None
        self._made.clear()
        self._last = False

    def accumulated(self, parameter: nn.Parameter) -> None:
        """A gradient has been made, or added to."""
        bucket, i = self._place[parameter]
        if parameter not in self._made:
            self._made.add(parameter)
            assert parameter.grad is not None
            bucket.views[i].copy_(parameter.grad)
            parameter.grad = bucket.views[i]
        if self._last:
            bucket.waiting -= 1
            self._start_full()

    def _start_full(self) -> None:
        while self._next < len(self._buckets) and self._buckets[self._next].waiting <= 0:
            bucket = self._buckets[self._next]
            made = [p in self._made for p in bucket.parameters]
            bucket.counts.fill_(1)
            for i, there in enumerate(made):
                if not there:
                    bucket.views[i].zero_()
                    bucket.counts[i] = 0
            bucket.work = dist.all_reduce(bucket.flat, group=self._group, async_op=True)
            self._next += 1


def _accumulated(reducer: ref[Reducer], parameter: Tensor) -> None:
    known = reducer()
    assert isinstance(parameter, nn.Parameter)
    if known is not None:
        known.accumulated(parameter)


def fill(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters from the last to the first, cut into buckets of one dtype and device."""
    buckets: list[list[nn.Parameter]] = []
    open_: dict[tuple[torch.dtype, torch.device], tuple[list[nn.Parameter], int]] = {}
    for parameter in reversed(parameters):
        key = parameter.dtype, parameter.device
        size = parameter.numel() * parameter.itemsize
        chosen, room = open_.get(key, ([], 0))
        if room < size:
            chosen, room = [], BUCKET_BYTES if buckets else FIRST_BUCKET_BYTES
            buckets.append(chosen)
        chosen.append(parameter)
        open_[key] = chosen, room - size
    return buckets
