"""Random models under random plans equal one device. A failure names its seed: ``workload_of(seed)``, ``plan_of``."""

from __future__ import annotations

import pytest
from random_models import plan_of, workload_of

from weft.jobs.verify import Verification, verify_here
from weft.plan import Plan
from weft.runtime.pool import Pool

DRAWS = 300
CHUNK = 30


@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(0, DRAWS, CHUNK))
def test_random_models_under_random_plans_equal_one_device(pool: Pool, first: int) -> None:
    wrong = []
    for seed in range(first, first + CHUNK):
        plan = plan_of(seed, workload_of(seed))
        result = pool.run(verified, seed, plan, ranks=plan.devices)[0]
        if not result.ok:
            wrong.append((seed, plan.describe(), result))
    assert not wrong


def verified(seed: int, plan: Plan) -> Verification | None:
    """A plan for the workload of a seed against one device."""
    return verify_here(workload_of(seed), plan, steps=2, dtype="float64")
