"""Launching: results by rank, one error that names the first process to fail, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from weft.errors import BatchError, InputError, WorkerError
from weft.runtime.failure import Failure, chain, first
from weft.runtime.launch import launch, launch_script
from weft.runtime.pool import Place, Pool, mesh_caches
from weft.runtime.worker import describe_stage, join

SOON_S = 15
"""A job must be over this long after one of its processes died."""


def summed(x: float) -> tuple[int, int, float, int]:
    total = torch.tensor([x + dist.get_rank()], dtype=torch.float64)
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item(), torch.get_num_threads()


def fail(how: str) -> None:
    """Rank 1 fails in one of many ways while the others wait for it."""
    describe_stage(10 + dist.get_rank())
    dist.barrier()
    if dist.get_rank() == 1:
        match how:
            case "raises":
                raise ValueError("seven is\nnot even")
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exits":
                sys.exit(3)
            case "leaves":
                os._exit(4)
            case "hides":
                raise RuntimeError("wrapped") from ValueError("inner")
    if how == "hangs":
        if dist.get_rank() == 2:
            raise ValueError("alone")
        time.sleep(600)
    dist.all_reduce(torch.ones(1000))


def reject() -> None:
    raise BatchError("a batch of 3 samples cannot be divided by 2")


def test_launch_returns_every_ranks_result() -> None:
    here = torch.ones(3)  # a closure crosses as well
    results = launch(lambda: (summed(1.0), here.sum().item()), devices=3, device="cpu")
    threads = max(1, len(os.sched_getaffinity(0)) // 3) if "OMP_NUM_THREADS" not in os.environ else results[0][0][3]
    assert results == [((rank, 3, 6.0, threads), 3.0) for rank in range(3)]


def test_launch_names_the_process_that_was_killed(capfd: pytest.CaptureFixture[str]) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    before = set(psutil.Process().children())  # the pool of other tests
    with pytest.raises(WorkerError, match=r"^rank 1 \(stage 11\) failed: killed by SIGKILL") as caught:
        launch(fail, "killed", devices=3, device="cpu")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert (caught.value.rank, caught.value.stage, caught.value.traceback) == (1, 11, "")
    assert set(psutil.Process().children()) <= before
    assert capfd.readouterr() == ("", "")  # no agent's log, no traceback of a peer


@pytest.mark.parametrize(
    ("how", "cause", "traceback"),
    [
        ("raises", "ValueError: seven is not even (test_launch.py:", "in fail"),
        ("killed", "killed by SIGKILL", ""),
        ("exits", "exited with code 3", "SystemExit"),
        ("leaves", "exited with code 4", ""),
        ("hides", "RuntimeError: wrapped (test_launch.py:", "ValueError: inner"),
    ],
)
@pytest.mark.matrix
def test_a_pool_names_the_first_failure_and_goes_on(pool: Pool, how: str, cause: str, traceback: str) -> None:
    before = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        pool.run(fail, how, ranks=3)
    assert time.monotonic() - before < SOON_S
    assert (caught.value.rank, caught.value.stage) == (1, 11)
    assert caught.value.cause.startswith(cause)
    assert traceback in caught.value.traceback
    assert [result[:3] for result in pool.run(summed, 0.0, ranks=4)] == [(rank, 4, 6.0) for rank in range(4)]


def test_a_pool_ends_processes_that_hang_after_a_failure(pool: Pool) -> None:
    before = time.monotonic()
    with pytest.raises(WorkerError, match=r"rank 2 \(stage 12\) failed: ValueError: alone"):
        pool.run(fail, "hangs", ranks=3)
    assert time.monotonic() - before < SOON_S
    with pytest.raises(BatchError):
        pool.run(reject, ranks=2)


def test_one_pool_forms_jobs_of_every_size(pool: Pool) -> None:
    for count in (1, 2, 3, 4):
        assert [result[:3] for result in pool.run(summed, 1.0, ranks=count)] == [
            (rank, count, count * (count + 1) / 2) for rank in range(count)
        ]
    with pytest.raises(InputError, match="ask for 1 to 8"):
        pool.run(summed, 1.0, ranks=9)


def where() -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in ("COLOUR", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"))


def test_ranks_that_leave_at_once_cut_off_nobody(pool: Pool) -> None:
    """Those that are connected already are done while others still connect."""
    for _ in range(30):
        assert pool.run(time.sleep, 0) == [None] * 8


def test_a_pools_processes_run_where_they_are_told() -> None:
    places = [Place(node=0, environment={"COLOUR": "red"}), Place(node=1, command=("env", "COLOUR=blue"))]
    with Pool(3, device="cpu", timeout_s=60, places=places) as pool:
        assert pool.run(where) == [("red", "0", "2", "3"), ("blue", "0", "1", "3"), (None, "1", "2", "3")]
        assert pool.run(where, ranks=2) == [("red", "0", "1", "2"), ("blue", "0", "1", "2")]


def sharded() -> int:
    join()
    model = fully_shard(nn.Linear(8, 8), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return psutil.Process().num_threads()


def test_a_pool_keeps_no_process_groups(pool: Pool) -> None:
    # DTensor's caches hold meshes, and each group has threads of its own
    threads = [pool.run(sharded, ranks=ranks)[0] for ranks in (2, 2, 3, 4, 2)]
    assert threads[-1] <= threads[1]


def test_the_caches_are_found_without_a_warning() -> None:
    assert "torch.distributed.tensor._redistribute" in sys.modules  # fully_shard has imported it
    assert len(mesh_caches()) > 2


def launch_inside() -> str:
    with pytest.raises(InputError) as caught:
        launch(reject, devices=1)
    return str(caught.value)


def test_a_launched_process_cannot_launch(pool: Pool) -> None:
    assert pool.run(launch_inside, ranks=2)[1].startswith("this process is rank 1 of a launched job")


def test_what_cannot_be_sent_is_said() -> None:
    with pytest.raises(InputError, match="cannot be sent to other processes"):
        launch(lambda lock: lock, threading.Lock(), devices=1, device="cpu")
    with pytest.raises(InputError, match="devices must be at least 1"):
        launch(reject, devices=0)
    with pytest.raises(InputError, match="no such file"):
        launch_script("nowhere.py")
    with pytest.raises(InputError, match="--rendezvous"):
        launch_script(__file__, nodes=2)


def test_a_process_by_itself_is_a_job_of_one(pool: Pool) -> None:
    code = "from weft.runtime.worker import *; join(); join(); print(dist.get_world_size())"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert alone.stdout == "1\n"

    def again() -> str:
        return str(join(device="cpu"))  # the pool's own group is kept

    assert pool.run(again, ranks=2) == ["cpu", "cpu"]


def test_a_script_runs_as_torchrun_runs_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "beside.py").write_text("WORD = 'found'\n")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys
            import torch, torch.distributed as dist
            import beside
            assert __name__ == "__main__"
            dist.init_process_group("gloo")
            total = torch.ones(1)
            dist.all_reduce(total)
            if os.environ["RANK"] == "0":
                print(sys.argv[1:], total.item(), beside.WORD, os.environ["LOCAL_WORLD_SIZE"])
            dist.barrier()
            dist.destroy_process_group()
            sys.exit(int(sys.argv[2]) if os.environ["RANK"] == "1" else 0)
            """
        )
    )
    with pytest.raises(WorkerError, match=r"^rank 1 failed: exited with code 7$"):
        launch_script(script, ["--cost=$5", "7"], devices=2, device="cpu")
    assert capfd.readouterr() == ("['--cost=$5', '7'] 2.0 found 2\n", "")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_its_launcher(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "launcher.py"  # without a guard: the workers must not import it
    script.write_text(
        textwrap.dedent(
            """
            import signal, sys
            import weft.runtime.launch
            def fn():
                import os, time, torch, torch.distributed as dist
                os.write(1, b"up\\n")
                dist.all_reduce(torch.ones(1)) if dist.get_rank() else time.sleep(600)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                weft.runtime.launch.launch(fn, devices=2, device="cpu")
            except KeyboardInterrupt:
                sys.exit(130)
            """
        )
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, start_new_session=True) as launcher:
        family: list[psutil.Process] = []
        try:
            assert launcher.stdout is not None
            assert [launcher.stdout.readline() for _ in range(2)] == [b"up\n", b"up\n"]
            family = psutil.Process(launcher.pid).children(recursive=True)
            assert len(family) == 2
            launcher.send_signal(how)
            assert launcher.wait(SOON_S) == (130 if how == signal.SIGINT else -signal.SIGKILL)
            _, alive = psutil.wait_procs(family, timeout=SOON_S)
            assert not alive
        finally:
            for process in (launcher, *family):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def record(rank: int, moment: float, *, lost_peer: bool = False) -> Failure:
    return Failure(rank=rank, moment=moment, cause=f"cause {rank}", traceback="", lost_peer=lost_peer)


def test_the_first_failure_is_the_root() -> None:
    kill, abort, term = -signal.SIGKILL, -signal.SIGABRT, -signal.SIGTERM
    lost, own, later = record(0, 1.0, lost_peer=True), record(1, 2.0), record(2, 3.0)
    stages = {1: 4}
    for failures, exits, rank, cause in [
        ([lost, own, later], {0: 1, 1: 1, 2: 1}, 1, "cause 1"),  # a lost peer is a consequence, though it came first
        ([lost], {0: 1, 1: kill, 2: term}, 1, "killed by SIGKILL"),  # the killed left nothing
        ([lost], {0: 1, 1: abort}, 1, "killed by SIGABRT"),
        ([later], {2: 1, 1: abort}, 2, "cause 2"),  # a watchdog aborts where its peer is gone
        ([lost], {0: 1, 1: term}, 0, "cause 0"),  # only losses: the earliest
        ([], {3: term}, 3, "killed by SIGTERM"),
    ]:
        error = first(failures, exits, stages)
        assert isinstance(error, WorkerError)
        assert (error.rank, error.stage) == (rank, stages.get(rank))
        assert error.cause.startswith(cause)


def test_an_error_after_a_lost_peer_is_a_consequence() -> None:
    error = KeyError("state")
    error.__context__ = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    assert list(chain(error)) == [error, error.__context__]
    assert Failure.of(error, 0).lost_peer
    assert not Failure.of(KeyError("state"), 0).lost_peer


def test_an_input_error_comes_back_as_itself(tmp_path: Path) -> None:
    error = BatchError("a batch of 3 samples")
    Failure.of(error, 1).save(tmp_path / "1.failure")
    back = first([Failure.load(tmp_path / "1.failure")], {1: 1}, {})
    assert type(back) is BatchError
    assert str(back) == str(error)
