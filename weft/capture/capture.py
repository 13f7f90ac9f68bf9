"""Capture: a Workload's Profile, from its loss recorded at two batch sizes. No memory for the model, no device."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weft.capture.blame import first_line
from weft.capture.groups import Group
from weft.capture.initial import FakeModel, build_fake, map_tensors
from weft.capture.isolation import seldom_collecting
from weft.capture.lines import SAMPLES, affine
from weft.capture.merging import Merge
from weft.capture.operations import bytes_of
from weft.capture.profile import (
    Parameter,
    Profile,
    TensorGroup,
)
from weft.capture.recorder import record
from weft.capture.recording import Recording
from weft.capture.tape import flat_tensors, written_arguments
from weft.capture.units import find_units
from weft.capture.watch import Watch, plain_synchronised
from weft.errors import BatchError, InputError, ModelError
from weft.precision import in_precision
from weft.workload import Parameters, Workload

SMALL, FEW = 32, 2
"""The optimizer is tried on parameters of at most this many elements a dimension, and steps this many of a group."""


@seldom_collecting()
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
    fake = build_fake(workload.model, workload.seed, workload.weights)
    plain_synchronised(fake.model)
    units = find_units(fake.model, workload.units)
    batches = [sample_batch(workload, samples) for samples in SAMPLES]
    tensors = [t for t in tree_leaves(batches[1]) if isinstance(t, Tensor)]
    watch = Watch()
    watched = replace(workload, loss=watch.of(workload.loss))
    small, large = plain = _record(fake, units, in_precision(watched, precision), batches)
    if precision != "float32":  # to find what can be divided; blocks are as alike as where they will run
        plain = _record(fake, units, watched, batches, small.alike)
    if [c.name for c in small.calls] != [c.name for c in large.calls]:
        raise ModelError(
            f"the model calls its units in another order for {SAMPLES[0]} samples than for {SAMPLES[1]}; "
            "which units run must not depend on the batch"
        )
    merge = Merge(fake, small, large, plain)
    calls = merge.calls()
    parameters = parameters_of(fake, [group for group, _ in merge.groups])
    state, passes = _optimizer_cost(workload, fake)
    return Profile(
        calls=calls,
        parameters=parameters,
        tensor_groups=tuple(tensor_group(*pair) for pair in merge.groups),
        tensor_refused=tuple(merge.refused),
        optimizer_state_bytes=state,
        optimizer_passes=passes,
        batch_size=workload.batch_size,
        sample_bytes=sum(t.nbytes for t in tensors) // SAMPLES[1],
        capture_s=time.perf_counter() - start,
        precision=precision,
        batch_statistics=watch.batch_statistics,
        sample_tokens=max((t.shape[1] for t in tensors if t.dim() == 2 and not t.is_floating_point()), default=0),
    )


def _record(
    fake: FakeModel,
    units: Sequence[str],
    workload: Workload,
    batches: Sequence[Any],
    alike: Collection[tuple[str, str]] = (),
) -> tuple[Recording, Recording]:
    """Recordings at both SAMPLES; ``alike``: of another recording."""
    small = record(fake, units, workload.loss, batches[0], alike=alike)
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


def tensor_group(small: Group, large: Group) -> TensorGroup:
    """A group found at both SAMPLES, on the line through them."""
    return TensorGroup(
        unit=small.unit,
        styles=tuple(small.styles.items()),
        sizes=small.sizes,
        uneven=small.uneven,
        forward_bytes=affine(small.forward_bytes, large.forward_bytes),
        backward_bytes=affine(small.backward_bytes, large.backward_bytes),
    )


def parameters_of(fake: FakeModel, groups: Sequence[Group]) -> dict[str, Parameter]:
    """Parameters and buffers of a model by first name, and which group divides them."""
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
    for index, group in enumerate(groups):
        for name, dim in group.dims.items():
            parameters[name] = replace(parameters[name], tensor_dim=dim, group=index)
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
