"""``weft generate``: text after a prompt, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from weft.cli import run
from weft.target import Target

EXAMPLE = str(Path(__file__).parents[1] / "examples" / "hf_llama.py")
SMALL = [EXAMPLE, "layers=2", "hidden=64"]


def alone(prompt: str, tokens: int) -> list[int]:
    workload = Target.parse(EXAMPLE, {"layers": "2", "hidden": "64"}).load()
    torch.manual_seed(workload.seed)
    ids = torch.tensor([list(prompt.encode())])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = workload.model().eval().generate(ids, max_new_tokens=tokens, **settings)
    return found[0, ids.shape[1] :].tolist()


@pytest.mark.long
def test_what_is_generated_is_what_one_device_generates(capfd: pytest.CaptureFixture[str]):
    prompts = ["import sys", "d"]
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert run(["generate", *SMALL, "--devices", "2", "--pp", "2", *asked, "--max-new-tokens", "9", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["tokens"] == [alone(prompt, 9) for prompt in prompts]
    assert found["texts"] == [bytes(tokens).decode(errors="replace") for tokens in found["tokens"]]
    assert found["plan"]["pp"] == 2


@pytest.mark.long
def test_the_text_of_one_prompt_comes_as_it_is_generated(capfd: pytest.CaptureFixture[str]):
    assert run(["generate", *SMALL, "--devices", "1", "--prompt", "import sys", "--max-new-tokens", "6"]) == 0
    assert capfd.readouterr().out == bytes(alone("import sys", 6)).decode(errors="replace") + "\n"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "there is no prompt"),
        (["--prompt", ""], "a prompt is empty"),
        (["--prompt-tokens", "1,x"], "write token ids with commas between"),
        (["--prompt", "a", "--max-new-tokens", "1000"], "the model has 128 positions"),
        (["--prompt", "a", "--temperature", "0"], "temperature must be above 0"),
        (["--prompt-tokens", "300"], "outside the model's vocabulary of 256"),
        (["--prompt", "a", "--pp", "9", "--devices", "9"], "pp=9"),
    ],
)
@pytest.mark.matrix
def test_what_is_wrong_is_told_in_a_line(capfd: pytest.CaptureFixture[str], arguments: list[str], what: str):
    fewer = [] if "--max-new-tokens" in arguments else ["--max-new-tokens", "4"]
    devices = [] if "--devices" in arguments else ["--devices", "1"]
    assert run(["generate", *SMALL, *arguments, *fewer, *devices]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("weft: ")
    assert what in error


def test_a_target_without_tokenizer_takes_token_ids(capfd: pytest.CaptureFixture[str], tmp_path: Path):
    target = tmp_path / "target.py"
    target.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(EXAMPLE).parent)!r})\n"
        "import hf_llama\n\ndef workload():\n    return hf_llama.workload(layers=2, hidden=64)\n"
    )
    assert run(["generate", str(target), "--prompt", "a", "--devices", "1"]) == 2
    assert "no tokenizer" in capfd.readouterr().err
    asked = ["--prompt-tokens", "97,98", "--max-new-tokens", "4", "--devices", "1", "--json"]
    assert run(["generate", str(target), *asked]) == 0
    assert json.loads(capfd.readouterr().out)["tokens"] == [alone("ab", 4)]
