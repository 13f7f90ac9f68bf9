"""A running server, as OpenAI's own client and others talk to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from reference_decoder import ReferenceDecoder, alone
from serving import KEY, MODEL, Bytes, Running, job_processes, server

from weft.errors import InputError
from weft.inference.sampling import Sampling
from weft.serving.decoder import Request

TOKENIZER = Bytes()


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with server(ReferenceDecoder, devices=2, tokenizer=TOKENIZER, largest_bytes=20_000) as found:
        yield found
    assert job_processes() == []


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def decoder() -> ReferenceDecoder:
    return ReferenceDecoder()


def expected(decoder: ReferenceDecoder, prompt: str, new: int, **more: Any) -> str:
    """The text of one request that one process decodes by itself."""
    sampling = Sampling(**more)
    request = Request(
        id=0, prompt=tuple(prompt.encode()), max_new_tokens=new, sampling=sampling, stop_token_ids=TOKENIZER.ends
    )
    tokens = alone(decoder, request)
    return TOKENIZER.decode(tokens[:-1] if tokens[-1] in TOKENIZER.ends else tokens)


@pytest.mark.long
def test_a_completion_is_the_text_of_one_process(client: openai.OpenAI, decoder: ReferenceDecoder):
    found = client.completions.create(model=MODEL, prompt="def main", max_tokens=20, temperature=0)
    assert found.choices[0].text == expected(decoder, "def main", 20)
    assert found.choices[0].finish_reason == "length"
    assert found.usage.prompt_tokens == 8
    assert found.usage.completion_tokens == 20
    assert found.usage.total_tokens == 28


def test_a_prompt_may_be_token_ids(client: openai.OpenAI, decoder: ReferenceDecoder):
    for prompt in (list(b"def main"), [list(b"def main")], ["def main"]):
        found = client.completions.create(model=MODEL, prompt=prompt, max_tokens=20, temperature=0)
        assert found.choices[0].text == expected(decoder, "def main", 20)


def test_a_stream_is_the_same_text_in_pieces(client: openai.OpenAI, decoder: ReferenceDecoder):
    options = {"include_usage": True}
    chunks = list(
        client.completions.create(
            model=MODEL, prompt="import", max_tokens=20, temperature=0, stream=True, stream_options=options
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected(decoder, "import", 20)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 20 + ["length"]
    assert chunks[-1].usage.completion_tokens == 20


def test_a_chat(client: openai.OpenAI, decoder: ReferenceDecoder):
    messages: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    text = expected(decoder, "system: be brief\nuser: hello\n", 16)
    found = client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=16, temperature=0)
    assert found.choices[0].message.content == text
    assert found.choices[0].message.role == "assistant"
    with client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=16, temperature=0, stream=True
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_a_chat_goes_on_as_long_as_there_is_room(client: openai.OpenAI):
    found = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x"}], extra_body={"ignore_eos": True}
    )
    assert found.usage.total_tokens == 256


def test_text_ends_before_a_stop_string(client: openai.OpenAI, decoder: ReferenceDecoder):
    whole = expected(decoder, "class A", 30)
    stop = whole[10:13]
    for stream in (False, True):
        found = client.completions.create(
            model=MODEL, prompt="class A", max_tokens=30, temperature=0, stop=[stop, "\x00none"], stream=stream
        )
        chunks: Any = list(found) if stream else [found]
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole[: whole.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_text_ends_at_a_stop_token(client: openai.OpenAI, decoder: ReferenceDecoder):
    request = Request(id=0, prompt=tuple(b"class A"), max_new_tokens=30)
    tokens = alone(decoder, request)
    found = client.completions.create(
        model=MODEL, prompt="class A", max_tokens=30, temperature=0, extra_body={"stop_token_ids": [tokens[12]]}
    )
    at = tokens.index(tokens[12])
    assert found.choices[0].text == TOKENIZER.decode(tokens[:at])
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens == at + 1


def test_a_seed_gives_the_same_again(client: openai.OpenAI, decoder: ReferenceDecoder):
    def text(**more: Any) -> str:
        body = {"temperature": 0.9, "top_p": 0.9, "extra_body": {"top_k": 50}} | more
        return client.completions.create(model=MODEL, prompt="import", max_tokens=30, **body).choices[0].text

    drawn = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "top_k": 50, "seed": 5}
    assert text(seed=5) == text(seed=5) == expected(decoder, "import", 30, **drawn)
    assert text(seed=-1) == text(seed=2**63 - 1)
    assert len({text() for _ in range(3)} | {text(seed=5), text(seed=6)}) == 5


def test_who_has_no_key_gets_nothing(running: Running):
    with (
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="guess", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as raised,
    ):
        stranger.models.list()
    assert raised.value.code == "invalid_api_key"
    with running.http() as http:
        assert http.get("/v1/models", headers={"Authorization": ""}).status_code == 401
        assert http.get("/v1/models", headers={"Authorization": "Basic sesame"}).status_code == 401
        assert http.get("/health", headers={"Authorization": ""}).status_code == 200


def test_another_model_is_not_found(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError, match="it is called 'tiny'") as raised:
        client.completions.create(model="gpt-4", prompt="x")
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_the_list_of_models(client: openai.OpenAI):
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len, model.vocabulary, model.devices) == (MODEL, 256, 256, 2)
    assert client.models.retrieve(MODEL) == model


@pytest.mark.parametrize(("prompt", "new"), [(250, 7), (300, 1), (1, 256), (1, 2**31 - 1)])
def test_too_long_a_prompt_is_refused(client: openai.OpenAI, prompt: int, new: int):
    with pytest.raises(openai.BadRequestError, match="room for 256 tokens") as raised:
        client.completions.create(model=MODEL, prompt="x" * prompt, max_tokens=new)
    assert raised.value.code == "context_length_exceeded"
    assert raised.value.param == "prompt"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": -1}, "greater than or equal to 1"),
    ({"max_tokens": 0}, "greater than or equal to 1"),
    ({"max_tokens": 2**31}, "less than or equal to"),
    ({"max_tokens": 10**30}, "less than or equal to"),
    ({"max_tokens": "5"}, "valid integer"),
    ({"prompt": ""}, "at least 1 character"),
    ({"prompt": []}, "at least 1 item"),
    ({"prompt": None}, "prompt"),
    ({"prompt": [1, 256]}, "token id 256 is outside the vocabulary of 256"),
    ({"prompt": [1, -1]}, "prompt"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"stop_token_ids": [999]}, "token id 999 is outside the vocabulary"),
    ({"n": 2}, "n: Input should be less than or equal to 1"),
    ({"best_of": 3}, "best_of"),
    ({"logprobs": 5}, "logprobs"),
    ({"echo": True}, "echo: Value error, this is not supported; leave it out"),
    ({"echo": 0.0}, "echo"),
    ({"n": True}, "n: Input should be a valid integer"),
    ({"suffix": "x"}, "suffix"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 3}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"presence_penalty": 1.5}, "presence_penalty"),
    ({"seed": 2**64}, "seed"),
    ({"surprise": 1}, "surprise: Extra inputs"),
    ({"\ud800": 1}, "valid string"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"model": None}, "model"),
]


@pytest.mark.parametrize(("change", "reason"), WRONG, ids=[str(change)[:40] for change, _ in WRONG])
def test_what_cannot_be_is_refused_with_a_reason(running: Running, change: dict[str, Any], reason: str):
    body = {"model": MODEL, "prompt": "x", "max_tokens": 3} | change
    with running.http() as http:
        found = http.post("/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert found.status_code == 400
    error = found.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert reason in error["message"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"model":', "not JSON"),
        (b"", "body"),
        (b"null", "body"),
        (b"[]", "body"),
        (b'{"model": "tiny", "prompt": "\xff\xfe"}', "body"),
        (b"\xff\xfe\x00", "body"),
        (b"[" * 5000, "body"),
        (b'{"model": "tiny", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", "body"),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"model": "tiny", "prompt": "x", "temperature": 1e999}', "temperature"),
    ],
)
def test_what_is_no_json_is_refused_with_a_reason(running: Running, content: bytes, reason: str):
    with running.http() as http:
        found = http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert found.status_code == 400
        assert reason in found.json()["error"]["message"]


def test_too_large_a_body_is_refused(running: Running):
    with running.http() as http:
        announced = http.post("/v1/completions", json={"model": MODEL, "prompt": "x" * 30_000})
        poured = http.post("/v1/completions", content=(b"x" * 1000 for _ in range(30)))
    assert [announced.status_code, poured.status_code] == [413, 413]
    assert announced.json()["error"]["code"] == "request_too_large"


def test_routes_that_are_not_there(running: Running):
    with running.http() as http:
        assert http.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
        wrong = http.get("/v1/completions")
    assert wrong.status_code == 405
    assert wrong.headers["Allow"] == "POST"


def test_metrics(running: Running, client: openai.OpenAI):
    with running.http() as http:
        before = http.get("/metrics").text
        client.completions.create(model=MODEL, prompt="import", max_tokens=5, extra_body={"ignore_eos": True})
        after = http.get("/metrics").text

    def value(text: str, name: str) -> float:
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    assert value(after, "weft_generated_tokens_total") - value(before, "weft_generated_tokens_total") == 5
    assert value(after, "weft_prompt_tokens_total") - value(before, "weft_prompt_tokens_total") == 6
    assert value(after, "weft_ready ") == 1
    assert value(after, "weft_cache_tokens_used ") == 0
    assert value(after, "weft_time_to_first_token_seconds_count") > 0


def broken() -> ReferenceDecoder:
    raise InputError("no such model; give another")


def test_what_is_wrong_with_the_model_shows_at_once():
    with pytest.raises(InputError, match="no such model; give another"), server(broken):
        pass
