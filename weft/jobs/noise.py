"""Noise: how far one device in a lower precision is from the same device in float32. What equality means there.

Rounding differs between a plan and one device (other microbatches, partial sums), and training carries differences on.
A plan and one device in bfloat16 are both as far from float32 as rounding puts them, so they may be twice as far from
each other. The distance is measured, over the same steps and in the same terms. Where it happens to be small, REACH
roundings count: a tensor's norm adds up errors of independent roundings, a few in a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from weft.jobs.reference import ReferenceStep, SingleDevice, relative_error
from weft.plan import Plan
from weft.precision import DTYPES
from weft.workload import Workload

REACH = 4


def rounding(precision: str) -> float:
    """The largest relative error of one rounding: 2**-8 in bfloat16, 2**-11 in float16."""
    return torch.finfo(DTYPES[precision]).eps / 2


class Noise:
    """The same training on one device in float32, beside that in the plan's precision.

    Args:
        workload, device, plan: of the single device it is compared with.
    """

    def __init__(self, workload: Workload, device: torch.device, plan: Plan) -> None:
        self.floor = rounding(plan.precision)
        self._plain = SingleDevice(workload, device, plan=replace(plan, precision="float32"))
        self._steps = self._plain.steps()
        self._loss = self._gradient = REACH * self.floor

    def step(self, step: ReferenceStep) -> None:
        """Take the same step, and see how far it is from the one taken in the lower precision."""
        plain = next(self._steps)
        if step.taken:
            self._loss = max(self._loss, abs(step.loss - plain.loss) / max(abs(plain.loss), 1e-300))
            self._gradient = max(self._gradient, relative_error(step.gradients, plain.gradients, self.floor)[0])

    def tolerances(self, single: SingleDevice) -> tuple[float, float, float]:
        """Largest errors of loss, gradients and parameters that count as equal, after the last step."""
        parameter = relative_error(single.state(), self._plain.state(), self.floor)[0]
        return 2 * self._loss, 2 * self._gradient, 2 * max(REACH * self.floor, parameter)
