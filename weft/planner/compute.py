"""Seconds of computation, from the profile's operations and the device's rates.

operation  = max(flops / rate(flops), bytes / bandwidth(bytes)) + overhead         Device.seconds
call       = sum of its operations; an operation of a tensor group is divided by tp        CallCosts.of
recompute  = the backward does part of the forward again, its all-reduces too               CallCosts.of
stage step = optimizer passes + gradient norm and clipping                                 optimizer_s
accumulate = every microbatch after the first adds its gradients to the kept ones         accumulate_s
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from weft.capture.profile import NO_GROUP, Operation, Profile, Saved
from weft.cluster.topology import Device

CLIP_PASSES = 3.0
"""Bytes per byte of gradient that the global norm (one read) and scaling (a read and a write) move."""

OPERATION_PASSES = 2.5
"""Tensors that one operation of an optimizer step reads and writes, on average."""

ACCUMULATE_PASSES = 3.0
"""Bytes per byte of gradient that ``grad += new`` moves: two reads and a write."""


DTENSOR_OVERHEADS = 20
"""Overheads of an operation that one operation on DTensors takes: PyTorch dispatches it in Python, 55 us where the
overhead is 2.7 us. Felt where the device is the process itself; an accelerator's process runs ahead of it."""

DIVIDED_OPERATIONS = 1
"""What the conversions around a divided module take in Python in one forward or backward, in operations on DTensors."""

SHARDED_OPERATIONS = 10
"""The same for one unit that ``fully_shard`` gathers, and frees or reduces."""


class CallCost(NamedTuple):
    """One call of a unit at some microbatch size and tensor-parallel degree.

    Attributes:
        forward_s, backward_s: seconds of computation on a device alone.
        forward_reduced, backward_reduced: sizes in bytes of the tensors that its tensor groups all-reduce.
        saved_bytes: activations kept for the backward.
        workspace_bytes: temporaries above that.
    """

    forward_s: float
    backward_s: float
    forward_reduced: tuple[float, ...]
    backward_reduced: tuple[float, ...]
    saved_bytes: float
    workspace_bytes: float


class CallCosts:
    """Costs of a profile's calls on a device, each kind of call worked out once per (samples, tp)."""

    def __init__(self, profile: Profile, device: Device) -> None:
        self._profile, self._device = profile, device
        self._known: dict[tuple[int, int, int, str | None], CallCost] = {}
        self._groups: dict[str, list[int]] = {}
        for index, group in enumerate(profile.tensor_groups):
            self._groups.setdefault(group.unit, []).append(index)

    def of(self, index: int, samples: int, tp: int, recompute: str | None = None) -> CallCost:
        """Cost of call number ``index`` for a microbatch of ``samples`` samples on one of ``tp`` ranks.

        ``recompute`` is the mode of the call's unit, None where everything is kept.
        """
        call = self._profile.calls[index]
        mode = recompute if recompute in call.recompute else None
        key = (call.kind, samples, tp, mode)
        if key not in self._known:
            self._known[key] = self._cost(index, samples, tp) if mode is None else self._again(index, samples, tp, mode)
        return self._known[key]

    def _cost(self, index: int, samples: int, tp: int) -> CallCost:
        call = self._profile.calls[index]
        groups = [self._profile.tensor_groups[g] for g in self._groups.get(call.unit, ())]
        reduced = [group for group in groups if tp > 1 and group.divisible_by(tp)]
        modules = sum(len(group.styles) for group in reduced)
        python = dtensor_s(self._device, modules * DIVIDED_OPERATIONS)
        return CallCost(
            forward_s=self._seconds(call.forward, samples, tp) + python,
            backward_s=self._seconds(call.backward, samples, tp) + python,
            forward_reduced=tuple(group.forward_bytes.at(samples) for group in reduced),
            backward_reduced=tuple(group.backward_bytes.at(samples) for group in reduced),
            saved_bytes=self._bytes(call.saved, samples, tp),
            workspace_bytes=call.workspace_bytes.at(samples),
        )

    def _again(self, index: int, samples: int, tp: int, mode: str) -> CallCost:
        """A call whose unit is recomputed: what it would have kept is back while its backward runs."""
        call, whole = self._profile.calls[index], self.of(index, samples, tp)
        way = call.recompute[mode]
        saved = self._bytes(way.saved, samples, tp)
        return CallCost(
            forward_s=whole.forward_s,
            backward_s=whole.backward_s + self._seconds(way.again, samples, tp),
            forward_reduced=whole.forward_reduced,
            backward_reduced=(*whole.backward_reduced, *whole.forward_reduced),
            saved_bytes=saved,
            workspace_bytes=whole.workspace_bytes + max(0.0, whole.saved_bytes - saved),
        )

    def _bytes(self, kept: Iterable[Saved], samples: int, tp: int) -> float:
        return sum(saved.bytes.at(samples) / self.share(saved.group, tp) for saved in kept)

    def _seconds(self, operations: Iterable[Operation], samples: int, tp: int) -> float:
        total = 0.0
        for op in operations:
            share = self.share(op.group, tp)
            flops, size = op.flops.at(samples) / share, op.bytes.at(samples) / share
            total += self._device.seconds(op.kind, flops, size, op.dtype)
        return total

    def share(self, group: int, tp: int) -> int:
        """Into how many parts tensor parallelism divides what belongs to a group: ``tp``, or 1."""
        return tp if group != NO_GROUP and self._profile.tensor_groups[group].divisible_by(tp) else 1


def dtensor_s(device: Device, operations: float) -> float:
    """Seconds that so many operations take because they are on DTensors."""
    return 0.0 if device.accelerator else operations * DTENSOR_OVERHEADS * device.overhead_s


def optimizer_s(device: Device, trainable_bytes: float, tensors: int, passes: float, *, dtensors: int = 0) -> float:
    """Seconds of an optimizer step over a device's own parameters, with the gradient norm and clipping.

    Args:
        device: computes it.
        trainable_bytes: bytes of trainable parameters on the device.
        tensors: how many they are; each is stepped by itself.
        passes: bytes read and written by the optimizer per byte of parameter.
        dtensors: how many of them are DTensors.
    """
    if not tensors:
        return 0.0
    # What a step moves has left the caches since the last step: the whole of it sets the rate.
    operations = max(1.0, passes / OPERATION_PASSES)
    moved = device.seconds("pointwise", 0.0, (passes + CLIP_PASSES) * trainable_bytes)
    return moved + tensors * operations * device.overhead_s + dtensor_s(device, dtensors * operations)


def accumulate_s(device: Device, trainable_bytes: float, tensors: int) -> float:
    """Seconds in which one microbatch's gradients are added to those kept."""
    if not tensors:
        return 0.0
    return device.seconds("pointwise", 0.0, ACCUMULATE_PASSES * trainable_bytes) + tensors * device.overhead_s
