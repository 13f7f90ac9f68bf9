"""A directory as Hugging Face has them, from the command line to a client: the text is that of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import transformers as tf
from directories import save

from weft.cli import run
from weft.jobs import bench

PROMPTS = ["import os", "def main():\n    return ", "class A(Exception):"]
NEW = 24


@dataclass
class Library:
    """What transformers makes of the directory, in one process."""

    path: Path

    def __post_init__(self) -> None:
        self.words = tf.AutoTokenizer.from_pretrained(self.path)
        self.model = tf.AutoModelForCausalLM.from_pretrained(self.path)

    def text(self, prompt: list[int]) -> str:
        ids = torch.tensor([prompt])
        settings: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        found = self.model.generate(ids, max_new_tokens=NEW, **settings)
        return self.words.decode(found[0, len(prompt) :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    found = Library(save(tmp_path_factory.mktemp("models") / "tiny-llama"))
    assert len(list(found.path.glob("*.safetensors"))) >= 3
    return found


@pytest.fixture(scope="module")
def client(library: Library) -> Iterator[openai.OpenAI]:
    """Of a server of two stages."""
    with (
        bench.started([str(library.path), "--devices", "2", "--pp", "2"]) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found,
    ):
        yield found


@pytest.mark.long
def test_the_server_completes_and_chats_as_the_library(client: openai.OpenAI, library: Library):
    (model,) = client.models.list().data
    assert model.id == "tiny-llama"
    asked: dict[str, Any] = {"model": model.id, "max_tokens": NEW, "temperature": 0}
    for prompt in PROMPTS:
        expected = library.text(library.words.encode(prompt))
        assert client.completions.create(prompt=prompt, **asked).choices[0].text == expected
        chunks = list(client.completions.create(prompt=prompt, stream=True, **asked))
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected
        stop = expected[8:10]
        found = client.completions.create(prompt=prompt, stop=stop, **asked).choices[0]
        assert (found.text, found.finish_reason) == (expected[: expected.index(stop)], "stop")
    messages: Any = [{"role": "user", "content": "hello there"}]
    prompt = library.words.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    answer = client.chat.completions.create(messages=messages, **asked)
    assert answer.choices[0].message.content == library.text(prompt)
    assert answer.usage.prompt_tokens == len(prompt)


@pytest.mark.long
def test_generate_says_what_the_library_says(library: Library, capfd: pytest.CaptureFixture[str]):
    asked = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    divided = ["--devices", "2", "--tp", "2", "--max-new-tokens", str(NEW), "--json"]
    assert run(["generate", str(library.path), *asked, *divided]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["texts"] == [library.text(library.words.encode(prompt)) for prompt in PROMPTS]


def test_it_is_planned_for(library: Library, capfd: pytest.CaptureFixture[str]):
    lengths = ["--prompt", "20", "--new-tokens", "10", "--batch", "4"]
    assert run(["plan", str(library.path), "--devices", "2", "--purpose", "inference", *lengths]) == 0
    assert "first token" in capfd.readouterr().out
