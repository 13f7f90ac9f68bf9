"""A dozen faults, one of each kind (``make test-faults`` has more): training goes on as if nothing had happened."""

from __future__ import annotations

import hosts
import pytest
from fault_trials import KINDS, Trials


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tmp_path_factory.mktemp("trials"))


@pytest.mark.parametrize(
    ("seed", "kind"),
    [
        pytest.param(seed, kind, marks=[pytest.mark.root] if kind == "link" else [])
        for seed, kind in enumerate(KINDS)
        if kind not in ("forward", "optimizer")  # test_restarts has them
    ],
)
def test_a_fault_changes_nothing(trials: Trials, seed: int, kind: str) -> None:
    if kind == "link" and (reason := hosts.missing()) is not None:
        pytest.skip(f"no hosts here: {reason}")
    outcome = trials.run(seed, kind)
    print(outcome)
