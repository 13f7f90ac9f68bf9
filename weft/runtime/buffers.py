"""Buffers: what forwards change (running statistics, counters, moving averages) is what one device would have.

A forward is run once for each microbatch, on every replica, and again in the backward where activations are computed
again. One device that cuts its batch into the same microbatches changes a buffer once for each of them. So:

    recomputing        runs on the values the first run had, and leaves no trace
    an idle microbatch (one that has samples on no replica) leaves no trace
    several in flight  each forward writes to tensors of its own, since earlier microbatches' graphs hold the old ones
    replicas           running statistics are the same on all (``statistics``). Other floating-point buffers become
                       their mean after every forward, weighted by samples: exact where a buffer follows a mean over
                       the batch. Other integers are the first replica's, with a warning where they differ
    stages             a buffer that glue changes is that of the last stage whose glue did
    a step left out    leaves no trace: they are ``kept`` before it and then restored

``weft verify`` compares all of them with one device's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm

from weft.capture.recorder import Recording
from weft.capture.watch import Watch
from weft.errors import PlanError
from weft.plan import Plan
from weft.runtime.batches import Batch
from weft.runtime.grid import Grid
from weft.runtime.statistics import BatchStatistics


class Buffers:
    """The buffers that forwards change on this stage.

    Args:
        model: the user's model.
        here: names of the buffers this rank holds.
        watch: what was seen of the loss.
        recording: of the first microbatch.
        stage_of: stage of every call.
        plan, grid: of the job.

    Attributes:
        group: the replicas, where what they change is brought together.

    Raises:
        PlanError: calls on several stages would change one buffer.
    """

    def __init__(
        self,
        model: nn.Module,
        here: frozenset[str],
        watch: Watch,
        recording: Recording,
        stage_of: tuple[int, ...],
        plan: Plan,
        grid: Grid,
    ) -> None:
        self.plan, self.grid = plan, grid
        changed = watch.changed_in(recording)
        refuse_shared(changed, recording, stage_of)
        slots: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    slots.setdefault(id(buffer), []).append((module, key))
        self._slots = {n: slots[id(b)] for n, b in model.named_buffers() if n in changed and n in here}
        inside = tuple(f"{call.unit}." for call in recording.calls if call.unit)
        self._glue = [name for name in self._slots if not name.startswith(inside)] if plan.pp > 1 else []
        self._own = [n for n, where in self._slots.items() if not isinstance(where[0][0], _BatchNorm)]
        together = plan.replicas > 1 and (watch.batch_statistics or bool(changed))
        self.group = replicas_of(grid) if together else None
        self._statistics = BatchStatistics(self.group) if watch.batch_statistics else None
        in_glue = any(op.kind == "batch_norm" for call in recording.calls for op in call.glue.forward)
        elsewhere = plan.pp > 1 and (in_glue or recording.varies)  # fake tensors may be normalised
        self._own_batch = self.group is None and not elsewhere  # as torch does it
        self._renews = bool(plan.recompute) or (plan.pp > 1 and plan.microbatches > 1)
        self._warned = False
        self._batch: Batch | None = None
        self._start: dict[str, Tensor] = {}
        self._before: dict[int, dict[str, Tensor]] = {}

    def kept(self) -> dict[str, Tensor]:
        """Copies of those that forwards change, as they are now."""
        return {name: buffer.clone() for name, buffer in self._bound().items()}

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Put the values that ``kept`` gave back, which stay as they are."""
        self._bind({name: buffer.clone() for name, buffer in kept.items()})

    def begin(self, batch: Batch) -> None:
        """A step begins."""
        self._batch = batch
        bound = self._bound()
        self._start = {name: bound[name].detach().clone() for name in self._glue}

    @contextmanager
    def forward(self, m: int) -> Iterator[None]:
        """The forward of microbatch ``m``."""
        assert self._batch is not None
        idle = self._batch.together[m] == 0
        before = self._bound()
        if before and (idle or self._renews):
            self._bind({name: buffer.clone() for name, buffer in before.items()})
        with self._meeting(self._batch.samples[m] > 0):
            yield
        if idle:
            self._bind(before)
        elif self.group is not None and self._own:
            self._join_replicas(self._batch.samples[m] / self._batch.together[m])
        if self.plan.recompute:
            self._before[m] = before

    @contextmanager
    def backward(self, m: int) -> Iterator[None]:
        """The backward of microbatch ``m``: forwards in it are recomputations."""
        assert self._batch is not None
        if not self.plan.recompute:
            yield
            return
        now = self._bound()
        self._bind({name: buffer.clone() for name, buffer in self._before.pop(m).items()})
        with self._meeting(self._batch.samples[m] > 0):
            yield
        self._bind(now)

    def finish(self) -> None:
        """A step is over: bring the stages together."""
        self._warned = True
        if self._glue:
            self._join_stages()

    @contextmanager
    def _meeting(self, counts: bool) -> Iterator[None]:
        if self._statistics is None or (counts and self._own_batch):
            yield
            return
        with self._statistics.of(counts=counts):
            yield

    def _bound(self) -> dict[str, Tensor]:
        buffers = {}
        for name, ((module, key), *_) in self._slots.items():
            buffer = module._buffers[key]
            assert buffer is not None
            buffers[name] = buffer
        return buffers

    def _bind(self, buffers: Mapping[str, Tensor]) -> None:
        for name, buffer in buffers.items():
            for module, key in self._slots[name]:
                module._buffers[key] = buffer

    def _join_stages(self) -> None:
        bound, stage = self._bound(), self.grid.stage
        last = torch.tensor([stage if self._changed(name, bound[name]) else -1 for name in self._glue])
        last = last.to(self.grid.device)
        dist.all_reduce(last, op=dist.ReduceOp.MAX, group=self.grid.group("pp"))
        for name, source in zip(self._glue, last.tolist(), strict=True):
            if source >= 0:
                value = bound[name].detach().contiguous() if source == stage else self._start[name].contiguous()
                dist.broadcast(value, group=self.grid.group("pp"), group_src=source)
                if source != stage:
                    self._bind({name: value})

    def _changed(self, name: str, buffer: Tensor) -> bool:
        return not isinstance(buffer, FakeTensor) and not torch.equal(buffer, self._start[name])

    def _join_replicas(self, share: float) -> None:
        bound = self._bound()
        for name in self._own:
            mine = bound[name].detach()
            if isinstance(mine, FakeTensor):  # glue of another stage changes it
                continue
            if mine.is_floating_point() or mine.is_complex():
                value = mine * share
                dist.all_reduce(value, group=self.group)
            else:
                value = mine.clone().contiguous()
                dist.broadcast(value, group=self.group, group_src=0)
                self._warn(name, bool((value != mine).any()))
            self._bind({name: value})  # the graph may hold the one that was there

    def _warn(self, name: str, differs: bool) -> None:
        if differs and not self._warned:
            warnings.warn(
                f"step 0: replicas change the buffer {name} in different ways; the first replica's is kept, which may "
                "not be what one device has. Check with `weft verify`",
                RuntimeWarning,
                stacklevel=4,
            )


def refuse_shared(changed: set[str], recording: Recording, stage_of: tuple[int, ...]) -> None:
    """Refuse a plan under which calls on several stages change one buffer: each would change a copy of its own.

    Raises:
        PlanError: it is so.
    """
    for name in sorted(changed):
        readers = [n for n, call in enumerate(recording.calls) if call.unit and name.startswith(f"{call.unit}.")]
        stages = sorted({stage_of[n] for n in readers})
        if len(stages) > 1:
            unit = recording.calls[readers[0]].unit
            raise PlanError(
                f"{unit} changes its buffer {name} and is called on stages {', '.join(map(str, stages))}, which would "
                "each change a copy; put its calls on one stage, or use pp=1"
            )


def replicas_of(grid: Grid) -> dist.ProcessGroup:
    """The ranks at this rank's place in every replica, in the order of the replicas: a group of its own, so that its
    collectives never queue behind others. Every rank of the job calls this."""
    replicas = grid.degree("dp_replicate") * grid.degree("dp_shard")
    lists = grid.mesh.mesh.permute(0, 3, 4, 1, 2).reshape(-1, replicas).tolist()
    group, _ = dist.new_subgroups_by_enumeration(lists)  # type: ignore[no-untyped-call]  # torch's
    assert isinstance(group, dist.ProcessGroup)
    return group
