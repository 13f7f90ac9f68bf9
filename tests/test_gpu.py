"""The same plans on GPUs over NCCL, where there are any."""

from __future__ import annotations

import pytest
import torch
import workloads
from test_equality import name_of, plan_for

import weft

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
DEGREES = [{"pp": 1}, {"pp": 2}, {"tp": 2}, {"dp_replicate": 2}, {"dp_shard": 2}]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["code_lm", "gpt2"])
@pytest.mark.parametrize("degrees", DEGREES, ids=name_of)
def test_equals_one_device_on_gpus(family: str, degrees: dict[str, int]) -> None:
    build = workloads.FAMILIES[family]
    plan = plan_for(build(), degrees, microbatches=2)
    if plan.devices > GPUS:
        pytest.skip(f"needs {plan.devices} CUDA devices, this machine has {GPUS}")
    found = weft.verify(build(), plan)
    assert found.ok, found
