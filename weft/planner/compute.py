"""Seconds of computation, from the profile's operations and the device's rates.

operation  = max(flops / rate(flops), bytes / bandwidth(bytes)) + overhead         Device.seconds
call       = sum of its operations, each divided as Division says                          CallCosts.of
recompute  = the backward does part of the forward again, its all-reduces too               CallCosts.of
stage step = optimizer passes + gradient norm and clipping                                 optimizer_s
accumulate = every microbatch after the first adds its gradients to the kept ones         accumulate_s
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from weft.capture.profile import LOSS, NO_GROUP, Affine, Operation, Profile, Saved
from weft.cluster.topology import Device
from weft.planner.eager import eager_s
from weft.planner.experts import Experts
from weft.planner.system import WEFT, System

CLIP_PASSES = 3.0
"""Bytes per byte of gradient that the global norm (one read) and scaling (a read and a write) move."""

OPERATION_PASSES = 2.5
"""Tensors that one operation of an optimizer step reads and writes, on average."""

ACCUMULATE_PASSES = 3.0
"""Bytes per byte of gradient that ``grad += new`` moves: two reads and a write."""


DTENSOR_OVERHEADS = 20
"""Overheads of an operation that one operation on DTensors takes: PyTorch dispatches it in Python, 55 us where the
overhead is 2.7 us. Felt where the device is the process itself; an accelerator's process runs ahead of it."""

STEP_OVERHEADS = 4
"""The same for one of an optimizer's: in place, with no communication to think of, which PyTorch dispatches sooner."""

DIVIDED_OPERATIONS = 1
"""What the conversions around a divided module take in Python in one forward or backward, in operations on DTensors."""

SHARDED_OPERATIONS = 10
"""The same for one unit that ``fully_shard`` gathers, and frees or reduces."""

ROUTES = 2
"""Times a token travels for its experts: there and back."""


class Division(NamedTuple):
    """What part of a call a rank computes.

    Attributes:
        samples: of the microbatch.
        tp: ranks that divide layers.
        sequence: what they do not divide they divide along the sequence (Korthikanti et al. 2022).
        cp: ranks that divide every sequence.
        ep, etp: ranks that divide experts among them, and each expert.
    """

    samples: int
    tp: int = 1
    sequence: bool = False
    cp: int = 1
    ep: int = 1
    etp: int = 0


class CallCost(NamedTuple):
    """One call of a unit on one of the ranks that divide it.

    Attributes:
        forward_s, backward_s: seconds of computation on a device alone.
        weight_s: of ``backward_s``, what makes gradients of weights.
        forward_reduced, backward_reduced: sizes in bytes of the tensors that its tensor groups all-reduce.
        saved_bytes: activations kept for the backward.
        workspace_bytes: temporaries above that.
        exchanged_bytes: keys and values that the ranks of ``cp`` pass around in a forward.
        forward_routed, backward_routed: tokens that the ranks of ``ep`` send each other's experts, and back.
        forward_operations, backward_operations: how many the process dispatches.
        forward_statistics, backward_statistics: how often it takes statistics over the batch, which replicas exchange.
    """

    forward_s: float
    backward_s: float
    weight_s: float
    forward_reduced: tuple[float, ...]
    backward_reduced: tuple[float, ...]
    saved_bytes: float
    workspace_bytes: float
    exchanged_bytes: float = 0.0
    forward_routed: float = 0.0
    backward_routed: float = 0.0
    forward_operations: int = 0
    backward_operations: int = 0
    forward_statistics: int = 0
    backward_statistics: int = 0


class CallCosts:
    """Costs of a profile's calls on a device, each kind of call worked out once per way of dividing it."""

    def __init__(self, profile: Profile, device: Device, system: System = WEFT) -> None:
        self._profile, self._device, self._system = profile, device, system
        self._known: dict[tuple[int, Division, str | None], CallCost] = {}
        self._experts = Experts.of(profile)
        self._eager = system.forwards and not device.accelerator
        products = [op for call in profile.calls for op in call.forward if op.kind == "matmul"] if self._eager else []
        self._weights_bytes = sum(op.bytes.fixed for op in products)
        self._groups: dict[str, list[int]] = {}
        for index, group in enumerate(profile.tensor_groups):
            self._groups.setdefault(group.unit, []).append(index)

    def of(self, index: int, division: Division, recompute: str | None = None) -> CallCost:
        """Cost of call number ``index``.

        ``recompute`` is the mode of the call's unit, None where everything is kept.
        """
        call = self._profile.calls[index]
        mode = recompute if recompute in call.recompute else None
        key = (call.kind, division, mode)
        if key not in self._known:
            self._known[key] = self._cost(index, division) if mode is None else self._again(index, division, mode)
        return self._known[key]

    def _cost(self, index: int, division: Division) -> CallCost:
        call, tp = self._profile.calls[index], division.tp
        apart = set(self._experts.counts) if division.etp == 1 else set()  # whole experts: nothing to sum
        groups = [self._profile.tensor_groups[g] for g in self._groups.get(call.unit, ()) if g not in apart]
        reduced = [group for group in groups if tp > 1 and group.divisible_by(tp)]
        modules = sum(len(group.styles) for group in reduced)
        python = dtensor_s(self._device, modules * DIVIDED_OPERATIONS)
        last = call.name == LOSS
        # A loss on shares of the logits leaves them where they were made.
        shares = self._system.parallel_loss and self._profile.calls[index + 1 :][:1] == self._profile.calls[-1:]
        backward = self._seconds(call.backward, division, last)
        products = [op for op in call.backward if op.kind in ("matmul", "convolution")]
        exchanged = sum(self.size(op.bytes, op.group, division) for op in call.forward if op.kind == "attention") / 2
        routed = 0.0
        if division.ep > 1:
            routed = ROUTES * self.size(self._experts.routed(self._profile, call), NO_GROUP, division)
        return CallCost(
            forward_s=self._seconds(call.forward, division, last) + python,
            backward_s=backward + python if call.backward else 0.0,
            # Of the two products that a projection's backward is made of, one is its weight's.
            weight_s=self._seconds(products, division, last) / 2,
            forward_reduced=tuple(
                group.forward_bytes.at(division.samples / division.cp) for group in reduced if not shares
            ),
            backward_reduced=tuple(group.backward_bytes.at(division.samples / division.cp) for group in reduced),
            saved_bytes=self._bytes(call.saved, division, last),
            workspace_bytes=self.size(
                call.workspace_bytes,
                NO_GROUP,
                division._replace(sequence=self._system.parallel_loss and (last or shares)),
            ),
            exchanged_bytes=exchanged if division.cp > 1 else 0.0,
            forward_routed=routed,
            backward_routed=routed,
            forward_operations=len(call.forward) + len(reduced),
            backward_operations=len(call.backward) + len(reduced),
            forward_statistics=self._statistics(call.forward),
            backward_statistics=self._statistics(call.backward),
        )

    def _again(self, index: int, division: Division, mode: str) -> CallCost:
        """A call whose unit is recomputed: what it would have kept is back while its backward runs."""
        call, whole = self._profile.calls[index], self.of(index, division)
        way = call.recompute[mode]
        saved = self._bytes(way.saved, division, last=False)
        return whole._replace(
            backward_s=whole.backward_s + self._seconds(way.again, division, last=False),
            backward_reduced=(*whole.backward_reduced, *whole.forward_reduced),
            backward_routed=whole.backward_routed + whole.forward_routed,
            backward_operations=whole.backward_operations + len(way.again) + len(whole.forward_reduced),
            backward_statistics=whole.backward_statistics + self._statistics(way.again),
            saved_bytes=saved,
            workspace_bytes=whole.workspace_bytes + max(0.0, whole.saved_bytes - saved),
        )

    def _bytes(self, kept: Iterable[Saved], division: Division, last: bool) -> float:
        division = self._of_loss(division) if last else division
        kept = list(kept)
        total = sum(self.size(saved.bytes, saved.group, division) for saved in kept)
        if self._system.keeps_gathered and division.sequence and not last:
            whole = division._replace(sequence=False)
            total += sum(self.size(s.bytes, NO_GROUP, whole) for s in kept if s.group == NO_GROUP) / 2
        return total

    def _seconds(self, operations: Sequence[Operation], division: Division, last: bool) -> float:
        total = 0.0
        division = self._of_loss(division) if last else division
        for op in operations:
            flops, size = self.size(op.flops, op.group, division), self.size(op.bytes, op.group, division)
            if self._eager:
                total += eager_s(self._device, op, flops, size, self._weights_bytes / division.tp)
            else:
                total += self._device.seconds(op.kind, flops, size, op.dtype)
        return total

    def _statistics(self, operations: Sequence[Operation]) -> int:
        return sum("batch_norm" in op.name for op in operations) if self._profile.batch_statistics else 0

    def _of_loss(self, division: Division) -> Division:
        """How the loss is divided: along the sequence stands for along the vocabulary, which is as much."""
        return division._replace(sequence=self._system.parallel_loss)

    def size(self, quantity: Affine, group: int, division: Division) -> float:
        """A rank's part of a quantity that belongs to a tensor group."""
        samples = division.samples / division.cp
        if group != NO_GROUP and self._profile.tensor_groups[group].divisible_by(division.tp):
            return quantity.at(samples) / division.tp
        return quantity.at(samples / division.tp if division.sequence else samples)


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
    dispatching = 0.0 if device.accelerator else dtensors * STEP_OVERHEADS
    return moved + (tensors + dispatching) * operations * device.overhead_s


def accumulate_s(device: Device, trainable_bytes: float, tensors: int, passes: float = ACCUMULATE_PASSES) -> float:
    """Seconds in which one microbatch's gradients are added to those kept, in ``passes`` bytes moved for each."""
    if not tensors:
        return 0.0
    return device.seconds("pointwise", 0.0, passes * trainable_bytes) + tensors * device.overhead_s
