"""Rates of one device by kind of operation, timed on the operations and shapes that models use.

Each probe runs an operation and, where it has one, its backward, since both are what a training step does. Repeats of
all probes are interleaved and the median of each is kept, so that a disturbance of the machine hits no probe alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.cluster.curve import Curve

aten = torch.ops.aten

MATMULS = ((128, 64, 64), (512, 128, 128), (512, 256, 256), (512, 256, 1024), (1024, 512, 1024))
"""(rows, in, out) of linear layers: tokens of a microbatch by features. Accelerators add ACCELERATOR_MATMULS."""

ACCELERATOR_MATMULS = ((2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192))

CONVOLUTIONS = (
    (32, 32, 64, 32, 1, 2),
    (32, 3, 32, 32, 3, 1),
    (32, 32, 64, 32, 3, 2),
    (16, 32, 32, 32, 3, 1),
    (32, 64, 64, 16, 3, 1),
    (32, 128, 128, 8, 3, 1),
)
"""(samples, channels in, channels out, side, kernel, stride): from few operations for every byte to many."""

TENSORS = (2**14, 2**18, 2**22)
"""Elements of the tensors of memory-bound operations: in a core's cache, at its edge, out of it."""

ACCELERATOR_TENSORS = (2**26,)

MOST_TENSORS, TOUCHED = 16, 2**22
"""A probe of memory-bound operations goes over so many tensors, or as many as have TOUCHED elements together."""

ATTENTION_BACKWARD = 2.5
"""Flops of an attention's backward over those of its forward (two products forward, five backward)."""


@dataclass(frozen=True)
class Probe:
    """One timed thing: ``run`` does ``amount`` flops or bytes in so many operations; ``size`` is the size of one, of a
    convolution its flops for each byte."""

    kind: str
    size: float
    amount: float
    run: Callable[[], object]
    operations: int = 1


def probes(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Iterator[Probe]:
    """Every probe for a device. Kinds are those of ``Operation.kind``; matrix products are ``matmul DTYPE``."""
    accelerator = device.type != "cpu"
    shapes = MATMULS + (ACCELERATOR_MATMULS if accelerator else ())
    for dtype in dtypes:
        for rows, inner, outer in shapes:
            x = torch.randn(rows, inner, device=device, dtype=dtype)
            w = torch.randn(outer, inner, device=device, dtype=dtype)
            g = torch.randn(rows, outer, device=device, dtype=dtype)
            flops = 2.0 * rows * inner * outer
            yield Probe(f"matmul {_name(dtype)}", flops, 3 * flops, _linear(x, w, g), 3)
    for samples in (1, 8):
        q, k, v = (torch.randn(samples, 8, 128, 32, device=device, requires_grad=True) for _ in range(3))
        flops = 4.0 * q.numel() * 128
        yield Probe("attention", flops, (1 + ATTENTION_BACKWARD) * flops, _both(_attention, q, k, v), 2)
    for samples, inner, outer, side, kernel, stride in CONVOLUTIONS:
        x = torch.randn(samples, inner, side, side, device=device, requires_grad=True)
        w = torch.randn(outer, inner, kernel, kernel, device=device, requires_grad=True)
        out = samples * (side // stride) ** 2
        flops = 2.0 * out * w.numel()
        intensity = flops / (4 * (x.numel() + w.numel() + out * outer))
        yield Probe("convolution", intensity, 3 * flops, _both(_convolution(kernel // 2, stride), x, w), 2)
    for elements in TENSORS + (ACCELERATOR_TENSORS if accelerator else ()):
        yield from _memory_bound(elements, device)


def _memory_bound(elements: int, device: torch.device) -> Iterator[Probe]:
    """Probes of operations on tensors of so many float32 elements, in rows of 256. Every run goes over several tensors
    and keeps all results, as a forward does: what is read has left the caches, what is written is fresh memory."""
    size, count = 4.0 * elements, max(2, min(MOST_TENSORS, TOUCHED // elements))
    many = [torch.randn(elements // 256, 256, device=device) for _ in range(count)]
    y = torch.randn_like(many[0])
    mean, scale = y.mean(1, keepdim=True), y.std(1, keepdim=True)
    rows = torch.randint(256, (elements // 256,), device=device)
    table = torch.randn(256, 256, device=device)

    def probe(kind: str, moved: float, operations: int, run: Callable[[Tensor], object]) -> Probe:
        """One run does so many operations on each tensor; ``moved`` counts tensors read and written by all of them."""
        amount = count * moved * size
        return Probe(kind, moved * size / operations, amount, lambda: [run(x) for x in many], count * operations)

    # A forward reads one tensor and writes one, a backward reads two and writes one.
    yield probe("transcendental", 5, 2, lambda x: (aten.gelu(x), aten.gelu_backward(y, x)))
    yield probe(
        "softmax", 5, 2, lambda x: (aten._softmax(x, -1, False), aten._softmax_backward_data(y, x, -1, torch.float32))
    )
    yield probe(
        "normalization",
        5,
        2,
        lambda x: (
            aten.native_layer_norm(x, (256,), None, None, 1e-5),
            aten.native_layer_norm_backward(y, x, (256,), mean, scale, None, None, (True, False, False)),
        ),
    )
    yield probe("batch_norm", 5, 2, _batch_norm(y))
    yield probe("pointwise", 3, 1, lambda x: x + y)
    yield probe("reduction", 1, 1, lambda x: x.sum(0))
    yield probe("copy", 2, 1, lambda x: x.t().contiguous())
    yield probe("random", 1, 1, lambda x: x.bernoulli_(0.9))  # the last: it leaves only 0 and 1
    yield probe("gather", 2, 1, lambda _: F.embedding(rows, table))


def overhead_s(clock: Clock) -> float:
    """Seconds an operation takes whatever its size: the median of chains of tiny ones, forward and backward."""
    length = 100
    x = torch.zeros(8, device=clock.device, requires_grad=True)

    def chain() -> None:
        y = x
        for _ in range(length):
            y = y.tanh()
        torch.autograd.grad(y.sum(), x)

    return median(clock.seconds(chain) for _ in range(7)) / (2 * length)


class Clock:
    """Seconds of device time.

    A process on a processor counts its own thread's time, in which it was not kept waiting by others on the same core;
    with several threads, and for accelerators, time on the wall.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.shares_cores = device.type == "cpu" and torch.get_num_threads() == 1
        self._now = time.thread_time if self.shares_cores else time.perf_counter

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds of one run."""
        self._wait()
        began = self._now()
        run()
        self._wait()
        return self._now() - began

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def time_probes(work: list[Probe], clock: Clock, *, repeats: int, at_least_s: float) -> list[float]:
    """Median seconds of one run of every probe; short ones run several times in a row, for ``at_least_s``."""
    counts = []
    for probe in work:
        probe.run()  # the first run prepares memory and kernels
        counts.append(max(1, math.ceil(at_least_s / max(clock.seconds(probe.run), 1e-7))))
    times: list[list[float]] = [[] for _ in work]
    for _ in range(repeats):
        for probe, count, seen in zip(work, counts, times, strict=True):
            seen.append(clock.seconds(_repeat(probe.run, count)) / count)
    return [median(seen) for seen in times]


def curves(work: list[Probe], seconds: list[float], overhead: float) -> dict[str, Curve]:
    """Rate over size by kind, the overhead of each operation taken off."""
    points: dict[str, list[tuple[float, float]]] = {}
    for probe, spent in zip(work, seconds, strict=True):
        net = max(spent - probe.operations * overhead, 0.2 * spent)
        points.setdefault(probe.kind, []).append((probe.size, probe.amount / net))
    return {kind: Curve(*zip(*sorted(found), strict=True)) for kind, found in points.items()}


def _batch_norm(like: Tensor) -> Callable[[Tensor], object]:
    """Forward and backward of a normalisation over the batch, of 32 channels of 16 x 16."""
    gradient = like.view(-1, 32, 16, 16)
    weight, bias = like.new_ones(32), like.new_zeros(32)

    def run(x: Tensor) -> object:
        x = x.view(gradient.shape)
        y, mean, scale = aten.native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)
        return y, aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, scale, True, 1e-5, (True, True, True)
        )

    return run


def _repeat(run: Callable[[], object], count: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(count):
            run()

    return repeated


def _both(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """Forward and backward of a function."""
    grad = torch.ones_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), inputs, grad)


def _linear(x: Tensor, w: Tensor, g: Tensor) -> Callable[[], object]:
    """The three products of a linear layer: forward, gradient of its input, gradient of its weight."""
    return lambda: (F.linear(x, w), g @ w, g.t() @ x)


def _convolution(padding: int, stride: int) -> Callable[..., Tensor]:
    return lambda x, w: F.conv2d(x, w, stride=stride, padding=padding)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
