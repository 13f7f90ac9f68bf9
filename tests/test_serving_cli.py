"""``weft serve`` and ``weft bench serve``: a real model, divided, from the command line to its clients."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from weft.cli import run
from weft.jobs import bench
from weft.target import Target

EXAMPLE = str(Path(__file__).parents[1] / "examples" / "hf_llama.py")
SMALL = [EXAMPLE, "layers=2", "hidden=64", "batch_size=4"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server of the example over two stages, its cache too small for all at once."""
    plan = ["--devices", "2", "--pp", "2", "--microbatches", "2"]
    with bench.started([*SMALL, *plan, "--cache-tokens", "600", "--served-model-name", "llama"]) as found:
        yield found


def alone(prompts: list[str], new: int) -> list[str]:
    """What the library says, in one process, to one prompt after the other."""
    workload = Target.parse(EXAMPLE, {"layers": "2", "hidden": "64"}).load()
    torch.manual_seed(workload.seed)
    model = workload.model().eval()
    texts = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt.encode())])
        found = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        texts.append(bytes(found[0, ids.shape[1] :].tolist()).decode(errors="replace"))
    return texts


@pytest.mark.long
def test_requests_together_get_what_the_library_says_alone(url: str):
    prompts = ["import sys\n" * n + "def " for n in range(1, 8)] * 3

    async def all_of_them() -> list[str]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:

            async def one(prompt: str) -> str:
                body = {"model": "llama", "prompt": prompt, "max_tokens": 24, "temperature": 0}
                return (await http.post("/v1/completions", json=body)).json()["choices"][0]["text"]

            return await asyncio.gather(*map(one, prompts))

    assert asyncio.run(all_of_them()) == alone(prompts[:7], 24) * 3
    health = httpx.get(f"{url}/health").json()
    assert (health["cache_tokens"], health["cache_tokens_used"], health["restarts"]) == (600, 0, 0)


def test_bench_of_a_server(url: str, capfd: pytest.CaptureFixture[str]):
    arguments = ["--requests", "6", "--prompt-tokens", "8", "--new-tokens", "5", "--json"]
    assert run(["bench", "serve", url, "--clients", "1,3", "--rates", "20", *arguments]) == 0
    said = capfd.readouterr()
    found = json.loads(said.out)
    assert (found["model"], found["devices"]) == ("llama", 2)
    assert [(load["clients"], load["rate"]) for load in found["loads"]] == [(1, None), (3, None), (None, 20)]
    for load in found["loads"]:
        assert (load["requests"], load["failed"]) == (6, 0)
        assert load["tokens_per_s"] * load["seconds"] == pytest.approx(30)
        assert load["tokens_per_s_per_device"] == load["tokens_per_s"] / 2
        for spread in (load["first_token"], load["per_token"]):
            assert 0 < spread["p50"] <= spread["p99"] < load["seconds"]
    assert "3 clients" in said.err
    assert run(["bench", "serve", url, "--clients", "2", *arguments[:-1]]) == 0
    table = capfd.readouterr().out
    assert "llama on 2 devices; 8 tokens each, 5 new ones" in table
    assert "2 clients" in table


@pytest.mark.long
def test_a_server_that_is_told_to_end_leaves_nothing_behind(tmp_path: Path):
    path = json.dumps([p for p in sys.path if p])
    command = [sys.executable, "-c", bench.BOOTSTRAP, path, "serve", *SMALL, "--devices", "1", "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    ready: dict[str, Any] = json.loads(process.stdout.readline())
    assert (ready["model"], ready["devices"], ready["max_length"]) == ("hf_llama", 1, 128)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.terminate()
    assert process.wait(20) == 0
    process.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--api-key", "@nowhere"], "--api-key @nowhere: cannot be read"),
        (["--api-key", ""], "--api-key must be printable ASCII"),
        (["--host", "no such host"], "cannot listen at no such host:8000"),
        (["--port", "70000"], "--port"),
        (["--max-queue", "0"], "--max-queue"),
        (["--max-request", "many"], "many"),
        (["--tokenizer", "."], "name another with --tokenizer"),
        (["--plan", "none.json"], "none.json: cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], said: str
):
    monkeypatch.chdir(tmp_path)
    assert run(["serve", *SMALL, "--devices", "1", *arguments]) == 2
    heard = capfd.readouterr()
    assert heard.out == ""
    assert said in heard.err
    assert heard.err.count("\n") == 1


def test_a_port_that_is_taken_is_told(capfd: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(["serve", *SMALL, "--devices", "1", "--port", port]) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["http://127.0.0.1:9"], "no server that lists its models"),
        (["http://127.0.0.1:9", "--clients", "some"], "--clients some: write numbers above 0 with commas between"),
        (["http://127.0.0.1:9", "--clients", "0"], "--clients 0: write numbers above 0"),
        (["nowhere.py"], "the server did not start"),
    ],
)
def test_what_cannot_be_loaded_is_told(capfd: pytest.CaptureFixture[str], arguments: list[str], said: str):
    assert run(["bench", "serve", *arguments]) == 2
    assert said in capfd.readouterr().err
