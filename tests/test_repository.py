"""What the repository promises about itself: sizes, rooms, and that every command it shows is one that is run."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
from torch import nn

import weft

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
LIBRARY = sorted((ROOT / "weft").rglob("*.py"))
LINES_OF_LIBRARY = 38_000
LINES_OF_FILE = 350
HEAVY = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "sympy",
    "transformers",
    "pyarrow",
    "keras",
    "fastapi",
    "uvicorn",
    "jinja2",
)
"""What only some commands and some plans need, and takes long to import."""
ALSO_HEAVY = {
    "weft": ("torch", "numpy"),
    "weft.runtime.worker": ("weft.capture", "weft.planner", "weft.inference", "weft.runtime.engine"),
    "weft.engines": ("weft.planner", "weft.serving"),
    "weft.cli": (),
}
"""Modules that processes begin with, and what they do without besides."""


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def blocks(language: str, text: str = README) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(script: str) -> list[list[str]]:
    """The words of each command in a shell script; comments are none."""
    split = [shlex.split(line, comments=True) for line in script.splitlines()]
    return [words for words in split if words]


def shows(words: list[str]) -> tuple[list[str], set[str], set[str]]:
    """A command's leading words, its flags, and the scripts it names."""
    argument = next((i for i, word in enumerate(words) if word.startswith("-") or "=" in word), len(words))
    scripts = {word for word in words if word.endswith(".py")}
    return words[:argument], {word for word in words if word.startswith("--")}, scripts


def runs(command: list[str], candidate: list[str]) -> bool:
    """Whether the candidate is the command, perhaps with other values and more flags."""
    leading, flags, scripts = shows(command)
    return candidate[: len(leading)] == leading and flags <= set(candidate) and scripts <= set(candidate)


def imports(path: Path) -> set[str]:
    """Modules a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def tracked() -> list[Path]:
    """Files that are, or would be, under version control."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def test_library_keeps_its_budget_of_lines():
    assert sum(len(lines(path)) for path in LIBRARY) <= LINES_OF_LIBRARY


def test_no_file_of_the_library_is_long():
    assert {str(path.relative_to(ROOT)): n for path in LIBRARY if (n := len(lines(path))) > LINES_OF_FILE} == {}


def test_no_drawer():
    assert [path for path in LIBRARY if path.stem in ("utils", "util", "helpers", "misc", "common")] == []


@pytest.mark.parametrize(("room", "other"), [("planner", "runtime"), ("runtime", "planner")])
def test_planner_and_runtime_meet_in_the_plan_only(room: str, other: str):
    wrong = {
        path.name for path in (ROOT / "weft" / room).glob("*.py") if any(f"weft.{other}" in m for m in imports(path))
    }
    assert wrong == set()


def test_planner_is_pure_numbers():
    wrong = {
        path.name
        for path in (ROOT / "weft" / "planner").glob("*.py")
        if any(m.startswith("torch") for m in imports(path))
    }
    assert wrong == set()


@pytest.mark.parametrize("module", ALSO_HEAVY)
def test_what_is_heavy_is_imported_where_it_is_needed(module: str):
    heavy = [*HEAVY, *ALSO_HEAVY[module]]
    code = f"import sys, {module}; print(*(name for name in {heavy} if name in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert loaded.split() == []


def test_public_names_are_what_type_checkers_read():
    tree = ast.parse((ROOT / "weft" / "__init__.py").read_text())
    read = {
        alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert sorted(weft.__all__) == sorted(name for name, module in read.items() if (module or "").startswith("weft."))
    for name in weft.__all__:
        assert getattr(weft, name) is getattr(importlib.import_module(str(read[name])), name)
    assert set(weft.__all__) <= set(dir(weft))
    with pytest.raises(AttributeError, match="nothing"):
        _ = weft.nothing


def test_the_function_plan_hides_the_module_it_shares_its_name_with():
    code = "from weft.plan import Plan; import weft; assert callable(weft.plan) and weft.plan.__name__ == 'plan'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"# type: ignore(\[[\w, -]+\])?\s*$", "a type error is ignored without a reason beside it"),
        (r"\b(TODO|FIXME|XXX)\b", "something is left to do"),
        (r"except (Base)?Exception\b[^#]*$", "everything is caught without a reason beside it"),
        (r"except:\s", "everything is caught"),
    ],
)
def test_the_library_says_why(pattern: str, why: str):
    wrong = [
        f"{path.relative_to(ROOT)}:{n}"
        for path in LIBRARY
        for n, line in enumerate(lines(path), 1)
        if re.search(pattern, line)
    ]
    assert wrong == [], why


@pytest.mark.parametrize("command", commands("\n".join(blocks("sh"))), ids=shlex.join)
def test_every_command_of_the_readme_is_run(command: list[str]):
    assert any(runs(command, candidate) for candidate in commands((ROOT / ".ci" / "run").read_text()))


def test_the_loop_in_the_readme_is_the_example():
    example = (ROOT / "examples" / "own_loop.py").read_text()
    code = example[example.index('"""\n\n') + 5 :]
    assert code in blocks("python")


def test_the_workload_in_the_readme_is_one(monkeypatch: pytest.MonkeyPatch):
    mine = ModuleType("mine")
    mine.MyModel = lambda layers: nn.Linear(layers, layers)
    mine.MyData = lambda: [{"x": 0.0, "y": 0.0}]
    monkeypatch.setitem(sys.modules, "mine", mine)
    names: dict[str, object] = {}
    exec(blocks("python")[0], names)
    assert isinstance(names["workload"](), weft.Workload)


def test_pictures_and_links_of_the_documents_are_there():
    for document in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text()):
            assert "://" in target or (ROOT / target).exists(), f"{document}: {target}"
    for picture in (ROOT / "docs").glob("*.svg"):
        ElementTree.parse(picture)


def test_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == weft.__version__
    assert f"## {weft.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_nothing_names_the_machine_it_was_written_on():
    places = re.compile("/" + "(work|root|home/[a-z]+|tmp/exp)" + "/")
    texts = [path for path in tracked() if path.suffix not in (".png", ".gif")]
    wrong = [str(path.relative_to(ROOT)) for path in texts if places.search(path.read_text(errors="replace"))]
    assert wrong == []
