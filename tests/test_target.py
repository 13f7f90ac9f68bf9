"""Targets: text to workload, and one clear line for what is wrong with the text."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.errors import InputError, TargetError
from weft.target import Target

FILE = """
from __future__ import annotations
from dataclasses import dataclass
import torch
import weft
import beside_the_target

@dataclass
class Options:
    width: int = 2

def workload(layers: int, *, rate: float = 0.5, bias: bool = False, name="x", depth: int | None = None, seed=7):
    assert beside_the_target.HERE
    if rate > 1:
        raise ValueError("a rate of " + str(rate) + "\\nis too high")
    if seed == 0:
        return None
    made = weft.Workload(
        model=lambda: torch.nn.Linear(layers, layers, bias=bias), loss=lambda model, batch: model(batch).sum(),
        data=torch.ones(4, layers), optimizer=lambda p: torch.optim.SGD(p, lr=rate), batch_size=2, seed=seed,
        units=[name, str(depth)])
    return made

def bad_size():
    return weft.Workload(model=lambda: None, loss=len, data=[1], optimizer=len, batch_size=0)

NUMBER = 3
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "beside_the_target.py").write_text("HERE = True\n")
    path = tmp_path / f"target_{abs(hash(tmp_path))}.py"  # modules are imported once per process
    path.write_text(FILE)
    return path


def test_arguments_take_the_types_of_the_parameters(file: Path) -> None:
    arguments = {"layers": "3", "rate": "1", "bias": "yes", "name": "4", "depth": "none", "seed": "9"}
    workload = Target.parse(str(file), arguments).load()
    assert workload.model().bias is not None
    assert workload.data.shape == (4, 3)
    assert (workload.units, workload.seed) == (["4", "None"], 9)
    assert Target.parse(f"{file}:workload", {"layers": "1", "depth": "2"}).load().units == ["x", "2"]


def test_a_module_name_is_a_target_too(file: Path) -> None:
    assert Target.parse(f"{file.stem}:workload", {"layers": "1"}).load().batch_size == 2


@pytest.mark.parametrize(
    ("end", "arguments", "said"),
    [
        ("", {}, r"workload\(\) needs a value for layers; add layers=VALUE$"),
        ("", {"layers": "four"}, "layers=four is not of type int; write for example layers=4$"),
        ("", {"layers": "1", "bias": "maybe"}, "bias=maybe is not of type bool; write for example bias=true$"),
        ("", {"layer": "4"}, r"workload\(\) has no argument 'layer'; did you mean layers=4\?$"),
        ("", {"q": "4"}, r"has no argument 'q'; it takes layers, rate, bias, name, depth, seed$"),
        ("", {"layers": "1", "rate": "2"}, r"raised ValueError: a rate of 2.0 is too high \(target_\d+\.py:15\)$"),
        ("", {"layers": "1", "seed": "0"}, r"returned NoneType; it must return a weft.Workload$"),
        (":workloads", {}, r"has no function 'workloads'; did you mean .*target_\d+\.py:workload\?$"),
        (":other_thing", {}, r"has no function 'other_thing'; define `def other_thing\(\) -> weft.Workload`$"),
        (":NUMBER", {}, "NUMBER is a int, not a function"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(file: Path, end: str, arguments: dict[str, str], said: str) -> None:
    with pytest.raises(TargetError, match=said) as caught:
        Target.parse(f"{file}{end}", arguments).load()
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_broken(file: Path, tmp_path: Path) -> None:
    for text, said in [
        (str(file)[:-4] + ".py", r"no such file; did you mean .*target_\d+\.py\?"),
        (str(tmp_path / "zzz.py"), "no such file; give the path of a Python file"),
        ("no_such_module_here:workload", "no module of this name"),
        ("file.py:not a name", "is not file.py, file.py:name or package.module:name"),
    ]:
        with pytest.raises(TargetError, match=said):
            Target.parse(text).load()
    for name, source, said in [
        ("raises", "import weft\nraise KeyError('gone')\n", r"raised KeyError: 'gone' \(raises_here.py:2\)$"),
        ("broken", "def workload(:\n", r"importing it raised SyntaxError: .* \(.*broken_here\.py:1\)$"),
        ("needs", "import not_installed_here\n", "raised ModuleNotFoundError: No module named 'not_installed_here'"),
    ]:
        path = tmp_path / f"{name}_here.py"
        path.write_text(source)
        with pytest.raises(TargetError, match=said):
            Target.parse(str(path)).load()


def test_an_error_of_wefts_own_stays_as_it_is(file: Path) -> None:
    with pytest.raises(InputError, match=r"^Workload.model|^Workload.batch_size"):
        Target.parse(f"{file}:bad_size").load()
