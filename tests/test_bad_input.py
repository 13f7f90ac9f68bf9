"""Bad input of all kinds: one line that says what is wrong, exit code 2, and nothing written.

With ``--hypothesis-profile long`` these are 5,500 cases; the loaders alone are also fuzzed (fuzz_loaders.py).
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import hypothesis
import mutations
import pytest
import safetensors.torch
import torch
from hypothesis import strategies as st

from weft.cli import run
from weft.errors import WeftError
from weft.runtime import agent
from weft.runtime.pool import Pool

MOST = hypothesis.settings.default.max_examples
FIXTURES = [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]

TINY = """
import torch
import weft


def workload(width: int = 4, rate: float = 0.1, deep: bool = False, batch_size: int = 4) -> weft.Workload:
    if width > 64:
        raise ValueError("too wide")
    rows = [(torch.zeros(width), torch.zeros(1)) for _ in range(8)]
    return weft.Workload(
        model=lambda: torch.nn.Sequential(torch.nn.Linear(width, 3), torch.nn.Linear(3, 1)),
        loss=lambda model, batch: ((model(batch[0]) - batch[1]) ** 2).mean(),
        data=rows,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate),
        predict=lambda model, batch: model(batch[0]),
        batch_size=batch_size,
    )


number = 3


def other(x):
    return x


class Kind:
    pass
"""


PLAN, CLUSTER = mutations.plan(), mutations.cluster()


class StartedError(WeftError):
    """Processes would have been started: all that was given was right."""

    exit_code = 0


def starts(*_: Any, **__: Any) -> None:
    raise StartedError("processes would be started")


Weft = Callable[[list[str]], tuple[int, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a target, a plan, a cluster and checkpoints in it. No processes are started."""
    (tmp_path / "tiny.py").write_text(TINY)
    (tmp_path / "valid.json").write_bytes(mutations.as_json(PLAN, random.Random(0)))
    (tmp_path / "valid.toml").write_bytes(mutations.as_toml(CLUSTER, random.Random(0)))
    mutations.checkpoint(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(agent, "run", starts)
    monkeypatch.setattr(Pool, "__init__", starts)
    monkeypatch.setattr("weft.jobs.serve.run", starts)
    return tmp_path


@pytest.fixture
def weft(folder: Path, capfd: pytest.CaptureFixture[str]) -> Weft:
    """Runs a command line and looks at what it says and leaves; its exit code and its line."""

    def command(arguments: list[str]) -> tuple[int, str]:
        before = content(folder)
        capfd.readouterr()
        code = run(arguments)
        said = capfd.readouterr().err
        assert code in (0, 2), (arguments, code, said)
        if code == 2:
            assert said.startswith("weft: "), (arguments, said)
            assert said.count("\n") == 1, (arguments, said)
            assert said[:-1].isprintable(), (arguments, said)
            assert content(folder) == before, arguments
        elif (after := content(folder)) != before:  # what was asked for; only a plan is written over
            assert set(after) >= set(before), arguments
            changed = {name for name in before if after[name] != before[name]}
            assert changed <= {"valid.json"}, (arguments, changed)
            for name in changed:
                (folder / name).write_bytes(cast(bytes, before[name]))
            for name in sorted(set(after) - set(before), reverse=True):
                (folder / name).rmdir() if after[name] is None else (folder / name).unlink()
        return code, said

    return command


def content(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder; None for what is no file."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


def cases(share: int) -> Callable[[Any], Any]:
    """So many cases of a hundred as hypothesis is set to; of few that are made in the suite, a third."""
    count = MOST * share // (100 if MOST > 100 else 300)
    return hypothesis.settings(max_examples=count, suppress_health_check=FIXTURES, database=None)


# -- files ------------------------------------------------------------------------------------------------------------


def put(path: Path, text: Callable[[Any, random.Random], bytes], valid: Any, rng: random.Random) -> None:
    """Something by the name of a file: mostly one of strange content, sometimes no file."""
    remove(path)
    how = rng.randrange(20)
    if how == 0:
        path.mkdir()
    elif how == 1:
        path.symlink_to(rng.choice(["/dev/null", "/nowhere", path.name, "/dev/zero", "/etc"]))
    elif how > 2:
        path.write_bytes(mutations.anything(valid, text, rng))


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@cases(100)
@hypothesis.given(rng=st.randoms(use_true_random=False), verb=st.sampled_from(["train", "verify", "predict"]))
def test_plan_files(folder: Path, weft: Weft, rng: random.Random, verb: str) -> None:
    put(folder / "plan.json", mutations.as_json, PLAN, rng)
    more = ["--output", "out.npy"] if verb == "predict" else []
    weft([verb, "tiny.py", "--plan", "plan.json", *more])


@cases(100)
@hypothesis.given(rng=st.randoms(use_true_random=False), verb=st.sampled_from(["plan", "train"]))
def test_cluster_files(folder: Path, weft: Weft, rng: random.Random, verb: str) -> None:
    put(folder / "cluster.toml", mutations.as_toml, CLUSTER, rng)
    weft(
        [verb, "tiny.py", "--cluster", "cluster.toml", "--steps", "1"]
        if verb == "train"
        else [verb, "tiny.py", "--cluster", "cluster.toml", "--no-what-if"]
    )


def spoil(step: Path, rng: random.Random) -> None:
    """Make something of a checkpoint's folder that no job would have left."""
    file, index = step / mutations.FILE, step / mutations.NAME
    how = rng.randrange(5)
    if how == 0:
        header, numbers = mutations.header(file)
        header_text = mutations.anything(header, mutations.as_json, rng)
        found = mutations.tensors(header_text, numbers)
        file.write_bytes(rng.choice([found, mutations.damaged(file.read_bytes(), rng)]))
    elif how == 1:
        put(rng.choice([file, index]), mutations.as_json, {}, rng)
    elif how == 2:
        where = rng.choice(["../valid.toml", "/etc/hostname", f"{mutations.FILE}/../x", "", "rank-00001.safetensors"])
        data = mutations.index(step)
        data["files"][where] = 10
        next(iter(data["tensors"].values()))["chunks"][0][0] = where
        index.write_bytes(mutations.as_json(mutations.signed(data), rng))
    else:
        data = mutations.changed(mutations.index(step), rng)
        if rng.random() < 0.5 and isinstance(data.get("files"), dict):
            data["files"] = {name: file.stat().st_size for name in data["files"]}
        index.write_bytes(mutations.as_json(mutations.signed(data), rng))


@cases(150)
@hypothesis.given(
    rng=st.randoms(use_true_random=False),
    arguments=st.sampled_from(
        [
            ["checkpoint", "show", "spoilt"],
            ["checkpoint", "show", "spoilt", "--tensors", "--json"],
            ["checkpoint", "show", "spoilt/step-00000000", "--tensors"],
            ["export", "spoilt", "exported"],
            ["export", "spoilt", "exported.safetensors", "--max-file", "10B"],
            ["import", "tiny.py", "spoilt/step-00000000/rank-00000.safetensors", "--checkpoint", "spoilt"],
            ["predict", "tiny.py", "--output", "out.npy", "--checkpoint", "spoilt"],
            ["train", "tiny.py", "--checkpoint", "spoilt", "--devices", "1"],
        ]
    ),
)
def test_checkpoints(folder: Path, weft: Weft, rng: random.Random, arguments: list[str]) -> None:
    remove(folder / "spoilt")
    shutil.copytree(folder / "saved", folder / "spoilt")
    spoil(folder / "spoilt" / "step-00000000", rng)
    weft(arguments)


# -- command lines ----------------------------------------------------------------------------------------------------

TARGETS = [
    "tiny.py", "tiny.py", "tiny.py:workload", "tiny.py:number", "tiny.py:other", "tiny.py:Kind", "tiny.py:nothing",
    "nowhere.py", "valid.json", "saved", ".", "", ":", "a:b:c", "..", "x/y.py", "os:getcwd", "builtins:max", "sys:exit",
    "json", "tiny.py:", "n" * 300, "n" * 300 + ".py", "\udcff.py", "é.py", "-", "[/x].py", "/", "valid.json/x.py",
]  # fmt: skip
ARGUMENTS = [
    "width=8", "width=", "width=x", "width=1.5", "width=" + "9" * 400, "width=" + "9" * 5000, "width=100", "rate=nan",
    "deep=perhaps", "deep=yes", "layers=2", "=", "==", "width", "a b=1", "rate=1e999", "width=0", "width=-1",
    "batch_size=0", "batch_size=-3", "batch_size=1000000", "é=1", "width=\x1b[31m", "rate=[/x]",
]  # fmt: skip
NUMBERS = [
    "1", "2", "3", "0", "-5", "1000000000", "9" * 30, "9" * 400, "9" * 5000, "1.5", "nan", "inf", "x", "", " ", "1e3",
    "0x10", "1_0", "٣",
]  # fmt: skip
PATHS = [
    "valid.json", "valid.toml", "saved", "nowhere", "tiny.py", ".", "", "/", "n" * 300, "a/b/c", "valid.json/x",
    "/dev/null", "/proc/self/x", "\udcff", "..", "out.json", "out.npy", "x\ny",
]  # fmt: skip
SIZES = [
    "2GiB", "1B", "0", "0GiB", "-1GiB", "1e400GiB", "9" * 400 + "GiB", "9" * 30, "2 apples", "GiB", "",
    ",", "1GiB,2GiB", "nan", "inf", "1.5.5GiB", "99999TiB", "1KiB",
]  # fmt: skip
WORDS = ["x", "", "gpipe", "full", "bf16", "float64", "inference", "memory", "\x1b[31m", "n" * 5000, "[/x]", "🦆"]
CLUSTERS = [
    "valid.toml", "valid.json", "h100-sxm", "h100-sxm:2x8", "h100-sxm:0", "h100-sxm:0x8", "abacus:2x8", "", ":", "+",
    "h100-sxm:99999999999x99999999999", "h100-sxm:2x8+", "a100-80:1x2+h100-sxm:1x2", "h100-sxm:" + "9" * 5000,
    "n" * 300, "h100-sxm:٣", "h100-sxm:1000000000",
]  # fmt: skip
MEETINGS = ["here:1", "here", ":", ":::", "here:99999", "here:-1", "here:x", "", "127.0.0.1:0", "[::1]:29400", "a b:1"]
COUNTS = ["1", "2", "2:4", "4:2", "0", ":", "2:", "9" * 5000, "1:2:3", "x", "-1", "²", "9" * 9]

DEGREES = {
    f"--{name}": NUMBERS for name in ("pp", "dp-replicate", "dp-shard", "cp", "tp", "ep", "microbatches", "zero")
} | {"--schedule": WORDS, "--recompute": WORDS, "--precision": WORDS}
MACHINE = {"--devices": NUMBERS, "--memory": SIZES, "--plan": PATHS, "--cluster": CLUSTERS}
FLAGS: dict[str, list[str]] = {"--json": [], "--verbose": []}
OPTIONS: dict[str, dict[str, list[str]]] = {
    "plan": DEGREES | MACHINE | FLAGS | {
        "--save": PATHS, "--html": PATHS, "--objective": WORDS, "--purpose": WORDS, "--prompt": NUMBERS,
        "--new-tokens": NUMBERS, "--batch": NUMBERS, "--price": NUMBERS,
    },
    "train": DEGREES | MACHINE | FLAGS | {
        "--steps": NUMBERS, "--checkpoint": PATHS, "--checkpoint-every": NUMBERS, "--keep": NUMBERS, "--resume": [],
        "--restarts": NUMBERS, "--nodes": COUNTS, "--rendezvous": MEETINGS, "--log-every": NUMBERS,
        "--device-check": WORDS,
    },
    "predict": DEGREES | MACHINE | FLAGS | {
        "--output": PATHS, "--input": PATHS, "--checkpoint": PATHS, "--limit": NUMBERS, "--resume": [],
        "--overwrite": [],
    },
    "verify": DEGREES | MACHINE | FLAGS | {"--steps": NUMBERS, "--dtype": WORDS},
    "compare": MACHINE | FLAGS | {"--steps": NUMBERS, "--recompute": WORDS, "--precision": WORDS, "--compile": []},
    "generate": DEGREES | MACHINE | FLAGS | {
        "--prompt": WORDS, "--prompt-tokens": [*NUMBERS, "1,2", "1,x", ","], "--max-new-tokens": NUMBERS,
        "--do-sample": [], "--temperature": NUMBERS, "--top-k": NUMBERS, "--top-p": NUMBERS, "--seed": NUMBERS,
        "--checkpoint": PATHS, "--tokenizer": PATHS,
    },
    "serve": DEGREES | MACHINE | FLAGS | {
        "--checkpoint": PATHS, "--tokenizer": PATHS, "--host": WORDS, "--port": NUMBERS,
        "--api-key": ["x", "@nowhere", "@.", "@"],
        "--served-model-name": WORDS, "--max-queue": NUMBERS, "--cache-tokens": NUMBERS, "--max-request": SIZES,
    },
    "cluster": {"--devices": NUMBERS, "--memory": SIZES, "--save": PATHS, "--plan": PATHS} | FLAGS,
    "launch": {"--devices": NUMBERS, "--memory": SIZES, "--nodes": NUMBERS, "--rendezvous": MEETINGS, "--verbose": []},
    "checkpoint show": {"--tensors": [], "--json": [], "--steps": NUMBERS},
    "export": {"--max-file": SIZES, "--json": []},
    "import": {"--checkpoint": PATHS, "--json": []},
    "weave": FLAGS,
}  # fmt: skip


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A verb, what it is about, and options with values that are mostly wrong."""
    verb = draw(st.sampled_from(sorted(OPTIONS)))
    found = verb.split()
    usual, about = ("saved", PATHS) if verb in ("export", "checkpoint show") else ("tiny.py", TARGETS)
    if verb != "cluster":
        found += draw(st.one_of(st.just([usual]), st.just([usual]), st.lists(st.sampled_from(about), max_size=2)))
    if verb in ("export", "import"):
        found.append(draw(st.sampled_from(PATHS)))
    if verb != "cluster" and draw(st.integers(0, 2)) == 0:
        found += draw(st.lists(st.sampled_from(ARGUMENTS), max_size=2))
    if verb == "predict" and draw(st.integers(0, 3)):
        found += ["--output", "out.npy"]
    for option in draw(st.lists(st.sampled_from(sorted(OPTIONS[verb])), max_size=3)):
        values = OPTIONS[verb][option]
        found += [option, draw(st.sampled_from(values))] if values else [option]
    odd = draw(st.integers(0, 19))
    if odd == 0:
        found.append(draw(st.sampled_from(["--loud", "--steps", "-x", "--", "---", "--devices=", "--json=1"])))
    if odd == 1:
        found.insert(
            draw(st.integers(0, len(found))), draw(st.text(st.characters(blacklist_characters="\0"), max_size=20))
        )
    return found


@cases(200)
@hypothesis.given(arguments=command_lines())
def test_command_lines(weft: Weft, arguments: list[str]) -> None:
    weft(arguments)


# -- what was found this way -------------------------------------------------------------------------------------------

NINES = "9" * 400
WEIGHTS = "model.safetensors"
FOUND = {
    "a plan thousands of lists deep": ["train", "tiny.py", "--plan", "deep.json"],
    "a style that is no text": ["train", "tiny.py", "--plan", "style.json"],
    "a key that is there twice": ["train", "tiny.py", "--plan", "twice.json"],
    "a cluster thousands of tables deep": ["plan", "tiny.py", "--cluster", "deep.toml"],
    "a number beyond floats": ["plan", "tiny.py", "--cluster", "huge.toml"],
    "a number that Python does not write": ["plan", "tiny.py", "--cluster", "hexadecimal.toml"],
    "a message that takes no time": ["plan", "tiny.py", "--cluster", "nan.toml"],
    "more memory than floats count": ["plan", "tiny.py", "--memory", f"{NINES}GiB"],
    "more processes than memory": ["train", "tiny.py", "--devices", "1000000000"],
    "more devices than memory": ["plan", "tiny.py", "--devices", "1000000000"],
    "more devices than there are": ["plan", "tiny.py", "--cluster", "h100-sxm:99999999999x99999999999"],
    "devices beyond lists": ["cluster", "--devices", NINES],
    "nodes of thousands of digits": ["train", "tiny.py", "--nodes", NINES * 20],
    "no place to meet": ["train", "tiny.py", "--nodes", "2", "--rendezvous", ":::"],
    "clients without end": ["bench", "serve", "tiny.py", "--clients", "inf"],
    "a target with too long a name": ["plan", NINES],
    "a target that says nothing": ["plan", "builtins:max"],
    "a target that leaves": ["plan", "sys:exit"],
    "an export with too long a name": ["export", "saved", NINES],
    "one file that can be written and one that cannot": ["plan", "tiny.py", "--save", "p.json", "--html", "no/p.html"],
    "a plan over the model": ["plan", "tiny.py", "--save", "tiny.py"],
    "a plan over a cluster": ["plan", "tiny.py", "--save", "valid.toml"],
    "a page over a plan": ["plan", "tiny.py", "--html", "valid.json"],
    "a dtype that is no text": ["export", "dtype", "out"],
    "a tensor of nothing and far too long": ["export", "long", "out"],
    "groups forty levels deep": ["export", "groups", "out"],
    "an index of weights that is no JSON": ["import", "tiny.py", "torn", "--checkpoint", "new"],
    "an index of weights without a map": ["import", "tiny.py", "empty", "--checkpoint", "new"],
    "an index of weights that is a list": ["import", "tiny.py", "listed", "--checkpoint", "new"],
    "weights in a number": ["import", "tiny.py", "numbered", "--checkpoint", "new"],
    "weights in another directory": ["import", "tiny.py", "above", "--checkpoint", "new"],
    "weights by an absolute name": ["import", "tiny.py", "absolute", "--checkpoint", "new"],
}


@pytest.fixture
def found(folder: Path) -> Path:
    """The files of FOUND."""
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "style.json").write_bytes(mutations.as_json({**PLAN, "tensor": {"0": {"style": []}}}, random.Random(0)))
    (folder / "twice.json").write_bytes(mutations.as_json(PLAN, random.Random(0)).replace(b"{", b'{"pp": 1, ', 1))
    (folder / "deep.toml").write_text("name = " + "[" * 100_000)
    toml = mutations.as_toml(CLUSTER, random.Random(0)).decode()
    (folder / "huge.toml").write_text(toml.replace("cores = 1.5", f"cores = {NINES}"))
    (folder / "hexadecimal.toml").write_text(toml.replace("cores = 1.5", f"host = 0x{NINES * 20}"))
    (folder / "nan.toml").write_text(toml.replace("latency_s = ", "busy_s = nan\nlatency_s = "))
    step = folder / "saved" / "step-00000000"
    changes: dict[str, Callable[[Any], object]] = {
        "dtype": lambda data: data["tensors"]["model.none"].update(dtype=[]),
        "long": lambda data: data["tensors"]["model.none"].update(shape=[0, 2**62, 2**62]),
        "groups": lambda data: data["groups"].append({"lr": "@fifty levels@"}),
        "odd": lambda data: data["tensors"].update({"[/red]\ud800\x1b[31m": data["tensors"].pop("model.none")}),
    }
    for name, change in changes.items():
        shutil.copytree(step, folder / name)
        data = mutations.index(step)
        change(data)
        text = json.dumps(mutations.signed(data)).replace('"@fifty levels@"', mutations.RAW["@fifty levels@"])
        (folder / name / mutations.NAME).write_text(text)
    safetensors.torch.save_model(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1)), folder / WEIGHTS)
    maps = {"numbered": 3, "above": f"../{WEIGHTS}", "absolute": str(folder / WEIGHTS)}
    indexes = {name: json.dumps({"weight_map": {"0.weight": file}}) for name, file in maps.items()}
    for name, text in {"torn": "{no", "empty": "{}", "listed": "[]", **indexes}.items():
        (folder / name).mkdir()
        (folder / name / f"{WEIGHTS}.index.json").write_text(text)
    return folder


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found(found: Path, weft: Weft, what: str) -> None:
    assert weft(FOUND[what])[0] == 2


def test_files_of_weights_may_be_links(found: Path) -> None:
    """As in a cache of downloads."""
    (found / "cache").mkdir()
    (found / "cache" / "model-00001.safetensors").symlink_to(found / WEIGHTS)
    index = {"weight_map": {"0.weight": "model-00001.safetensors", "0.bias": "model-00001.safetensors"}}
    (found / "blob").write_text(json.dumps(index))
    (found / "cache" / f"{WEIGHTS}.index.json").symlink_to(found / "blob")
    assert run(["import", "tiny.py", "cache", "--checkpoint", "new"]) == 0


def test_strange_names_are_told(found: Path, weft: Weft) -> None:
    assert weft(["checkpoint", "show", "odd", "--tensors"])[0] == 0
    (found / "odd" / mutations.FILE).unlink()
    assert weft(["checkpoint", "show", "odd", "--tensors"])[0] == 0
