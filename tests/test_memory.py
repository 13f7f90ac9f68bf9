"""Memory of a process: the peak is what tensors took, and a limit is refused by the operating system."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

from weft.errors import WorkerError
from weft.runtime import memory
from weft.runtime.launch import launch
from weft.runtime.pool import Pool

MIB = 2**20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and peaks are the Linux kernel's")


def tensor(size_mib: float) -> torch.Tensor:
    return torch.ones(int(size_mib * MIB), dtype=torch.uint8)


def peaks() -> list[float]:
    """MiB: of one tensor, after it is gone, after a reset, of two at once; in a heap whose holes take the tensor in."""
    small = [torch.ones(16 * 1024) for _ in range(1600)]  # 64 KiB each: too small for mappings of their own
    del small[:-1]
    used = memory.of(torch.device("cpu"))
    found = []
    kept = tensor(50)
    found.append(used.peak())
    del kept
    found.append(used.peak())
    used.reset()
    found.append(used.peak())
    kept = tensor(40)
    other = tensor(60)
    del kept, other
    found.append(used.peak())
    return [size / MIB for size in found]


def test_the_peak_is_what_tensors_took(pool: Pool) -> None:
    one, gone, reset, two = pool.run(peaks, ranks=1)[0]
    assert one == pytest.approx(50, abs=3)
    assert gone == pytest.approx(50, abs=3)
    assert reset == pytest.approx(0, abs=3)
    assert two == pytest.approx(100, abs=3)


def churn() -> float:
    """MiB at the peak of small tensors, in a process whose heap had as many before."""
    for _ in range(2):
        used = memory.of(torch.device("cpu"))
        kept = [torch.ones(16 * 1024) for _ in range(640)]  # 64 KiB each: too small for mappings of their own
        size = used.peak()
        del kept[::2], kept
    return size / MIB


def test_memory_freed_before_the_baseline_counts_when_it_serves_again(pool: Pool) -> None:
    assert pool.run(churn, ranks=1)[0] == pytest.approx(40, abs=3)


def fill(piece_mib: float) -> float:
    """MiB of tensors a process gets before it is refused."""
    kept: list[torch.Tensor] = []

    def without_end() -> None:
        while True:
            kept.append(tensor(piece_mib))

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        without_end()
    return len(kept) * piece_mib


def fill_in_groups(groups: int) -> float:
    made = [dist.new_group(range(2)) for _ in range(groups)]
    for group in made:
        dist.all_reduce(torch.ones(1), group=group)
    return fill(2)


def again_and_again(size_mib: float, times: int) -> float:
    """Tensors of growing sizes, made and freed between others that stay: freed memory must serve again."""
    stay = []
    for i in range(times):
        passing = [tensor(size_mib / 4 + i / times) for _ in range(4)]
        stay.append(tensor(0.25))
        del passing
        gc.collect()
    return len(stay) * 0.25


def test_a_limit_is_nearly_all_for_tensors() -> None:
    with Pool(2, device="cpu", memory="200MiB") as limited:
        for piece in (1.5, 20):
            for got in limited.run(fill, piece):
                assert 200 * 0.96 - piece <= got <= 200
        for got in limited.run(fill_in_groups, 4):  # three threads a group, a MiB each
            assert 200 * 0.96 - 2 - 4 * 3 <= got <= 200
        assert limited.run(again_and_again, 170, 8) == [2, 2]
        with pytest.raises(WorkerError, match="out of memory: the process reached its limit of 200 MiB") as caught:
            limited.run(ask_for_too_much, ranks=2)
        assert (caught.value.rank, caught.value.stage) == (1, 3)
        assert caught.value.cause.endswith("in tensor)")
        assert "ask_for_too_much" in caught.value.traceback


def load_and_fill(loaded_mib: float, size_mib: float) -> int:
    with memory.uncounted():
        kept = tensor(loaded_mib)
    return tensor(size_mib).nbytes + 0 * kept.nbytes


def test_what_is_loaded_does_not_count_against_the_limit() -> None:
    with Pool(1, device="cpu", memory="64MiB") as limited:
        assert limited.run(load_and_fill, 120, 50) == [50 * memory.MIB]
        assert limited.run(load_and_fill, 0, 50) == [50 * memory.MIB]
        with pytest.raises(WorkerError, match="out of memory: the process reached its limit of 64 MiB"):
            limited.run(load_and_fill, 120, 80)


def ask_for_too_much() -> None:
    from weft.runtime.worker import describe_stage

    describe_stage(2 + dist.get_rank())
    if dist.get_rank() == 1:
        kept = [tensor(50) for _ in range(5)]
        assert kept is None
    dist.barrier()


def a_tensor_of(size_mib: float) -> int:
    return tensor(size_mib).numel()


def test_launch_applies_a_limit() -> None:
    with pytest.raises(WorkerError, match="limit of 64 MiB"):
        launch(a_tensor_of, 65, devices=1, device="cpu", memory=64 * MIB)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_accelerator_counts_its_own_tensors() -> None:
    def on_device() -> tuple[int, Any]:
        device = torch.device("cuda", 0)
        used = memory.of(device)
        kept = torch.ones(64 * MIB, dtype=torch.uint8, device=device)
        return used.peak(), kept.sum().item()

    ((peak, _),) = launch(on_device, devices=1)
    assert peak == pytest.approx(64 * MIB, rel=0.1)
    with pytest.raises(WorkerError, match="out of memory: the process reached its limit of 32 MiB"):
        launch(on_device, devices=1, memory="32MiB")
