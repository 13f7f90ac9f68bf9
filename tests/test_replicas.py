"""Copies of parameters and buffers on several ranks: equal after training, and one flipped bit is found and named."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import workloads
from test_checkpoint import everything
from test_equality import plan_for
from torch import Tensor

from weft.cli import run
from weft.engines import parallelize
from weft.errors import ReplicaError
from weft.plan import Plan
from weft.runtime.pool import Pool
from weft.runtime.replicas import WIDTH, checksum, weights_for
from weft.runtime.totals import local

BUILDS = {"everything": everything, "averages": workloads.averages, "llama": workloads.llama}
NORMAL = [
    *(
        ("everything", degrees)
        for degrees in (
            {"dp_replicate": 2},
            {"dp_shard": 2},
            {"dp_replicate": 2, "dp_shard": 2},
            {"tp": 2},
            {"pp": 3},
            {"pp": 2, "tp": 2, "dp_replicate": 2},
        )
    ),
    ("averages", {"pp": 2, "dp_replicate": 2}),
    ("llama", {"tp": 2, "dp_shard": 2}),
]


@functools.cache
def plan_of(family: str, degrees: tuple[tuple[str, int], ...]) -> Plan:
    return plan_for(BUILDS[family](), dict(degrees), microbatches=2)


@pytest.mark.parametrize(("family", "degrees"), NORMAL)
@pytest.mark.matrix
def test_copies_stay_equal_in_training(pool: Pool, family: str, degrees: dict[str, int]) -> None:
    """Tied weights, frozen ones, statistics over the batch, buffers that glue changes."""
    plan = plan_of(family, tuple(degrees.items()))

    def job() -> None:
        engine = parallelize(BUILDS[family](), plan)
        engine.check_replicas()
        for _, batch in zip(range(3), engine.batches(), strict=False):
            engine.step(batch)
            engine.check_replicas()

    pool.run(job, ranks=plan.devices)


def flip(tensor: Tensor) -> None:
    """Change the last bit of its last element."""
    with torch.no_grad():
        bits = tensor.view(-1).view(torch.uint8)
        bits[-tensor.itemsize] ^= 1


def found(plan: Plan, name: str, rank: int) -> list[Any]:
    """What each rank is told once a tensor has changed on one of them."""
    engine = parallelize(everything(), plan)
    engine.step(next(engine.batches()))
    held = {h.name: local(h.parameter.detach()) for h in engine.part.held} | engine.part.buffers
    if torch.distributed.get_rank() == rank:
        flip(held[name])
    try:
        engine.check_replicas()
    except ReplicaError as error:
        return [error.step, error.name, error.ranks, str(error)]
    return []


TIED = "embed.weight"
CASES = [
    ({"dp_replicate": 2}, "blocks.1.down.weight", 1, ((0,), (1,))),
    ({"dp_replicate": 3}, "blocks.1.up.bias", 1, ((0, 2), (1,))),  # frozen
    ({"dp_replicate": 2, "dp_shard": 2}, "blocks.1.down.weight", 3, ((1,), (3,))),
    ({"dp_shard": 2}, "blocks.2.statistics.running_var", 0, ((0,), (1,))),
    ({"tp": 2}, "blocks.0.norm.weight", 1, ((0,), (1,))),
    ({"pp": 2}, TIED, 1, ((0,), (1,))),
    ({"pp": 3}, TIED, 0, ((0,), (2,))),
    ({"pp": 2, "dp_replicate": 2}, TIED, 3, ((0, 1, 2), (3,))),
    ({"pp": 2, "dp_replicate": 2}, "blocks.3.norm.bias", 2, ((2,), (3,))),
]


@pytest.mark.parametrize(("degrees", "name", "rank", "ranks"), CASES)
@pytest.mark.matrix
def test_one_flipped_bit_is_found_and_named(
    pool: Pool, degrees: dict[str, int], name: str, rank: int, ranks: tuple[tuple[int, ...], ...]
) -> None:
    plan = plan_of("everything", tuple(degrees.items()))
    every = pool.run(found, plan, name, rank, ranks=plan.devices)
    for told in every:
        assert told[:3] == [1, name, ranks]
        assert f"after step 1 copies of {name} are not equal: rank" in told[3]


def test_what_one_rank_alone_has_cannot_be_compared(pool: Pool) -> None:
    plan = plan_of("everything", (("dp_shard", 2),))
    assert pool.run(found, plan, "blocks.1.down.weight", 0, ranks=2) == [[], []]


def test_several_tensors_are_counted(pool: Pool) -> None:
    plan = plan_of("everything", (("dp_replicate", 2),))

    def job() -> str:
        engine = parallelize(everything(), plan)
        for held in engine.part.held[2:5]:
            if engine.grid.replica:
                flip(held.parameter)
        try:
            engine.check_replicas()
        except ReplicaError as error:
            return str(error)
        return ""

    names = pool.run(lambda: [h.name for h in parallelize(everything(), plan).part.held], ranks=2)[0]
    text = pool.run(job, ranks=2)[1]
    assert text.startswith(
        f"after step 0 copies of {names[2]} are not equal: rank 0 | rank 1; nor are those of 2 other"
    )


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]


def checked(tensor: Tensor) -> int:
    return int(checksum(tensor, weights_for(tensor.nbytes, tensor.device)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 8, WIDTH, 3 * WIDTH + 5])
def test_every_change_of_a_tensor_changes_its_checksum(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    length = size * torch.empty((), dtype=dtype).itemsize
    data = torch.randint(2 if dtype == torch.bool else 256, (length + 16,), generator=generator, dtype=torch.uint8)
    tensor = data[:length].view(dtype)
    expected = checked(tensor)
    assert checked(tensor.view(1, -1).t()) == expected
    for byte in torch.randint(length, (20,), generator=generator).tolist():
        data[byte] ^= 1
        assert checked(tensor) != expected
        data[byte] ^= 1
    for a, b in torch.randint(length, (20, 2), generator=generator).tolist():
        if data[a] != data[b]:
            data[[a, b]] = data[[b, a]]
            assert checked(tensor) != expected
            data[[a, b]] = data[[b, a]]
    assert checked(tensor) == expected


def test_where_a_tensor_lies_does_not_matter() -> None:
    flat = torch.arange(20, dtype=torch.float32)
    for start in range(4):
        assert checked(flat[start : start + 11]) == checked(flat[start : start + 11].clone())
    assert checked(torch.empty(0)) == 0


def test_rows_and_columns_in_each_others_places_are_noticed() -> None:
    """Also of round numbers, whose bits end in zeros."""
    rows = torch.arange(3 * WIDTH, dtype=torch.float64).view(3, WIDTH)
    other = torch.cat([rows[:, 1:2], rows[:, :1], rows[:, 2:]], dim=1)
    assert len({checked(rows), checked(rows[[1, 0, 2]]), checked(rows[[0, 2, 1]]), checked(other)}) == 4


TARGET = """
import os, torch, weft
from torch import nn

class Astray(torch.optim.SGD):
    def step(self):
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data += 1e-3 * int(os.environ.get("RANK", "0"))

def workload():
    points = [(torch.full((4,), i / 16), torch.zeros(1)) for i in range(16)]
    return weft.Workload(
        model=lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
        loss=lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
        data=points,
        optimizer=lambda parameters: Astray(parameters, lr=0.1),
        batch_size=4,
    )
"""


@pytest.mark.long
def test_training_from_the_command_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Copies are compared every so many steps, and before a checkpoint is written."""
    monkeypatch.chdir(tmp_path)
    Path("target.py").write_text(TARGET)
    names: dict[str, Any] = {}
    exec(TARGET, names)
    plan_for(names["workload"](), {"dp_replicate": 2}).save(Path("plan.json"))
    command = ["train", "target.py", "--plan", "plan.json"]
    for options, step in (["--check-replicas", "2"], 2), (["--checkpoint", "kept", "--checkpoint-every", "3"], 3):
        assert run([*command, *options]) == 1
        assert f"after step {step} copies of 0.weight are not equal: rank 0 | rank 1; nor are" in capfd.readouterr().err
    assert not Path("kept").exists()
