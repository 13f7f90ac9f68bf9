"""weft predict: files of predictions from real processes, also from ones that are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

import weft
from weft.cli import run
from weft.cluster import Cluster
from weft.errors import InputError, TargetError
from weft.jobs.predict import Order, plan_for, predict_here
from weft.runtime.pool import Pool
from weft.target import Target

EXAMPLE = str(Path(__file__).parents[1] / "examples" / "code_lm.py")
SMALL = {"layers": "2", "hidden": "32", "heads": "2", "context": "16", "batch_size": "4"}
SAMPLES = 30  # the last batch has two


class Quiet:
    """A watcher that says nothing."""

    def planned(self, plan: weft.Plan) -> None: ...
    def resumed(self, done: int, samples: int) -> None: ...
    def progress(self, done: int, samples: int) -> None: ...
    def publishing(self, output: str) -> None: ...
    def close(self) -> None: ...


def plan_of(target: Target, **degrees: int) -> weft.Plan:
    return plan_for(target.load(), Cluster.local(devices=int(np.prod([*degrees.values()]))), degrees)


def columns(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    table = pq.read_table(path)
    return {name: table[name].combine_chunks().to_numpy_ndarray() for name in table.column_names}


def on_one_device(workload: weft.Workload, samples: int) -> dict[str, Tensor]:
    assert workload.predict is not None
    torch.manual_seed(workload.seed)
    model = workload.model().eval()
    with torch.no_grad():
        found: dict[str, Tensor] = workload.predict(model, workload.batch_of(range(samples)))
    return found


@pytest.mark.parametrize("degrees", [{"dp_replicate": 2}, {"pp": 2}, {"pp": 2, "dp_replicate": 2}, {"dp_shard": 2}])
def test_a_file_has_the_predictions_of_one_device(pool: Pool, tmp_path: Path, degrees: dict[str, int]) -> None:
    target = Target.parse(EXAMPLE, SMALL)
    order = Order(plan=plan_of(target, **degrees), output=str(tmp_path / "out.parquet"), limit=SAMPLES)
    result = pool.run(predict_here, target, order, Quiet(), ranks=order.plan.devices)[0]
    expected = on_one_device(target.load(), SAMPLES)
    found = columns(tmp_path / "out.parquet")
    assert np.allclose(found["log_likelihood"], expected["log_likelihood"].numpy(), rtol=0, atol=1e-5)
    assert np.array_equal(found["guess"], expected["guess"].numpy())
    assert (result.samples, result.first_sample) == (SAMPLES, 0)
    assert json.loads(json.dumps(result.to_json()))["columns"]["guess"] == {"dtype": "uint8", "shape": [16]}
    assert os.listdir(tmp_path) == ["out.parquet"]
    order = Order(plan=order.plan, output=order.output, limit=SAMPLES, resume=True)
    assert pool.run(predict_here, target, order, Quiet(), ranks=order.plan.devices)[0].samples_per_s is None


def train_and_predict(target: Target, plan: weft.Plan, folder: str) -> dict[str, Tensor]:
    workload = target.load()
    engine = weft.parallelize(workload, plan)
    engine.step(workload.batch_of(range(4)))
    engine.save(folder)
    found: dict[str, Tensor] = engine.predict(workload.batch_of(range(6)))
    return found


def test_weights_of_a_checkpoint(pool: Pool, tmp_path: Path) -> None:
    target, folder = Target.parse(EXAMPLE, SMALL), str(tmp_path / "kept")
    expected = pool.run(train_and_predict, target, plan_of(target, pp=2), folder, ranks=2)[0]
    order = Order(plan=plan_of(target, tp=2), output=str(tmp_path / "a.parquet"), checkpoint=folder, limit=6)
    pool.run(predict_here, target, order, Quiet(), ranks=2)
    found = columns(tmp_path / "a.parquet")["log_likelihood"]
    assert np.allclose(found, expected["log_likelihood"].numpy(), rtol=0, atol=1e-5)
    assert not np.allclose(found, on_one_device(target.load(), 6)["log_likelihood"].numpy(), rtol=0, atol=1e-3)


SLOW = """
import time
from pathlib import Path
import torch
import weft
from weft.inference import results
results.PART_BYTES = 0  # a part for every batch

class Numbers:
    def __init__(self, path, seconds):
        self.numbers, self.seconds = torch.tensor([float(x) for x in Path(path).read_text().split()]), seconds
    def __len__(self):
        return len(self.numbers)
    def __getitem__(self, i):
        time.sleep(self.seconds)
        return self.numbers[i].expand(8)

def workload(input: str, seconds: float = 0.0):
    return weft.Workload(
        model=lambda: torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)),
        predict=lambda model, batch: model(batch), data=Numbers(input, seconds), batch_size=4)
"""


@pytest.mark.long
def test_killed_and_resumed(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "numbers.txt").write_text("\n".join(map(str, range(50))))
    target = Target.parse("slow.py").taking(Path("numbers.txt"))
    whole = Order(plan=plan_of(target, dp_replicate=2), output="whole.npy")
    whole.plan.save(tmp_path / "plan.json")
    result = pool.run(predict_in, str(tmp_path), target, whole, ranks=2)[0]
    assert result.samples == 50
    given = ["predict", "slow.py", "--input", "numbers.txt", "--plan", "plan.json", "--output", "out.npy"]
    command = [sys.executable, "-c", "from weft.cli import main; main()", *given]
    # The first run is slow: what it is told by is no argument of the target's, which would be another run's.
    slow = SLOW.replace("seconds: float = 0.0", "seconds: float = 0.1")
    (tmp_path / "slow.py").write_text(slow)
    started = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    folder = tmp_path / "out.npy.parts"
    try:
        deadline = time.monotonic() + 120
        while len(list(folder.glob("part-*.npy"))) < 3:
            assert started.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.kill(started.pid, signal.SIGKILL)
        started.wait()
    (tmp_path / "slow.py").write_text(SLOW)
    time.sleep(0.5)  # what it had started ends with it
    parts = sorted(folder.glob("part-*.npy"))
    done = sum(len(np.load(part)) for part in parts)
    assert 12 <= done < 50
    expected = np.load("whole.npy")
    assert np.array_equal(np.concatenate([np.load(part) for part in parts]), expected[:done])
    shutil.copytree(folder, "other.npy.parts")
    order = Order(plan=plan_of(target, pp=2), output="other.npy", resume=True)
    result = pool.run(predict_in, str(tmp_path), target, order, ranks=2)[0]  # under another plan
    assert result.first_sample == done
    assert np.allclose(np.load("other.npy"), expected, rtol=0, atol=1e-6)
    assert run([*given]) == 2  # neither --resume nor --overwrite
    assert run([*given, "--resume"]) == 0
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert not folder.exists()


def predict_in(folder: str, target: Target, order: Order) -> Any:
    """predict_here in a folder, where a target of this name has not been imported."""
    before = os.getcwd()
    os.chdir(folder)
    sys.modules.pop("slow", None)
    try:
        return predict_here(target, order, Quiet())
    finally:
        os.chdir(before)


def test_what_cannot_be_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trains.py").write_text(SLOW.replace("predict=lambda model, batch: model(batch), ", ""))
    (tmp_path / "numbers.txt").write_text("1\n")
    before = sorted(os.listdir())
    small = [EXAMPLE, *(f"{name}={value}" for name, value in SMALL.items()), "--devices", "2"]
    for arguments, said in [
        (small, "--output"),
        ([*small, "--output", "a.csv"], "written as .parquet or .npy"),
        ([*small, "--output", "no/a.npy"], "no folder no"),
        ([*small, "--output", "a.npy", "--resume", "--overwrite"], "leave one of them out"),
        ([*small, "--output", "a.npy", "--input", "numbers.txt"], "workload() takes no input; give it a parameter"),
        ([*small, "--output", "a.npy", "--input", "none.txt"], "--input none.txt: no such file"),
        ([*small, "--output", "a.npy", "--checkpoint", "none"], "holds no complete checkpoint"),
        (["trains.py", "--output", "a.npy", "--input", "numbers.txt"], "give it predict=lambda model, batch"),
    ]:
        assert run(["predict", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert [name for name in sorted(os.listdir()) if name != "__pycache__"] == before
    with pytest.raises(TargetError, match="say the same"):
        Target.parse("trains.py", {"input": "numbers.txt"}).taking(Path("numbers.txt"))
    with pytest.raises(InputError, match="limit must be at least 1"):
        Order(plan=weft.Plan(stages=(("a",),), batch_size=1), output="a.npy", limit=0)
