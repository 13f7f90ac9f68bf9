"""Checkpoints that are damaged, interrupted or hostile: refused with a reason, and what is whole is found."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import workloads

import weft
from weft.capture import capture
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.folder import complete
from weft.checkpoint.index import NAME
from weft.checkpoint.tensors import checksum
from weft.cluster import Cluster
from weft.errors import CheckpointError, SaveError
from weft.plan import Plan
from weft.planner import make_plan
from weft.runtime.pool import Pool
from weft.runtime.saver import Later, Saver


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(capture(workloads.mlp()), Cluster.local(2), dp_shard=2)


@pytest.fixture(scope="module")
def saved(pool: Pool, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1, 2 and 3."""
    directory = tmp_path_factory.mktemp("saved")

    def job() -> None:
        engine = weft.parallelize(workloads.mlp(), plan)
        for _, batch in zip(range(3), engine.batches(), strict=False):
            engine.step(batch)
            engine.save(directory)

    pool.run(job, ranks=2)
    assert [path.name for path in complete(directory)] == ["step-00000003", "step-00000002", "step-00000001"]
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def load(pool: Pool, plan: Plan, directory: Path) -> tuple[int, list[str]]:
    """The step that training goes on from, and what was warned of."""

    def job() -> tuple[int, list[str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine = weft.parallelize(workloads.mlp(), plan)
            engine.load(directory)
        return engine.step_count, [str(warning.message) for warning in caught]

    found: tuple[int, list[str]] = pool.run(job, ranks=plan.devices)[0]
    return found


def flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


FILE = "rank-00001.safetensors"
DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of a number": lambda path: flip(path / FILE, 1.0),
    "a bit of a header": lambda path: flip(path / FILE, 0.01),
    "a bit of the index": lambda path: flip(path / NAME, 0.5),
    "a file cut short": lambda path: (path / FILE).write_bytes((path / FILE).read_bytes()[:-7]),
    "a file missing": lambda path: (path / FILE).unlink(),
    "a file empty": lambda path: (path / FILE).write_bytes(b""),
    "the index cut short": lambda path: (path / NAME).write_text((path / NAME).read_text()[:-20]),
    "a pickle for a file": lambda path: (path / FILE).write_bytes(pickle.dumps({"model.0.weight": 1})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    pool: Pool, plan: Plan, copy: Path, damage: str
) -> None:
    DAMAGE[damage](copy / "step-00000003")
    step, said = load(pool, plan, copy)
    assert step == 2
    assert any("step-00000003" in line and line.endswith("going on from step-00000002") for line in said), said


def test_damage_to_all_of_them_is_an_error(pool: Pool, plan: Plan, copy: Path) -> None:
    for path in complete(copy):
        DAMAGE["a bit of a number"](path)
    with pytest.raises(CheckpointError, match=r"step-00000003/rank-00001.safetensors does not hold .* as written"):
        load(pool, plan, copy)
    with pytest.raises(CheckpointError, match="does not hold"):
        load(pool, plan, copy / "step-00000002")


def test_every_byte_of_a_file_matters(saved: Path) -> None:
    """Whatever byte is changed, in any file: it is noticed."""
    for name in ("rank-00000.safetensors", NAME):
        path = saved / "step-00000001" / name
        content = path.read_bytes()
        unnoticed = []
        try:
            for at in range(0, len(content), max(1, len(content) // 150)):
                path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
                try:
                    Checkpoint.open(path.parent).verify()
                except CheckpointError:
                    continue
                unnoticed.append((at, content[at : at + 1]))
        finally:
            path.write_bytes(content)
        assert not unnoticed, (name, unnoticed)


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """An index that someone else wrote, with its checksum right."""
    data = json.loads((path / NAME).read_text())
    del data["checksum"]
    change(data)
    (path / NAME).write_text(json.dumps({**data, "checksum": checksum(json.dumps(data, sort_keys=True).encode())}))


def huge(data: dict[str, Any]) -> None:
    next(iter(data["tensors"].values()))["shape"][0] = 2**60


def huge_all_through(data: dict[str, Any]) -> None:
    tensor = next(iter(data["tensors"].values()))
    tensor["shape"][0] = tensor["chunks"][0][2][0] = 2**60
    del tensor["chunks"][1:]


def elsewhere(data: dict[str, Any]) -> None:
    data["files"]["../../secret.safetensors"] = data["files"].pop(FILE)
    for tensor in data["tensors"].values():
        for chunk in tensor["chunks"]:
            chunk[0] = chunk[0].replace(FILE, "../../secret.safetensors")


def everywhere(data: dict[str, Any]) -> None:
    next(iter(data["tensors"].values()))["chunks"][0][1][0] = 2**62


def no_step(data: dict[str, Any]) -> None:
    data["step"] = -1


def no_plan(data: dict[str, Any]) -> None:
    data["plan"] = {"version": 1, "__class__": "os.system"}


HOSTILE = {
    huge: "do not make up its shape",
    huge_all_through: "does not hold",
    elsewhere: "no name of a file of tensors",
    everywhere: "lies outside",
    no_step: "a whole number",
    no_plan: "unknown key|version",
}


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: change.__name__)
def test_an_index_that_lies_is_refused(copy: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = copy / "step-00000003"
    rewritten(path, change)
    with pytest.raises(CheckpointError, match=HOSTILE[change]):
        Checkpoint.open(path).verify()


def other_parameters(data: dict[str, Any]) -> None:
    data["groups"][0]["params"] = []


def text_for_a_rate(data: dict[str, Any]) -> None:
    data["groups"][0]["lr"] = "x"


def nothing_for_a_rate(data: dict[str, Any]) -> None:
    data["groups"][0]["lr"] = None


def no_rate(data: dict[str, Any]) -> None:
    del data["groups"][0]["lr"]


def a_number_for_a_tensor(data: dict[str, Any]) -> None:
    del data["tensors"]["optimizer.0.bias.momentum_buffer"]
    data["values"]["optimizer.0.bias.momentum_buffer"] = 3


def no_optimizer(data: dict[str, Any]) -> None:
    data["values"]["engine.optimizer"] = ["SGD"]


ODD = {
    text_for_a_rate: "lr of parameter group 0 of .*step-00000003: the checkpoint has 'x' in the place of 0.1",
    nothing_for_a_rate: "the checkpoint has None in the place of 0.1",
    no_rate: "has no learning rate",
    a_number_for_a_tensor: "has 3 for optimizer.0.bias.momentum_buffer, which should be a tensor",
    no_optimizer: r"was saved with the optimizer \['SGD'\]",
}


@pytest.mark.parametrize("change", ODD, ids=lambda change: change.__name__)
def test_what_an_optimizer_cannot_go_on_with_is_refused(
    pool: Pool, plan: Plan, copy: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    rewritten(copy / "step-00000003", change)
    with pytest.raises(CheckpointError, match=ODD[change]):
        load(pool, plan, copy)


def test_an_index_does_not_say_which_parameters_there_are(pool: Pool, plan: Plan, copy: Path) -> None:
    rewritten(copy / "step-00000003", other_parameters)

    def job() -> int:
        engine = weft.parallelize(workloads.mlp(), plan)
        engine.load(copy)
        return sum(len(group["params"]) for group in engine.optimizer.param_groups)

    assert pool.run(job, ranks=2)[0] == 8


def test_a_checkpoint_that_does_not_name_its_optimizer_is_read(pool: Pool, plan: Plan, copy: Path) -> None:
    """Those of earlier versions do not."""
    rewritten(copy / "step-00000003", lambda data: data["values"].pop("engine.optimizer"))
    assert load(pool, plan, copy) == (3, [])


class Spiteful:
    """What runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_nothing_is_unpickled(pool: Pool, plan: Plan, copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for path in complete(copy):
        for file in path.iterdir():
            torch.save({"model.0.weight": Spiteful(mark)}, file)
    with pytest.raises(CheckpointError):
        load(pool, plan, copy)
    assert not mark.exists()


def test_a_save_that_fails_leaves_what_was_there(pool: Pool, plan: Plan, copy: Path) -> None:
    """The disk takes no more: every rank hears of it, training goes on, and so does the next save."""

    def job() -> tuple[int, str, list[str], int]:
        engine = weft.parallelize(workloads.mlp(), plan)
        engine.load(copy)
        batches = engine.batches()
        engine.step(next(batches))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
        try:
            engine.save(copy, wait=False)
            engine.finish_saving()
            said = ""
        except SaveError as error:
            said = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        there = sorted(path.name for path in copy.iterdir())
        engine.step(next(batches))
        engine.save(copy, wait=False)
        engine.finish_saving()
        return engine.step_count, said, there, len(complete(copy))

    for step, said, there, count in pool.run(job, ranks=2):
        assert "the checkpoint of step 4 could not be written" in said
        assert "File too large" in said
        assert there == ["step-00000001", "step-00000002", "step-00000003"]
        assert (step, count) == (5, 4)
    assert load(pool, plan, copy)[0] == 5


SHORT: dict[str, tuple[bool, Any, str, bool, type[Exception]]] = {
    "one after the other": (True, torch.Tensor, "contiguous", False, torch.OutOfMemoryError),
    "in the thread": (False, torch.Tensor, "copy_", False, torch.OutOfMemoryError),
    "in the thread, of Python's": (False, torch.Tensor, "copy_", False, MemoryError),
    "at once": (False, torch.Tensor, "copy_", True, torch.OutOfMemoryError),
    "room for copies": (False, torch, "empty", False, torch.OutOfMemoryError),
    "room for copies, of Python's": (False, torch, "empty", False, MemoryError),
}
"""Whether a save is waited for, what fails, whether copies are made at once, and what is raised."""


@pytest.mark.parametrize("case", SHORT)
def test_a_rank_without_memory_for_a_copy_tells_the_others(pool: Pool, plan: Plan, copy: Path, case: str) -> None:
    """They would else wait for it as long as for a disk. Training goes on, and so does the next save."""
    wait, owner, copies, at_once, raised = SHORT[case]

    def job() -> tuple[str, float]:
        engine = weft.parallelize(workloads.mlp(), plan)
        engine.load(copy)
        batches = engine.batches()
        engine.step(next(batches))
        engine.save(copy.parent / "first")
        engine._saver._at_once = at_once
        began, said, real, calls = time.monotonic(), "", getattr(owner, copies), []

        def short(*given: Any, **named: Any) -> Any:
            calls.append(given)
            if len(calls) > 1:
                return real(*given, **named)
            raise raised("no memory is left" if raised is not MemoryError else "")

        with mock.patch.object(owner, copies, short) if dist.get_rank() == 1 else nullcontext():
            try:
                engine.save(copy, wait=wait)
                engine.finish_saving()
            except SaveError as error:
                said = str(error)
        seconds = time.monotonic() - began
        engine.step(next(batches))
        engine.save(copy.parent / "after", wait=wait)
        engine.finish_saving()
        return said, seconds

    for said, seconds in pool.run(job, ranks=2):
        assert "rank 1: no memory is left" in said
        assert seconds < 30
    assert [path.name for path in complete(copy)] == ["step-00000003", "step-00000002", "step-00000001"]
    Checkpoint.open(copy.parent / "after" / "step-00000005").verify()


def test_what_is_saved_beside_training_is_of_the_step_it_was_asked_for(pool: Pool, plan: Plan, tmp_path: Path) -> None:
    def job() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        engine = weft.parallelize(workloads.mlp(), plan)
        batches = engine.batches()
        engine.step(next(batches))
        before = engine.state_dict()
        engine.save(tmp_path, wait=False)
        for _ in range(3):
            engine.step(next(batches))
        engine.save(tmp_path, keep=1, wait=False)
        engine.finish_saving()
        engine.save(tmp_path / "again")
        engine.load(tmp_path / "again")
        return before, engine.state_dict()

    before, after = pool.run(job, ranks=2)[0]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("step")] == ["step-00000004"]
    found = Checkpoint.open(tmp_path / "step-00000004")
    for name, tensor in after.items():
        whole = tuple(slice(0, length) for length in tensor.shape)
        assert torch.equal(found.stored(f"model.{name}").read(whole), tensor)
        assert not torch.equal(before[name], tensor)


def late(saver: Saver, later: Sequence[Later], copy: Callable[..., str] = Saver._copy) -> str:
    """Copies for a save, made when others had time to do something."""
    time.sleep(0.3)
    return copy(saver, later)


@pytest.mark.parametrize("shard", [1, 2])
def test_the_optimizer_waits_for_copies(pool: Pool, tmp_path: Path, shard: int) -> None:
    def job() -> dict[str, torch.Tensor]:
        engine = weft.parallelize(workloads.mlp(), plan)
        batches = engine.batches()
        engine.step(next(batches))
        before = {name: tensor.clone() for name, tensor in engine.state_dict().items()}
        with mock.patch.object(Saver, "_copy", late):
            engine.save(tmp_path, wait=False)
            engine.step(next(batches))
        engine.finish_saving()
        return before

    plan = make_plan(capture(workloads.mlp()), Cluster.local(2), dp_shard=shard, dp_replicate=2 // shard)
    before = pool.run(job, ranks=2)[0]
    found = Checkpoint.open(tmp_path / "step-00000001")
    for name, tensor in before.items():
        whole = tuple(slice(0, length) for length in tensor.shape)
        assert torch.equal(found.stored(f"model.{name}").read(whole), tensor), name


def test_what_changes_beside_the_optimizer_is_not_saved_half(pool: Pool, plan: Plan, tmp_path: Path) -> None:
    """A parameter is changed while it is copied: the save fails, and from then on copies are made at once."""

    def job() -> list[str]:
        engine, said = weft.parallelize(workloads.mlp(), plan), []
        engine.step(next(engine.batches()))
        for number in range(2):
            with mock.patch.object(Saver, "_copy", late):
                engine.save(tmp_path / str(number), wait=False)
                with torch.no_grad():
                    for parameter in engine.model.parameters():
                        parameter.add_(1)
                try:
                    engine.finish_saving()
                except SaveError as error:
                    said.append(str(error))
        return said

    for said in pool.run(job, ranks=2):
        assert len(said) == 1
        assert "changed, outside of the optimizer, while it was copied" in said[0]
    assert [len(complete(tmp_path / number)) for number in "01"] == [0, 1]


def test_what_a_killed_job_left_is_no_checkpoint_and_goes(pool: Pool, plan: Plan, copy: Path) -> None:
    left = copy / ".step-00000009.7f3a.new"
    left.mkdir()
    (left / FILE).write_bytes(b"half")
    assert load(pool, plan, copy)[0] == 3

    def job() -> None:
        engine = weft.parallelize(workloads.mlp(), plan)
        engine.load(copy)
        engine.save(copy)  # of step 3 again

    pool.run(job, ranks=2)
    assert sorted(path.name for path in copy.iterdir()) == ["step-00000001", "step-00000002", "step-00000003"]
