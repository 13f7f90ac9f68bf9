"""Jobs whose processes die go on where they were: the same numbers to the bit, or on fewer devices to 1e-8."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from faults import TARGET, Run, same

from weft.capture import capture
from weft.cluster import Cluster
from weft.errors import GaveUpError, JobError, WorkerError
from weft.planner import make_plan
from weft.runtime.failure import Failure
from weft.runtime.launch import launch_again
from weft.runtime.meeting import Nodes
from weft.runtime.restarts import Death, Restarts
from weft.target import Target

STEPS, EVERY = 24, 4


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    made = make_plan(capture(Target.parse(TARGET).load()), Cluster.local(2), pp=2, microbatches=2)
    made.save(path)
    return str(path)


def train(directory: Path, plan: str, *arguments: str, fault: str = "") -> Run:
    return Run.start(
        directory,
        *("--plan", plan, "--steps", str(STEPS), "--checkpoint-every", str(EVERY), *arguments),
        fault=fault,
    )


@pytest.fixture(scope="module")
def undisturbed(plan: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    directory = tmp_path_factory.mktemp("undisturbed")
    ended = train(directory, plan).end()
    assert ended.code == 0, ended.said
    return directory, ended.result["losses"]


@pytest.mark.long
def test_what_died_when_all_was_done_has_nothing_left_to_do(plan: str, undisturbed: tuple[Path, list[float]]) -> None:
    directory, _ = undisturbed
    ended = train(directory, plan, "--restarts", "1", "--resume").end()
    assert ended.code == 0, ended.said
    assert (ended.result["first_step"], ended.result["losses"]) == (STEPS, [])
    assert train(directory, plan, "--resume").end().code == 2


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
@pytest.mark.long
def test_a_killed_process_changes_nothing(
    plan: str, undisturbed: tuple[Path, list[float]], tmp_path: Path, where: str
) -> None:
    ended = train(tmp_path, plan, "--restarts", "2", fault=f"{where}:14:1:SIGKILL").end()
    assert ended.code == 0, ended.said
    (death,) = ended.result["deaths"]
    assert death["step"] == 15
    assert "rank 1 (stage 1) failed: killed by SIGKILL" in death["cause"]
    first = ended.result["first_step"]
    assert first in (8, 12)  # the checkpoint of step 12 may have been on its way
    directory, losses = undisturbed
    assert ended.result["losses"] == losses[first:]
    same(tmp_path, directory)


@pytest.mark.long
def test_what_dies_at_the_same_step_twice_is_given_up(plan: str, tmp_path: Path) -> None:
    run = train(tmp_path, plan, "--restarts", "5", "nothing=1")
    assert run.end().code == 2  # the target takes no such argument: nothing is tried again
    run = Run.start(
        tmp_path / "again",
        *("--plan", plan, "--steps", str(STEPS), "--checkpoint-every", "20", "--restarts", "5"),
        fault="forward:6:0:SIGKILL",
        environment={"FAULT_ALWAYS": "1"},
    )
    ended = run.end()
    assert ended.code == 1
    assert "gave up: it died at step 7 twice in a row" in ended.error
    assert ended.error.count("killed by SIGKILL") == 2


@pytest.mark.long
def test_a_lost_device_is_done_without(tmp_path: Path) -> None:
    """Four processes, one of them gone for good after step 20."""
    lost = tmp_path / "lost"
    asked = ["--devices", "4", "--dp-replicate", "4", "--steps", "60", "--checkpoint-every", "5"]
    ended = Run.start(tmp_path / "undisturbed", *asked).end()
    assert ended.code == 0, ended.said
    losses = ended.result["losses"]
    check = f"test $WEFT_DEVICE != 2 -o ! -e {lost}"
    run = Run.start(tmp_path / "disturbed", *asked, "--restarts", "3", "--device-check", check)
    assert run.until(lambda: run.newest() >= 20), run.said()
    lost.touch()
    run.workers()[2].send_signal(signal.SIGKILL)
    killed, before = time.monotonic(), run.newest()
    assert run.until(lambda: run.newest() > before + 5), run.said()
    print(f"{time.monotonic() - killed:.1f} s from the kill to the next checkpoint")
    ended = run.end()
    assert ended.code == 0, ended.said
    assert "3 of 4 devices are there" in ended.said
    assert ended.result["plan"]["dp_replicate"] * ended.result["plan"]["pp"] * ended.result["plan"]["tp"] == 3
    first = ended.result["first_step"]
    assert ended.result["losses"] == pytest.approx(losses[first:], rel=1e-8)
    same(tmp_path / "disturbed", tmp_path / "undisturbed", 1e-8)


@pytest.mark.long
def test_a_device_that_is_back_is_taken_back(tmp_path: Path) -> None:
    lost, said = tmp_path / "lost", []
    lost.touch()

    def job() -> int:
        if dist.get_world_size() == 1:
            lost.unlink()
            time.sleep(60)
        return dist.get_world_size()

    restarts = Restarts(command=f"test $WEFT_DEVICE = 0 -o ! -e {lost}", say=said.append, ask_every_s=0.5)
    assert launch_again(job, restarts=restarts, nodes=Nodes(), devices=2, device="cpu") == [2, 2]
    assert said == ["device 1 is there again: starting with it", "2 of 2 devices are there"]
    assert restarts.deaths == []


def failed(job: Path, step: int | None) -> Path:
    """What a process that was at a step leaves."""
    job.mkdir(exist_ok=True)
    Failure(rank=0, moment=0.0, cause="broken", traceback="", lost_peer=False).save(job / "0.failure")
    return job


def test_pauses_grow_while_nothing_is_gained(tmp_path: Path) -> None:
    said: list[str] = []
    restarts = Restarts(limit=9, say=said.append, pause_s=0.01)
    for devices in ((0, 1), (0,), (0, 1), (0,)):  # never twice in a row on the same
        restarts.after_death(failed(tmp_path, None), {0: 1}, devices, len(devices))
    assert [death.pause_s for death in restarts.deaths] == [0.01, 0.02, 0.04, 0.08]
    assert said[1] == "died while it started on 1 device: rank 0 failed: broken; restart 2 of 9 in 0.02 s"
    restarts.deaths[-1] = Death(7, "broken", (0, 1), 2)
    restarts.limit = 4
    with pytest.raises(GaveUpError, match="while it started on 2 devices"):
        restarts.after_death(tmp_path, {0: 1}, (0, 1), 2)
    with pytest.raises(WorkerError):
        Restarts().after_death(tmp_path, {0: 1}, (0, 1), 2)


def test_the_same_step_on_fewer_hosts_is_not_the_same_again(tmp_path: Path) -> None:
    restarts = Restarts(limit=9, say=lambda _: None, pause_s=0.01)
    failed(tmp_path, None)
    for world in (4, 2, 4):
        restarts.after_death(tmp_path, {0: 1}, (0, 1), world)
    assert [death.describe().partition(":")[0] for death in restarts.deaths[:2]] == [
        "while it started on 2 devices here and 2 elsewhere",
        "while it started on 2 devices",
    ]
    with pytest.raises(GaveUpError, match="twice in a row"):
        restarts.after_death(tmp_path, {0: 1}, (0, 1), 4)


def test_no_device_left_is_an_error() -> None:
    assert Restarts(command="test $WEFT_DEVICE -gt 0").there((0, 1, 2)) == (1, 2)
    with pytest.raises(JobError, match="no device is left"):
        Restarts(command="false").there((0, 1))
