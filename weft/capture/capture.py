"""Capture: a Workload's Profile, from its loss recorded at two batch sizes. No memory for the model, no device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weft.capture.alignment import Alignment
from weft.capture.blame import first_line
from weft.capture.groups import Group, Work
from weft.capture.initial import FakeModel, build_fake, map_tensors
from weft.capture.lines import SAMPLES, affine, operations
from weft.capture.operations import bytes_of
from weft.capture.profile import (
    LOSS,
    NO_GROUP,
    Call,
    Output,
    Parameter,
    Profile,
    Recomputed,
    Saved,
    TensorGroup,
)
from weft.capture.recomputation import Way
from weft.capture.recorder import record
from weft.capture.recording import Cost, RecordedCall, Recording, SavedStorage
from weft.capture.tape import flat_tensors, written_arguments
from weft.capture.tensor import groups_at_both
from weft.capture.units import find_units
from weft.capture.watch import Watch, plain_synchronised
from weft.errors import BatchError, InputError, ModelError
from weft.plan import RECOMPUTE
from weft.precision import in_precision
from weft.workload import Parameters, Workload

SMALL, FEW = 32, 2
"""The optimizer is tried on parameters of at most this many elements a dimension, and steps this many of a group."""


def capture(workload: Workload, precision: str = "float32") -> Profile:
    """What one forward and backward of a workload costs, call by call.

    Args:
        workload: what is computed.
        precision: of its operations, one of ``plan.PRECISIONS``.

    Raises:
        ModelError: the model cannot be run on fake tensors.
        LossError: the loss is neither a scalar nor ``(sum, count)``.
        BatchError: the batch does not have its samples in dimension 0.
    """
    start = time.perf_counter()
    fake = build_fake(workload.model, workload.seed)
    plain_synchronised(fake.model)
    units = find_units(fake.model, workload.units)
    batches = [sample_batch(workload, samples) for samples in SAMPLES]
    watch = Watch()
    watched = replace(workload, loss=watch.of(workload.loss))
    small, large = plain = _record(fake, units, watched, batches)
    if precision != "float32":
        small, large = _record(fake, units, in_precision(watched, precision), batches)
    if [c.name for c in small.calls] != [c.name for c in large.calls]:
        raise ModelError(
            f"the model calls its units in another order for {SAMPLES[0]} samples than for {SAMPLES[1]}; "
            "which units run must not depend on the batch"
        )
    merge = _Merge(fake, small, large, plain)
    calls = merge.calls()
    parameters = _parameters(fake)
    for index, (group, _) in enumerate(merge.groups):
        for name, dim in group.dims.items():
            parameters[name] = replace(parameters[name], tensor_dim=dim, group=index)
    state, passes = _optimizer_cost(workload, fake)
    return Profile(
        calls=calls,
        parameters=parameters,
        tensor_groups=tuple(
            TensorGroup(
                unit=a.unit,
                styles=tuple(a.styles.items()),
                sizes=a.sizes,
                uneven=a.uneven,
                forward_bytes=affine(a.forward_bytes, b.forward_bytes),
                backward_bytes=affine(a.backward_bytes, b.backward_bytes),
            )
            for a, b in merge.groups
        ),
        tensor_refused=tuple(merge.refused),
        optimizer_state_bytes=state,
        optimizer_passes=passes,
        batch_size=workload.batch_size,
        sample_bytes=sum(t.nbytes for t in tree_leaves(batches[1]) if isinstance(t, Tensor)) // SAMPLES[1],
        capture_s=time.perf_counter() - start,
        precision=precision,
        batch_statistics=watch.batch_statistics,
    )


def _record(
    fake: FakeModel, units: Sequence[str], workload: Workload, batches: Sequence[Any]
) -> tuple[Recording, Recording]:
    """Recordings at both SAMPLES."""
    small = record(fake, units, workload.loss, batches[0])
    return small, record(fake, small.units, workload.loss, batches[1], alike=small.alike)


def sample_batch(workload: Workload, samples: int) -> Any:
    """The first samples as a batch, checked.

    Raises:
        BatchError: the data or ``collate`` raised, or a tensor does not have the samples in dimension 0.
    """
    try:
        batch = workload.sample_batch(samples)
    except Exception as error:  # the user's code: whatever it raises is told once
        raise BatchError(
            f"making a batch of {samples} samples raised {type(error).__name__}: {first_line(error)}"
        ) from error
    tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor)]
    if not tensors:
        raise BatchError(f"a batch must contain tensors, got a {type(batch).__name__} without any; convert in collate")
    for tensor in tensors:
        if not tensor.dim() or tensor.shape[0] != samples:
            raise BatchError(
                f"a batch of {samples} samples has a tensor of shape {tuple(tensor.shape)}; every tensor of a batch "
                "needs the samples in dimension 0, so that it can be divided; repeat it, or make it in the loss"
            )
    return batch


@dataclass(slots=True)
class _Merge:
    """Puts two recordings, of SAMPLES samples, on the line through both; ``plain``: the same in the parameters' own
    precision."""

    fake: FakeModel
    small: Recording
    large: Recording
    plain: tuple[Recording, Recording]
    groups: list[tuple[Group, Group]] = field(init=False)
    refused: list[tuple[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        self.groups, self.refused = groups_at_both(*self.plain, self.fake.model)
        if self.plain[0] is not self.small:
            ways = Alignment(self.plain[0], self.small), Alignment(self.plain[1], self.large)
            self.groups = [(ways[0].group(a), ways[1].group(b)) for a, b in self.groups]

    def calls(self) -> tuple[Call, ...]:
        kept: tuple[set[int], set[int]] = (set(), set())
        ways = {mode: Way(mode) for mode in RECOMPUTE}
        kinds: dict[Any, int] = {}
        ours: dict[str, list[int]] = {}
        for index, (group, _) in enumerate(self.groups):
            ours.setdefault(group.unit, []).append(index)
        parameters = {n for n, _ in self.fake.model.named_parameters(remove_duplicate=False) if n in self.fake.names}
        calls = []
        for a, b in zip(self.small.calls, self.large.calls, strict=True):
            cost_a, cost_b = self.small.costs[a.kind], self.large.costs[b.kind]
            # A group of modules that are never called works in no call.
            mine = [(i, *self.groups[i]) for i in ours.get(a.unit, ())]
            works = [(i, x.work.get(a.kind, Work()), y.work.get(b.kind, Work())) for i, x, y in mine]
            divided = {place: i for i, _, w in works for place in w.operations}
            forward = operations(cost_a.forward, cost_b.forward, divided)
            nodes = {node: i for i, _, w in works for node in w.nodes}
            by_node = {place: nodes[op.node] for place, op in enumerate(cost_b.backward) if op.node in nodes}
            backward = operations(cost_a.backward, cost_b.backward, by_node)
            glue_forward = operations(a.glue.forward, b.glue.forward)
            glue_backward = operations(a.glue.backward, b.glue.backward)
            storages = (
                {s: i for i, w, _ in works for s in w.storages},
                {s: i for i, _, w in works for s in w.storages},
            )
            # Before the call's own: of a storage that it keeps either way, the ways do not differ.
            modes = {
                mode: Recomputed(
                    _saved(
                        _by_group(way.keep(0, a, cost_a), storages[0]),
                        _by_group(way.keep(1, b, cost_b), storages[1]),
                    ),
                    operations(cost_a.forward, cost_b.forward, divided, (way.again(cost_a), way.again(cost_b))),
                )
                for mode, way in ways.items()
                if a.name != LOSS
            }
            saved = _saved(
                _by_group(_keep(a, cost_a, kept[0]), storages[0]), _by_group(_keep(b, cost_b, kept[1]), storages[1])
            )
            reads = dict.fromkeys((*a.reads, *a.glue_reads, *b.reads, *b.glue_reads))
            kept_bytes = [sum(s.bytes.at(1) for s in way) for way in (saved, *(m.saved for m in modes.values()))]
            likeness = (a.kind, b.kind, glue_forward, glue_backward, *kept_bytes)
            calls.append(
                Call(
                    name=a.name,
                    unit=a.unit,
                    kind=kinds.setdefault(likeness, len(kinds)),
                    forward=(*glue_forward, *forward),
                    backward=(*backward, *glue_backward),
                    saved=saved,
                    inputs=tuple(sorted({*a.sources, *b.sources})),
                    outputs=tuple(
                        Output(affine(x.bytes, y.bytes), x.requires_grad)
                        for x, y in zip(a.tensors, b.tensors, strict=True)
                    ),
                    parameters=tuple(n for n in reads if n in parameters),
                    buffers=tuple(n for n in reads if n not in parameters),
                    workspace_bytes=affine(
                        max(cost_a.workspace_bytes, a.glue.workspace_bytes),
                        max(cost_b.workspace_bytes, b.glue.workspace_bytes),
                    ),
                    recompute=modes,
                )
            )
        assert calls[-1].name == LOSS
        return tuple(calls)


def _keep(call: RecordedCall, cost: Cost, kept: set[int]) -> list[SavedStorage]:
    """What a call and its glue save, without what an earlier call keeps alive already: its output is the next one's
    input."""
    new = []
    for saved in call.glue.saved:
        if saved.storage not in kept:
            kept.add(saved.storage)
            new.append(saved)
    for saved in cost.saved:
        if saved.argument is not None:
            storage = call.arguments[saved.argument]
            if storage in kept:
                continue
            kept.add(storage)
            saved = replace(saved, bytes=call.argument_bytes[saved.argument])
        if saved.output is not None:
            kept.add(call.outputs[saved.output])
        new.append(saved)
    return new


def _by_group(saved: Sequence[SavedStorage], groups: dict[int, int]) -> dict[int, int]:
    """Bytes saved, by tensor group."""
    result: dict[int, int] = {}
    for s in saved:
        group = groups.get(s.storage, NO_GROUP)
        result[group] = result.get(group, 0) + s.bytes
    return result


def _saved(small: dict[int, int], large: dict[int, int]) -> tuple[Saved, ...]:
    groups = sorted({*small, *large})
    return tuple(Saved(affine(small.get(g, 0), large.get(g, 0)), g) for g in groups)


def _parameters(fake: FakeModel) -> dict[str, Parameter]:
    registered = {name for name, _ in fake.model.named_parameters(remove_duplicate=False)}
    registered |= {name for name, _ in fake.model.named_buffers(remove_duplicate=False)}
    parameters: dict[str, Parameter] = {}

    def note(name: str, tensor: Tensor) -> Tensor:
        if name in fake.names:
            names = tuple(n for n in fake.names[name] if n in registered) or (name,)
            trainable = isinstance(tensor, nn.Parameter) and tensor.requires_grad
            parameters[name] = Parameter(names, tuple(tensor.shape), tensor.numel() * tensor.itemsize, trainable)
        return tensor

    map_tensors(fake.model, note)
    return parameters


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's class has an untyped __init_subclass__
    """Counts the bytes that operations read and write."""

    bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = list(flat_tensors((args, kwargs or {})))
        known = {t.untyped_storage()._cdata for t in inputs}
        new = [t for t in flat_tensors(out) if t.untyped_storage()._cdata not in known]
        written = list(flat_tensors(written_arguments(func, args, kwargs or {})))
        if new or written:
            self.bytes += bytes_of(func, inputs, (*new, *written))
        return out


def _optimizer_cost(workload: Workload, fake: FakeModel) -> tuple[float, float]:
    """Bytes of state, and bytes read and written by a step, per byte of trainable parameter: of the user's optimizer
    on small parameters that have the names of the model's, a few in every group of it."""
    small = [
        (name, nn.Parameter(torch.zeros([min(n, SMALL) for n in p.shape]), requires_grad=p.requires_grad))
        for name, p in fake.model.named_parameters()
    ]
    try:
        optimizer = workload.optimizer(Parameters(small))
        chosen = [p for group in optimizer.param_groups for p in group["params"][:FEW] if p.requires_grad]
        traffic = _Traffic()  # type: ignore[no-untyped-call] # untyped in torch
        for _ in range(2):  # the first step makes the state
            for parameter in chosen:
                parameter.grad = torch.zeros_like(parameter)
            traffic.bytes = 0
            with traffic:
                optimizer.step()
    except Exception as error:  # the user's code: whatever it raises is told once
        raise InputError(
            f"Workload.optimizer raised {type(error).__name__}: {first_line(error)}; it must be a function of the "
            "model's parameters that returns a torch optimizer"
        ) from error
    states = [optimizer.state[parameter] for parameter in chosen]
    state = sum(t.nbytes for t in tree_leaves(states) if isinstance(t, Tensor) and t.dim())
    size = max(1, sum(parameter.nbytes for parameter in chosen))
    return state / size, traffic.bytes / size
