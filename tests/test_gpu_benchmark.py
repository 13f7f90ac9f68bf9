"""benchmarks/gpu.py: its path on the CPU, what it makes of its figures, and itself where there is a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
from gpu_llama import workload

import weft
from weft.capture import capture
from weft.cluster import Cluster
from weft.plan import Plan

SCRIPT = str(Path(gpu.__file__))


def report(*options: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, SCRIPT, *options, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.long
def test_its_path_on_the_cpu() -> None:
    found = report("--small", "--way", "plain", "--steps", "2")
    tiny, large = found["rows"]
    assert tiny["measured_s"] > 0
    assert tiny["measured_bytes"] > 4 * 4 * 300_000  # parameters, gradients and two moments
    assert 0 < tiny["share"] < 1.5
    assert tiny["preset_s"] > 0
    assert large["left_out"].startswith("needs ")
    assert large["measured_s"] is None
    assert found["summary"]["time_error"] == pytest.approx(abs(tiny["predicted_s"] / tiny["measured_s"] - 1))
    assert set(found["machine"]) >= {"torch", "python", "accelerators", "cuda"}


def test_its_model_is_the_same_under_a_plan() -> None:
    stages = (("token", "blocks.0"), ("blocks.1", "norm", "head"))
    found = weft.verify(workload(), Plan(pp=2, microbatches=2, stages=stages, batch_size=4))
    assert found.ok, found


def test_the_flops_of_a_model() -> None:
    """Six for every weight of a product and every token, and attention's own."""
    profile = capture(workload(length=64, batch_size=4))
    layers, hidden, inner, heads, groups, vocabulary = gpu.SIZES["tiny"]
    weights = layers * hidden * (2 * hidden + 2 * groups * hidden // heads + 3 * inner) + hidden * vocabulary
    products, attention = 6 * 4 * 64 * weights, layers * 4 * 64 * 64 * hidden * 4 * 3.5
    assert products < gpu.model_flops(profile) <= products + 1.01 * attention


def row(**values: Any) -> gpu.Row:
    common = {"size": "1b", "numbers": "bf16", "way": "plain", "predicted_s": 1.1, "predicted_bytes": 96.0}
    return gpu.Row(**common | {"preset_s": 1.0, "needed_bytes": 120.0} | values)


def test_what_it_makes_of_its_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = row(measured_s=1.0, measured_bytes=100)
    worse = row(way="compile", measured_s=2.0, measured_bytes=100)
    told = gpu.summary([seen, worse, row(size="8b", left_out="needs more", overflowed=True)])
    assert told["time_error"] == pytest.approx((0.1 + 0.45) / 2)
    assert told["memory_error"] == pytest.approx(0.04)
    assert told["met"] == {"time": False, "memory": True, "left out": True}
    assert not gpu.summary([row(size="8b", left_out="needs more", overflowed=False)])["met"]["left out"]
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "gpu.json")
    about = {"machine": {"torch": "2"}}
    gpu.keep([seen, worse], about)
    assert [r.measured_s for r in gpu.keep([replace(seen, measured_s=1.2)], about)] == [2.0, 1.2]
    assert len(gpu.keep([seen], {"machine": {"torch": "3"}})) == 1


def test_of_predicted_memory_only_tensors_are_compared() -> None:
    h200 = Cluster.preset("h200", nodes=1, devices_per_node=1)
    device = h200.device
    assert gpu.tensors(device.reserved_bytes + 1000 * (1 + device.allocator_share), h200) == pytest.approx(1000)
    assert gpu.tensors(1000, Cluster.local(1)) == 1000


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    bench = gpu.Bench("cuda", 4)
    found = bench.row("0.3b", "bf16", "plain")
    assert found.left_out is None
    assert abs(found.memory_error) < 0.15
    assert abs(found.time_error) < 0.3
    assert found.share is not None
    assert 0.1 < found.share < 1
