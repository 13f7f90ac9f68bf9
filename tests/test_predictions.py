"""Predictions for one batch after the other: in order, on rank 0, and no replica waits for another."""

from __future__ import annotations

import dataclasses
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from test_equality import plan_for
from test_predict import KINDS, assert_close, workload_of
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import weft
from weft.capture.trees import leaves_of
from weft.errors import WorkerError
from weft.runtime.delivery import AHEAD
from weft.runtime.pool import Pool

SIZES = (8, 5, 1, 8, 2)


def batches(count: int) -> list[range]:
    """Of different sizes, one after the other."""
    found, first = [], 0
    for n in range(count):
        found.append(range(first, first + SIZES[n % len(SIZES)]))
        first = found[-1].stop % 8
    return found


def both(plan: weft.Plan, numbers: list[range], purpose: Any) -> tuple[list[Any], list[Any]]:
    """All of it twice, the second time by ``predict``."""
    workload = workload_of("decoder")
    engine = weft.parallelize(workload, plan, purpose=purpose)
    many = [list(engine.predictions(numbers)) for _ in range(2)]
    single = [engine.predict(workload.batch_of(n)) for n in numbers]
    return many[0] + many[1], single + single


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.matrix
def test_each_batch_is_predicted_as_by_itself(pool: Pool, kind: str):
    degrees, microbatches = KINDS[kind]
    plan = plan_for(workload_of("decoder"), degrees, microbatches=microbatches)
    first, *others = pool.run(both, plan, batches(AHEAD + 3), "inference", ranks=plan.devices)
    assert len(first[0]) == len(first[1])
    for found, expected in zip(*first, strict=True):
        assert_close(found, expected)
    assert all(many == [] for many, _ in others)


def test_an_engine_that_trains_predicts_batch_by_batch(pool: Pool):
    plan = plan_for(workload_of("decoder"), {"dp_replicate": 2})
    found, expected = pool.run(both, plan, batches(3), "training", ranks=2)[0]
    assert_close(found, expected)


def begun(folder: Path, replica: int) -> int:
    return len(list(folder.glob(f"{replica}-*")))


def timed(plan: weft.Plan, folder: Path, slow: int, count: int, until: int) -> int:
    """One replica waits in its first batch until the other has begun so many, or no more for a second; how many."""
    seen = -1

    def predict(model: nn.Module, batch: Any) -> Tensor:
        nonlocal seen
        if type(batch["input_ids"]) is Tensor:  # and not fake: it is recorded first
            replica = engine.grid.replica
            (folder / f"{replica}-{begun(folder, replica)}").touch()
            if replica == slow and seen < 0:
                since = time.monotonic()
                while begun(folder, 1 - slow) < until and time.monotonic() - since < 1:
                    if begun(folder, 1 - slow) != seen:
                        seen, since = begun(folder, 1 - slow), time.monotonic()
                    time.sleep(0.01)
                seen = begun(folder, 1 - slow)
        logits: Tensor = model(input_ids=batch["input_ids"]).logits
        return logits

    workload = dataclasses.replace(workload_of("decoder"), predict=predict)
    engine = weft.parallelize(workload, plan, purpose="inference")
    assert len(list(engine.predictions([range(2)] * count))) == (count if engine.grid.replica == 0 else 0)
    return seen


@pytest.mark.parametrize("slow", [0, 1])
def test_a_replica_goes_on_while_another_is_slow(pool: Pool, tmp_path: Path, slow: int):
    plan = plan_for(workload_of("decoder"), {"dp_replicate": 2})
    assert pool.run(timed, plan, tmp_path, slow, 5, 4, ranks=2)[slow] >= 4


@pytest.mark.parametrize("slow", [0, 1])
def test_but_not_without_end(pool: Pool, tmp_path: Path, slow: int):
    plan = plan_for(workload_of("decoder"), {"dp_replicate": 2})
    assert pool.run(timed, plan, tmp_path, slow, 3 * AHEAD, 3 * AHEAD, ranks=2)[slow] <= AHEAD + 2


def failing(plan: weft.Plan) -> None:
    def predict(model: nn.Module, batch: Any) -> Tensor:
        logits: Tensor = model(input_ids=batch["input_ids"]).logits
        if type(batch["input_ids"]) is Tensor and engine.grid.replica == 1:
            raise ZeroDivisionError("on purpose")
        return logits

    workload = dataclasses.replace(workload_of("decoder"), predict=predict)
    engine = weft.parallelize(workload, plan, purpose="inference")
    list(engine.predictions([range(2)] * 3))


@pytest.mark.long
def test_an_error_in_another_replica_ends_the_job():
    with Pool(2, device="cpu", timeout_s=30) as own, pytest.raises(WorkerError, match="on purpose"):
        own.run(failing, plan_for(workload_of("decoder"), {"dp_replicate": 2}), ranks=2)


def test_leaves_of_arguments_are_those_of_pytorch():
    pair = namedtuple("pair", "a b")
    args = (torch.ones(2), None, [1, (torch.ones(1), "x")], pair(torch.zeros(1), {"k": torch.ones(3)}))
    kwargs = {"z": torch.ones(4), "a": {"y": 1.5, "b": [True]}, "n": None, "o": object(), "d": torch.float32}
    mine, theirs = leaves_of(args, kwargs), tree_leaves((args, kwargs))
    assert len(mine) == len(theirs)
    assert all(a is b for a, b in zip(mine, theirs, strict=True))
