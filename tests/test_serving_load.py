"""Many requests at once, clients that leave, workers that die."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import psutil
import pytest
from reference_decoder import CountingDecoder, ReferenceDecoder, alone
from serving import KEY, MODEL, Bytes, Running, server, workers

from weft.inference.sampling import Sampling
from weft.serving.decoder import Request

HEADERS = {"Authorization": f"Bearer {KEY}"}


def asynchronous(running: Running) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=running.url, headers=HEADERS, timeout=120, limits=limits)


async def lines(http: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream, without the one that says it is done."""
    async with http.stream("POST", "/v1/completions", json={"model": MODEL, "stream": True, **body}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line and line != "data: [DONE]":
                yield json.loads(line.removeprefix("data: "))


def slow() -> CountingDecoder:
    decoder = CountingDecoder(capacity_tokens=8 * 256)
    decoder.step_s = 0.02
    return decoder


@pytest.fixture(scope="module")
def counting() -> Iterator[Running]:
    with server(slow, devices=2, max_queue=20, max_concurrent=16) as found:
        yield found


@pytest.fixture(scope="module")  # of the last tests: those before tell workers of one server only
def quick() -> Iterator[Running]:
    with server(CountingDecoder) as found:
        yield found


@pytest.mark.long
def test_two_hundred_at_once_of_whom_some_leave():
    drawn = random.Random(1)
    requests = [
        Request(
            id=n,
            prompt=tuple(drawn.choices(range(1, 256), k=drawn.randint(1, 40))),
            max_new_tokens=drawn.randint(1, 24),
            sampling=Sampling(do_sample=n % 2 == 0, temperature=0.8 if n % 2 == 0 else 1.0, seed=n),
            stop_token_ids=frozenset({0}),
        )
        for n in range(200)
    ]
    leaving = set(drawn.sample(range(200), 40))

    async def one(http: httpx.AsyncClient, request: Request) -> str | None:
        body = {
            "prompt": list(request.prompt),
            "max_tokens": request.max_new_tokens,
            "temperature": request.sampling.temperature if request.sampling.do_sample else 0,
            "seed": request.sampling.seed,
        }
        if request.id % 4 == 1 and request.id not in leaving:
            found = await http.post("/v1/completions", json={"model": MODEL, **body})
            return found.json()["choices"][0]["text"]
        text, seen = "", 0
        async for event in lines(http, body):
            text += event["choices"][0]["text"]
            seen += 1
            if request.id in leaving and seen > request.max_new_tokens / 2:
                return None
        return text

    async def all_of_them(running: Running) -> list[str | None]:
        async with asynchronous(running) as http:
            return await asyncio.gather(*(one(http, request) for request in requests))

    with server(ReferenceDecoder, devices=2, tokenizer=Bytes(), max_queue=200, max_concurrent=24) as running:
        found = asyncio.run(all_of_them(running))
        health = running.idle()
    decoder, tokenizer = ReferenceDecoder(), Bytes()
    for request, text in zip(requests, found, strict=True):
        if request.id not in leaving:
            tokens = alone(decoder, request)
            assert text == tokenizer.decode(tokens[:-1] if tokens[-1] == 0 else tokens)
    assert found.count(None) == 40
    assert (health["cache_tokens_used"], health["running"], health["restarts"]) == (0, 0, 0)


def test_requests_join_while_others_are_decoded(counting: Running):
    order: list[str] = []

    async def one(http: httpx.AsyncClient, name: str, new: int, begun: asyncio.Event | None) -> None:
        async for _ in lines(http, {"prompt": [1], "max_tokens": new}):
            if begun is not None:
                begun.set()
        order.append(name)

    async def both() -> None:
        async with asynchronous(counting) as http:
            begun = asyncio.Event()
            long = asyncio.create_task(one(http, "long", 60, begun))
            await begun.wait()
            await one(http, "short", 5, None)
            await long

    asyncio.run(both())
    assert order == ["short", "long"]


def test_many_together_take_little_longer_than_one(counting: Running):
    async def together(count: int) -> float:
        async with asynchronous(counting) as http:
            began = time.monotonic()
            asked = (
                http.post("/v1/completions", json={"model": MODEL, "prompt": [n], "max_tokens": 30})
                for n in range(count)
            )
            texts = [found.json()["choices"][0]["text"] for found in await asyncio.gather(*asked)]
            assert texts == [" ".join(str(n + k) for k in range(1, 31)) for n in range(count)]
            return time.monotonic() - began

    asyncio.run(together(16))
    alone_s = asyncio.run(together(1))
    assert asyncio.run(together(16)) < 3 * alone_s


def test_a_client_that_is_gone_takes_no_slots(counting: Running):
    async def leave(stream: bool) -> None:
        async with asynchronous(counting) as http:
            body = {"model": MODEL, "prompt": [1], "max_tokens": 250, "stream": stream}
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(http.post("/v1/completions", json=body), 0.5)

    for stream in (False, True):
        asyncio.run(leave(stream))
        began = time.monotonic()
        assert counting.idle()["cache_tokens_used"] == 0
        assert time.monotonic() - began < 2  # of five seconds that it would have taken


def test_more_than_may_wait_are_told_to_come_back(counting: Running):
    async def flood() -> list[httpx.Response]:
        async with asynchronous(counting) as http:
            body = {"model": MODEL, "prompt": [1], "max_tokens": 20}
            return await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(48)))

    counting.idle()
    found = asyncio.run(flood())
    # 16 are decoded and 20 wait; on a slow machine some are done before the last one comes.
    refused = sum(response.status_code == 429 for response in found)
    assert 1 <= refused <= 12
    assert sum(response.status_code == 200 for response in found) == 48 - refused
    assert all(int(response.headers["Retry-After"]) >= 1 for response in found if response.status_code == 429)


def test_workers_sleep_while_there_is_nothing_to_do(counting: Running):
    counting.idle()

    def used() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in workers())

    before = used()
    time.sleep(2)
    assert used() - before < 0.2


@pytest.mark.parametrize("rank", [0, 1])
def test_workers_that_die_are_started_again(counting: Running, rank: int):
    before = counting.health()["restarts"]
    # The agent starts ranks in order, so the younger process is rank 1.
    victim = sorted(workers(), key=psutil.Process.create_time)[rank]

    async def cut_off() -> tuple[httpx.Response, list[dict[str, Any]]]:
        async with asynchronous(counting) as http:
            body = {"prompt": [1], "max_tokens": 250}
            whole = asyncio.create_task(http.post("/v1/completions", json={"model": MODEL, **body}))
            events = []
            async for event in lines(http, body):
                events.append(event)
                if len(events) == 5:
                    victim.kill()
            return await whole, events

    response, events = asyncio.run(cut_off())
    began = time.monotonic()
    assert response.status_code == 500
    assert "died" in response.json()["error"]["message"]
    assert events[-1]["error"]["type"] == "server_error"
    assert counting.health()["status"] == "not ready"
    with counting.http() as http:
        assert http.get("/health").status_code == 503
        refused = http.post("/v1/completions", json={"model": MODEL, "prompt": [1]})
        assert refused.status_code == 503
        assert refused.headers["Retry-After"] == "1"
        while http.get("/health").status_code == 503:
            assert time.monotonic() - began < 60
            time.sleep(0.1)
        found = http.post("/v1/completions", json={"model": MODEL, "prompt": [1], "max_tokens": 3})
    assert found.json()["choices"][0]["text"] == "2 3 4"
    assert counting.health()["restarts"] == before + 1
    assert f"rank {rank} failed: killed by SIGKILL" in counting.said[-1]


def resident() -> list[int]:
    gc.collect()
    return [process.memory_info().rss for process in [psutil.Process(), *workers()]]


@pytest.mark.long
def test_memory_does_not_grow_with_requests(quick: Running):
    async def many(count: int) -> None:
        async with asynchronous(quick) as http:

            async def client(n: int) -> None:
                for k in range(count // 20):
                    body = {"prompt": [n] * (1 + k % 7), "max_tokens": 8}
                    if k % 3 == 0:
                        assert len([event async for event in lines(http, body)]) == 9
                        continue
                    found = await http.post("/v1/completions", json={"model": MODEL, **body})
                    assert found.status_code == 200

            await asyncio.gather(*(client(n) for n in range(20)))

    asyncio.run(many(600))
    before = resident()
    asyncio.run(many(2000))
    after = resident()
    assert quick.idle()["cache_tokens_used"] == 0
    growth = [now - then for now, then in zip(after, before, strict=True)]
    assert max(growth) < 4 * 2**20, growth


def test_the_first_token_waits_for_no_acknowledgement(quick: Running):
    """TCP would hold it back for the 40 ms in which a client may answer the head of the stream."""

    async def waits() -> list[float]:
        found = []
        async with asynchronous(quick) as http:
            for _ in range(20):
                began = time.monotonic()
                found += [time.monotonic() - began async for _ in lines(http, {"prompt": [1], "max_tokens": 2})][:1]
        return sorted(found)

    assert asyncio.run(waits())[5] < 0.03
