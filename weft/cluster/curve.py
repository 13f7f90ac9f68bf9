"""Curve: how a rate depends on the size of the work."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from weft.errors import ClusterError


@dataclass(frozen=True)
class Curve:
    """A rate over the size of the work, interpolated on the logarithm of the size and constant beyond both ends.

    Attributes:
        sizes: increasing; flops or bytes.
        rates: flop/s or bytes/s at each size.

    Raises:
        ClusterError: empty, unequal lengths, sizes that do not increase, numbers that are not positive.
    """

    sizes: tuple[float, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.rates) or not self.sizes:
            raise ClusterError(f"a curve needs as many rates as sizes, got {len(self.rates)} and {len(self.sizes)}")
        if not all(math.isfinite(v) and v > 0 for v in (*self.sizes, *self.rates)):
            raise ClusterError(f"a curve's sizes and rates must be positive, got {self.sizes} and {self.rates}")
        if any(a >= b for a, b in zip(self.sizes, self.sizes[1:], strict=False)):
            raise ClusterError(f"a curve's sizes must increase, got {self.sizes}")

    @cached_property
    def _logs(self) -> tuple[float, ...]:
        return tuple(math.log(size) for size in self.sizes)

    def at(self, size: float) -> float:
        """The rate for work of this size."""
        if size <= self.sizes[0]:
            return self.rates[0]
        if size >= self.sizes[-1]:
            return self.rates[-1]
        i = bisect_right(self.sizes, size)
        share = (math.log(size) - self._logs[i - 1]) / (self._logs[i] - self._logs[i - 1])
        return self.rates[i - 1] + share * (self.rates[i] - self.rates[i - 1])

    def scaled(self, factor: float) -> Curve:
        """The same curve, every rate times ``factor``."""
        return Curve(self.sizes, tuple(rate * factor for rate in self.rates))
