"""Random models under random plans equal one device. A failure names its seed: ``workload_of(seed)``, ``plan_of``."""

from __future__ import annotations

from typing import Any

import pytest
from random_models import plan_of, workload_of

from weft.jobs.verify import verify_here
from weft.plan import Plan
from weft.runtime.pool import Pool

DRAWS = 300
CHUNK = 30


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(0, DRAWS, CHUNK))
def test_random_models_under_random_plans_equal_one_device(pool: Pool, first: int) -> None:
    plans = {seed: plan_of(seed, workload_of(seed)) for seed in range(first, first + CHUNK)}
    wrong = []
    for devices in sorted({plan.devices for plan in plans.values()}):
        chosen = {seed: plan for seed, plan in plans.items() if plan.devices == devices}
        wrong += pool.run(verified, chosen, ranks=devices)[0]
    assert not wrong


def verified(plans: dict[int, Plan]) -> list[Any]:
    """Seeds whose plan does not give one device's results, with what it gave."""
    results = {seed: verify_here(workload_of(seed), plan, steps=2, dtype="float64") for seed, plan in plans.items()}
    return [(seed, plans[seed].describe(), r) for seed, r in results.items() if r is not None and not r.ok]
