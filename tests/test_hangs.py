"""A rank that hangs: the error comes soon, and names it, where it is and what it was doing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import workloads
from test_equality import plan_for
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import weft
from weft.errors import StuckError
from weft.runtime.pool import GRACE_S, Pool

TIMEOUT_S = 3.0
SOON_S = TIMEOUT_S + GRACE_S + 7
"""Of which starting to train takes some."""


class Trap(nn.Module):
    """A layer in which a process can hang."""

    how = ""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        how = Trap.how
        if how in ("stops", "sleeps") and not isinstance(x, FakeTensor):
            hang(how)
        return torch.tanh(self.linear(x))


def hang(how: str) -> None:
    if how == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        time.sleep(1)


def workload() -> weft.Workload:
    return weft.Workload(
        model=lambda: nn.Sequential(*(Trap() for _ in range(4)), nn.Linear(12, 1)),
        loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        data=workloads.Points(640, 12),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=8,
    )


def train(plan: weft.Plan, stuck: int, how: str) -> None:
    """Train for ever; one rank hangs in its fourth step, or after it."""
    engine = weft.parallelize(workload(), plan)
    engine.limit_waiting(TIMEOUT_S)
    for batch in engine.batches(epochs=None):
        if engine.step_count == 3 and int(os.environ["RANK"]) == stuck:
            Trap.how = how
        engine.step(batch)
        if Trap.how == "outside":
            hang(how)


@pytest.fixture(scope="module")
def own() -> Iterator[Pool]:
    """A pool of its own: what hangs is ended, and must leave nothing behind."""
    with Pool(4, device="cpu", timeout_s=60) as processes:
        yield processes


def caught(pool: Pool, degrees: dict[str, Any], stuck: int, how: str, **settings: Any) -> StuckError:
    """The error of a job of which one rank hangs. The first run only starts the processes."""
    plan = plan_for(workload(), degrees, **settings)
    pool.run(time.sleep, 0, ranks=plan.devices)
    before = time.monotonic()
    with pytest.raises(StuckError) as found:
        pool.run(train, plan, stuck, how, ranks=plan.devices)
    print(f"{time.monotonic() - before:.1f} s: {found.value}")
    assert TIMEOUT_S < time.monotonic() - before < SOON_S
    assert (found.value.rank, found.value.host) == (stuck, os.uname().nodename)
    assert found.value.stage == stuck // (plan.devices // plan.pp)
    assert found.value.step == 3
    return found.value


@pytest.mark.parametrize(("stuck", "how"), [(0, "stops"), (1, "stops"), (0, "sleeps"), (1, "sleeps")])
def test_a_stage_that_hangs_in_its_forward(own: Pool, stuck: int, how: str) -> None:
    error = caught(own, {"pp": 2}, stuck, how, microbatches=2)
    assert error.action == "step 4, forward of microbatch 0"
    assert ("stopped by a signal" in error.cause) == (how == "stops")
    assert f"rank {1 - stuck} (stage {1 - stuck}) on {error.host} gave up after 3 s" in error.cause
    assert error.tensor == ("2" if stuck == 0 else "the gradient of 2")


@pytest.mark.parametrize(("degrees", "stuck"), [({"dp_replicate": 2}, 1), ({"dp_shard": 2}, 0), ({"tp": 2}, 1)])
def test_a_replica_that_hangs_in_its_forward(own: Pool, degrees: dict[str, Any], stuck: int) -> None:
    error = caught(own, degrees, stuck, "stops")
    assert error.action == "step 4, forward of microbatch 0"


def test_one_of_four_hangs_and_all_others_wait_for_each_other(own: Pool) -> None:
    error = caught(own, {"pp": 2, "dp_replicate": 2}, 2, "sleeps", microbatches=2)
    assert error.action == "step 4, forward of microbatch 0"


def test_a_rank_that_hangs_in_the_users_loop(own: Pool) -> None:
    error = caught(own, {"pp": 2}, 1, "outside", microbatches=2)
    assert error.action == "step 4, after it, in the training loop"
