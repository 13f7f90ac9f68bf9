"""The command line: exit codes, one line for what is wrong, JSON alone on stdout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from weft.cli import run
from weft.estimate import Estimate, Measurement
from weft.jobs.compare import Comparison, Row
from weft.jobs.train import Line
from weft.jobs.verify import Verification
from weft.plan import VERSION, Plan
from weft.report import tables
from weft.report.progress import Bar, TrainingLog, log_line, prediction_line

EXAMPLE = str(Path(__file__).parents[1] / "examples" / "code_lm.py")
SMALL = [EXAMPLE, "layers=1", "hidden=32", "heads=2", "context=16", "batch_size=4"]
WEFT = Callable[..., tuple[int, str, str]]


@pytest.fixture
def weft(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> WEFT:
    """Runs a command line in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, str, str]:
        code = run(arguments)
        said = capfd.readouterr()
        return code, said.out, said.err

    return command


def as_json(weft: WEFT, *arguments: str) -> Any:
    code, out, _ = weft(*arguments, "--json")
    assert code == 0
    return json.loads(out)  # and nothing else is there


BROKEN_PLAN = json.dumps({"version": VERSION, "pp": 1, "colour": "red"})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "nowhere.py"], "nowhere.py: no such file"),
        (["plan", EXAMPLE, "layers"], "'layers' is not of the form name=value, as in layers=4"),
        (["plan", EXAMPLE, "layer=2"], "did you mean layers=2?"),
        (["plan", EXAMPLE, "heads=0"], "ZeroDivisionError"),
        (["train", *SMALL, "--plan", "broken.json"], "broken.json: unknown key 'colour'"),
        (["train", *SMALL, "--plan", "none.json"], "none.json: cannot be read"),
        (["train", *SMALL, "--plan", "none.json", "--pp", "2"], "--plan none.json fixes everything and --pp 2"),
        (["train", *SMALL, "--resume"], "add --checkpoint DIR"),
        (["train", *SMALL, "--memory", "2 apples"], "unit 'apples' is unknown"),
        (["train", *SMALL, "--steps", "0"], "'--steps'"),
        (
            ["train", *SMALL, "--timeout", "0"],
            "--timeout must be above 0 s and at most 1e+06 s, got 0; leave it out for 120 s",
        ),
        (["plan", *SMALL, "--devices", "4", "--pp", "3"], "pp=3"),
        (["plan", *SMALL, "--devices", "4", "--pp", "4", "--tp", "2"], "multiply to 8"),
        (["plan", *SMALL, "--schedule", "zigzag"], "'zigzag' is unknown; choose from gpipe, 1f1b"),
        (["plan", *SMALL, "--devices", "2", "--memory", "10KiB"], "10.0 KiB"),
        (["plan", *SMALL, "--cluster", "abacus:2x8"], "'abacus:2x8' is neither a cluster file nor a preset"),
        (["plan", *SMALL, "batch_size=1", "--dp-replicate", "2", "--devices", "2"], "batch"),
        (["plan", *SMALL, "--devices", "2", "--html", "no/plan.html"], "name a file in a folder there is"),
        (["compare", *SMALL, "--devices", "1"], "at least 2 devices"),
        (["verify", *SMALL, "--dtype", "float12", "--devices", "1"], "float12"),
        (["launch", "nowhere.py"], "nowhere.py: no such file"),
        (["launch", EXAMPLE, "--nodes", "2"], "--rendezvous HOST:PORT"),
        (["weave"], "weave"),
        (["train", *SMALL, "--loud"], "--loud"),
        (["train"], "TARGET"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(weft: WEFT, tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "broken.json").write_text(BROKEN_PLAN)
    code, out, err = weft(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("weft: ")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["broken.json"]  # nothing was written


def test_plan_explains_and_saves(weft: WEFT, tmp_path: Path) -> None:
    code, out, err = weft("plan", *SMALL, "--devices", "2", "--dp-shard", "2", "--save", "plan.json")
    assert (code, err) == (0, "")
    assert out.startswith("Plan: dp_shard=2")
    assert Plan.load(tmp_path / "plan.json").degrees["dp_shard"] == 2
    assert weft("plan", *SMALL, "--devices", "2", "--html", "plan.html")[0] == 0
    assert (tmp_path / "plan.html").read_text().startswith("<!doctype html>")
    data = as_json(weft, "plan", *SMALL, "--cluster", "h100-sxm:2x8", "--devices", "8", "--memory", "4GiB")
    assert set(data) >= {"plan", "estimate", "alternatives", "refused", "capture_s", "search_s"}
    assert set(data["estimate"]) >= {"step_time_s", "peak_memory_bytes", "terms"}
    assert Plan.from_json(data["plan"]).devices == 8


def test_help_names_every_verb_and_every_choice(weft: WEFT) -> None:
    assert all(verb in weft()[1] for verb in ("plan", "train", "predict", "compare", "verify", "cluster", "launch"))
    code, out, _ = weft("verify", "--help")
    assert code == 0
    assert all(f"--{name}" in out for name in ("pp", "tp", "dp-replicate", "dp-shard", "microbatches", "schedule"))


PRINTS = f"""
import sys
sys.path.insert(0, {str(Path(EXAMPLE).parent)!r})
import code_lm
def workload():
    print("the user's own code prints")
    return code_lm.workload(layers=1, hidden=32, heads=2, context=16, batch_size=4)
"""


def test_train_on_two_processes(weft: WEFT, tmp_path: Path) -> None:
    (tmp_path / "prints.py").write_text(PRINTS)
    command = ["train", "prints.py", "--devices", "2", "--pp", "2", "--steps", "3", "--log-every", "2"]
    data = as_json(weft, *command, "--checkpoint", "kept")
    assert set(data) >= {"steps", "losses", "samples_per_s", "measured_step_s", "measured_peak_bytes", "plan"}
    assert (data["steps"], len(data["losses"]), len(data["measured_peak_bytes"])) == (3, 3, 2)
    plan = Plan.from_json(data["plan"])
    assert plan.pp == 2
    assert (tmp_path / "kept").is_dir()
    plan.save(tmp_path / "plan.json")
    command = ["train", "prints.py", "--plan", "plan.json", "--steps", "4", "--checkpoint", "kept", "--resume"]
    code, out, err = weft(*command, "--log-every", "1")
    assert (code, err) == (0, "")
    assert "the user's own code prints\n" in out
    assert "plan: pp=2" in out
    assert "step 4/4  loss " in out
    assert "step 3/4" not in out


@pytest.mark.long
def test_a_plan_with_unequal_shares_is_verified_and_trained(weft: WEFT, tmp_path: Path) -> None:
    plan = Plan.from_json(as_json(weft, "plan", *SMALL, "--devices", "2", "--dp-replicate", "2")["plan"])
    replace(plan, shares=(3, 1)).save(tmp_path / "plan.json")
    data = as_json(weft, "verify", *SMALL, "--plan", "plan.json", "--steps", "1")
    assert data["ok"]
    data = as_json(weft, "train", *SMALL, "--plan", "plan.json", "--steps", "2")
    assert data["plan"]["shares"] == [3, 1]


@pytest.mark.long
def test_verify_holds(weft: WEFT) -> None:
    data = as_json(weft, "verify", *SMALL, "--devices", "2", "--dp-replicate", "2", "--steps", "1")
    assert data["ok"] is True
    assert set(data) >= {"steps", "dtype", "loss_error", "gradient_error", "parameter_error", "parameter_bytes"}


@pytest.mark.long
def test_a_script_that_fails_is_one_line_and_exit_code_1(weft: WEFT, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import sys\nprint(sys.argv[1:])\nraise OSError('no disk')\n")
    code, out, err = weft("launch", "script.py", "--lr", "3", "--devices", "1", "x=2")
    assert (code, out) == (1, "['--lr', '3', 'x=2']\n")
    assert err == "weft: rank 0 failed: OSError: no disk (script.py:3 in <module>) (--verbose shows where)\n"
    code, _, err = weft("launch", "script.py", "--devices", "1", "--verbose")
    assert code == 1
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith("\nweft: rank 0 failed: OSError: no disk (script.py:3 in <module>)\n")


@pytest.mark.long
def test_compare_and_cluster(weft: WEFT, tmp_path: Path) -> None:
    data = as_json(weft, "compare", *SMALL, "--devices", "2", "--steps", "1")
    rows = {row["strategy"]: row for row in data["rows"]}
    assert list(rows) == ["one device", "data", "sharded data", "pipeline", "tensor", "hybrid", "chosen"]
    ran = [row for row in data["rows"] if row["reason"] is None]
    assert len(ran) >= 6
    assert all(row["loss_deviation"] < 1e-5 and row["measured_peak_bytes"] > 0 for row in ran)
    code, out, _ = weft("cluster", "--devices", "2", "--save", "here.toml")
    assert code == 0
    assert "matmul float32" in out
    assert as_json(weft, "plan", *SMALL, "--cluster", "here.toml")["estimate"]["calibration"] == "measured here"


def text_of(table: Any) -> str:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(table, soft_wrap=True)
    return captured.get()


def test_a_comparison_as_a_table() -> None:
    ran = Row(
        strategy="pipeline", degrees={"pp": 2, "tp": 1}, microbatches=8, predicted_step_s=0.1, measured_step_s=0.125,
        samples_per_s=256.0, predicted_peak_bytes=2**20, measured_peak_bytes=2**21, bytes_sent_per_step=1024.0,
        idle_share=0.25, losses=[3.0, 2.5], loss_deviation=1e-7,
    )  # fmt: skip
    refused = Row(strategy="one device", degrees={"pp": 1}, reason="needs 3.00 GiB of 2.00 GiB")
    plan = Plan(stages=(("a",),), batch_size=1)
    found = Comparison(chosen="pp=2", rows=[refused, ran], sentence="Best.", step_time_error=0.2, plan=plan)
    text = text_of(tables.comparison(found, steps=5))
    row = next(line for line in text.splitlines() if line.lstrip().startswith("pipeline"))
    assert " ".join(row.split()) == (
        "pipeline pp=2 x8 100 ms 125 ms 256.0 1.00 MiB 2.00 MiB 1.00 KiB 25% 2.5000 1.0e-07"
    )
    assert "one device was not run: needs 3.00 GiB of 2.00 GiB" in text
    assert "Best.\nPredicted step times were off by 20% on average." in text


def test_a_verification_as_a_table() -> None:
    found = Verification(
        ok=False, steps=3, dtype="float64", tolerance=1e-10, loss_error=1e-16, gradient_error=2e-3,
        parameter_error=3e-12, worst_gradient="a.weight", worst_parameter="b.bias", parameter_bytes=[1024, 2048],
        losses=[1.0],
    )  # fmt: skip
    text = text_of(tables.verification(found, plan="pp=2"))
    assert "2.0e-03     1e-10   a.weight" in text
    assert "1.00 KiB, 2.00 KiB" in text
    assert "does NOT" in text


def test_lines_while_training(capsys: pytest.CaptureFixture[str]) -> None:
    line = Line(
        step=9, steps=10, loss=2.0, gradient_norm=0.5, samples_per_s=100.0, samples_per_s_per_device=25.0,
        memory_bytes=[2**20, 2**22], left_s=2.0,
    )  # fmt: skip
    assert log_line(line) == (
        "step  9/10  loss 2.0000  gradient norm 0.5  100.0 samples/s (25.0 per device)  "
        "memory 1.00 MiB to 4.00 MiB per device  2.00 s left"
    )
    estimate = Estimate(
        step_time_s=0.9, time={}, memory=({"parameters": 2.0**20},), bytes_sent=0, idle_share=0, calibration="preset"
    )
    seen = Measurement(step_time_s=1.0, peak_memory_bytes=[2**21], bytes_sent=0, idle_share=0, samples_per_s=1)
    assert prediction_line(estimate, seen) == (
        "step time 900 ms predicted, 1.00 s measured (-10%); memory 1.00 MiB predicted, 2.00 MiB measured (-50%)"
    )
    log = TrainingLog()
    log.say("measuring")
    log.planned(Plan(stages=(("a",),), batch_size=4, microbatches=2), estimate)
    log.step(1, 2, 3.0)  # not a terminal: no bar
    log.close()
    with Bar() as bar:
        bar("measuring", 0, 2)
        bar("done", 2, 2)
    said = capsys.readouterr()
    assert said.out == "plan: one device, 2 microbatches; predicted 900 ms a step, 1.00 MiB on the fullest device\n"
    assert said.err == "measuring\n[1/2] measuring\n"
