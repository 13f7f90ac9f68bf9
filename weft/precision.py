"""Precision: a workload whose operations run in bfloat16 or float16 where autocast says so.

The workload's loss is wrapped, so whatever runs it does so alike: the recording, every rank of every kind of plan, and
the single device it is held against. Parameters keep their dtype, and so do their gradients: autocast's casts are
part of the graph, and their backward casts back. What is added up over microbatches and over ranks is in float32.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from weft.workload import Loss, Workload

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtype of the operations, by ``Plan.precision``; ``"float32"`` leaves them alone."""


def in_precision(workload: Workload, precision: str) -> Workload:
    """The workload with its operations in another precision: one of ``plan.PRECISIONS``.

    The loss itself is float32 at least, so that weighing it and adding it up loses nothing.
    """
    if precision == "float32":
        return workload
    dtype = DTYPES[precision]

    def loss(model: nn.Module, batch: Any) -> Loss:
        with ExitStack() as stack:
            for kind in _device_types():
                stack.enter_context(torch.autocast(kind, dtype))
            result = workload.loss(model, batch)
        return (_up(result[0]), *result[1:]) if isinstance(result, tuple) and result else _up(result)

    return replace(workload, loss=loss)


def dtypes_of(precision: str) -> tuple[str, ...]:
    """Dtypes of matrix products in a precision, by torch's names: what a cluster is measured for."""
    lower = DTYPES.get(precision)
    return ("float32",) if lower is None else ("float32", str(lower).removeprefix("torch."))


def _device_types() -> list[str]:
    """Where operations may run: recordings are made on the CPU whatever the devices are."""
    accelerator = torch.accelerator.current_accelerator()
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _up(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in DTYPES.values() else value
