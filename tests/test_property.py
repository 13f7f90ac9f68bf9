"""Random models under random plans equal one device. A failure names its seed: ``workload_of(seed)``, ``plan_of``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from random_models import plan_of, workload_of

from weft.jobs.verify import Verification, verify_here
from weft.plan import Plan
from weft.runtime.pool import Pool

DRAWS = 300
CHUNK = 30


@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(0, DRAWS, CHUNK))
@pytest.mark.matrix
def test_random_models_under_random_plans_equal_one_device(pool: Pool, first: int) -> None:
    wrong = []
    seeds = range(first, first + CHUNK)
    with ThreadPoolExecutor(1) as ahead:  # plans the next ones while the processes work
        for seed, plan in zip(seeds, ahead.map(planned, seeds), strict=True):
            result = pool.run(verified, seed, plan, ranks=plan.devices)[0]
            if not result.ok:
                wrong.append((seed, plan.describe(), result))
    assert not wrong


def planned(seed: int) -> Plan:
    """The plan of a seed."""
    return plan_of(seed, workload_of(seed))


def verified(seed: int, plan: Plan) -> Verification | None:
    """A plan for the workload of a seed against one device."""
    return verify_here(workload_of(seed), plan, steps=2, dtype="float64")
