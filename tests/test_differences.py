"""What training tells of an estimate that does not hold: the terms that are off, and no others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from weft.cli import run
from weft.cluster import Cluster
from weft.estimate import MEASURED, Difference, Estimate, Measurement, differences
from weft.report.progress import TrainingLog
from weft.runtime.stopwatch import Stopwatch

EXAMPLE = str(Path(__file__).parents[1] / "examples" / "code_lm.py")
MODEL = [EXAMPLE, "layers=4", "hidden=192", "heads=4", "context=64", "batch_size=16"]
NOTHING = dict.fromkeys(("compute", "tensor_parallel", "pipeline", "data_parallel", "bubble", "optimizer"), 0.0)


def predicted(**terms: float) -> Estimate:
    time = NOTHING | terms
    return Estimate(
        step_time_s=sum(time.values()), time=time, stage_time=(time,), memory=({"parameters": 100.0},),
        bytes_sent=0.0, idle_share=0.0, calibration="preset",
    )  # fmt: skip


def measured(memory: int = 100, **time: float) -> Measurement:
    step = sum(time.values())
    return Measurement(
        step_time_s=step, peak_memory_bytes=[memory], bytes_sent=0, idle_share=0.0, samples_per_s=1.0, time=time
    )


@pytest.mark.parametrize(
    ("estimate", "seen", "named"),
    [
        (predicted(compute=0.9), measured(compute=1.0), []),
        (predicted(compute=0.84), measured(compute=1.0), ["compute"]),
        (predicted(compute=1.2), measured(compute=1.0), ["compute"]),
        (predicted(compute=1.0, optimizer=0.01), measured(compute=1.0, optimizer=0.04), []),  # too little to matter
        (predicted(compute=1.0, optimizer=0.1), measured(compute=1.0, optimizer=0.4), ["optimizer"]),
        (
            predicted(compute=1.0, bubble=0.2, pipeline=0.1, data_parallel=0.5),
            measured(compute=1.0, waiting=0.6, communication=1.5, optimizer=0.0),
            ["communication", "waiting"],
        ),
        (predicted(compute=1.0, tensor_parallel=0.5), measured(compute=1.5, waiting=0.0), []),  # not told apart
        (predicted(compute=1.0), measured(compute=1.0, memory=120), ["memory"]),
    ],
)
def test_the_terms_that_are_off_are_named(estimate: Estimate, seen: Measurement, named: list[str]) -> None:
    assert [d.term for d in differences(estimate, seen)] == named


def test_terms_are_means_over_stages() -> None:
    stages = tuple(NOTHING | {"compute": seconds, "bubble": 2.0 - seconds} for seconds in (2.0, 1.0))
    estimate = replace(predicted(compute=2.0), stage_time=stages)
    assert differences(estimate, measured(compute=1.5, waiting=0.5)) == []
    assert differences(estimate, measured(compute=1.0, waiting=1.0))[0] == Difference("compute", 1.5, 1.0)


def test_a_stopwatch_counts_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 7.0, 10.0, 10.5])
    monkeypatch.setattr("weft.runtime.stopwatch.time.perf_counter", lambda: next(now))
    watch = Stopwatch(torch.device("cpu"))
    with watch.time("optimizer"):
        pass  # it is off
    watch.start()
    with watch.time("optimizer"), watch.time("waiting"):
        pass
    with watch.time("waiting"):
        pass
    assert watch.stop() == {"waiting": 2.5, "communication": 0.0, "optimizer": 5.0}


@pytest.mark.gpu
def test_a_stopwatch_times_what_a_gpu_does() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    watch, x = Stopwatch(torch.device("cuda")), torch.randn(4096, 4096, device="cuda")
    watch.start()
    with watch.time("optimizer"):
        for _ in range(50):
            x = x @ x.clamp(-1e-3, 1e-3)
        with watch.time("waiting"):
            pass
    torch.cuda.synchronize()
    spent = watch.stop()
    assert spent["optimizer"] > 50 * 2 * 4096**3 / 1e15  # no GPU does it faster
    assert spent["waiting"] < 0.1 * spent["optimizer"]


def off(report: dict[str, Any]) -> set[str]:
    """The terms of a training's report that are off, worked out from what it says was predicted and measured."""
    stages, seen = report["estimate"]["terms"]["stage_time_s"], report["measurement"]
    expected = {
        term: sum(stage[part] for stage in stages for part in parts) / len(stages) for term, parts in MEASURED.items()
    }
    pairs = [(term, expected[term], seen["time"][term], 0.05 * seen["step_time_s"]) for term in MEASURED]
    memory = max(report["estimate"]["peak_memory_bytes"]), max(seen["peak_memory_bytes"])
    return {term for term, p, m, least in [*pairs, ("memory", *memory, 0.0)] if abs(p - m) > max(0.15 * m, least)}


@pytest.mark.parametrize("degrees", [("--pp", "2"), ("--dp-shard", "2")], ids=["pp", "dp_shard"])
@pytest.mark.long
def test_a_wrong_cluster_file_is_told_by_its_term(
    degrees: tuple[str, str], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The rates of matrix products three times what they are, and as they are."""

    def train(*, factor: float) -> dict[str, Any]:
        (nodes,) = here.nodes
        rates = {dtype: curve.scaled(factor) for dtype, curve in nodes.device.matmul.items()}
        file = tmp_path / f"times{factor:.0f}.toml"
        replace(here, nodes=(replace(nodes, device=replace(nodes.device, matmul=rates)),)).save(file)
        command = ["train", *MODEL, "--devices", "2", *degrees, "--cluster", str(file), "--steps", "8", "--json"]
        assert run(command) == 0
        return json.loads(capfd.readouterr().out)

    assert run(["cluster", "--devices", "2", "--save", str(tmp_path / "here.toml")]) == 0
    here = Cluster.parse(str(tmp_path / "here.toml"))
    if len(here.nodes) > 1:  # a neighbour of this machine took a core while it was measured
        here = replace(here, nodes=(replace(here.nodes[0], devices=2, host=None),))
    capfd.readouterr()
    right, wrong = train(factor=1.0), train(factor=3.0)
    for report in (right, wrong):
        terms = report["measurement"]["time"]
        assert sum(terms.values()) == pytest.approx(report["measurement"]["step_time_s"], rel=0.2)
        assert {d["term"] for d in report["differences"]} == off(report)
    assert wrong["differences"][0]["term"] == "compute"
    assert wrong["differences"][0]["predicted"] < 0.75 * wrong["differences"][0]["measured"]


def test_the_line_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    TrainingLog().compared(predicted(compute=0.25), measured(compute=1.0, memory=50))
    assert capsys.readouterr().out.splitlines()[1] == (
        "off by more than 15%: compute 250 ms predicted, 1.00 s measured (-75%); "
        "memory 100 B predicted, 50 B measured (+100%)"
    )
