"""Clients that measure a server: so many at once, each asking again when it has its answer; or so many requests a
second, whatever the answers take.

What is measured, of streams of tokens as a client sees them:

    time to first token   from sending a request to its first token
    time per token        from one token to the next, over all tokens of all requests but the first ones
    tokens/s              of all clients together, from the first request to the last answer

Requests at a rate come as independent clients would: the time between two is drawn from the exponential distribution.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from weft.errors import InputError, JobError

PATIENCE_S = 600.0
"""Seconds without a token after which a request has failed."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What every request asks for.

    Attributes:
        prompt_tokens: of each, drawn anew.
        new_tokens: of each answer.
        seed: of the prompts and of the times between requests.
    """

    prompt_tokens: int = 32
    new_tokens: int = 32
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of many times, in seconds."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, times_s: Sequence[float]) -> Spread:
        """0 of none."""
        ordered = sorted(times_s) or [0.0]
        at = [ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] for share in (0.5, 0.99)]
        return cls(mean=sum(ordered) / len(ordered), p50=at[0], p99=at[1])


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One request, as its client saw it. ``times_s``: of its tokens, from when it was sent."""

    times_s: list[float]
    tokens: int
    failure: str | None


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a server did under one load, of ``clients`` at once or of ``rate`` requests a second."""

    clients: int | None
    rate: float | None
    requests: int
    failed: int
    failure: str | None
    seconds: float
    tokens_per_s: float
    tokens_per_s_per_device: float
    requests_per_s: float
    first_token: Spread
    per_token: Spread

    def to_json(self) -> dict[str, Any]:
        """Plain data, times in seconds."""
        return asdict(self)


class Client:
    """Asks one server.

    Args:
        url: of the server, with or without ``/v1``.
        api_key: if it wants one.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        root = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.AsyncClient(
            base_url=f"{root}/v1",
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=PATIENCE_S,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )
        self.model, self.vocabulary, self.devices = "", 256, 1

    async def look(self) -> None:
        """See what is served.

        Raises:
            InputError: nothing that answers.
        """
        try:
            answer = await self._http.get("/models")
            answer.raise_for_status()
            found = answer.json()["data"][0]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
            raise InputError(f"{self._http.base_url}: no server that lists its models: {error}") from None
        self.model = str(found["id"])
        self.vocabulary, self.devices = found.get("vocabulary") or 256, found.get("devices") or 1

    async def ask(self, prompt: Sequence[int], new: int) -> Answer:
        """One request."""
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": new,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        began_s, times_s, tokens, failure = time.perf_counter(), list[float](), 0, None
        try:
            async with self._http.stream("POST", "/completions", json=body) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    return Answer(times_s=[], tokens=0, failure=f"{response.status_code}: {text}")
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        failure = str(event["error"].get("message"))
                    for choice in event.get("choices", ()):
                        if choice["finish_reason"] is None or choice["text"]:
                            times_s.append(time.perf_counter() - began_s)
                    if event.get("usage"):
                        tokens = event["usage"]["completion_tokens"]
        except httpx.HTTPError as error:
            failure = f"{type(error).__name__}: {error}"
        return Answer(times_s=times_s, tokens=tokens or len(times_s), failure=failure)

    async def close(self) -> None:
        """Hang up."""
        await self._http.aclose()


async def at_once(client: Client, asked: Asked, clients: int, requests: int) -> Load:
    """``requests`` requests from so many clients, each asking one after the other."""
    prompts = _prompts(asked, client.vocabulary)

    async def one() -> list[Answer]:
        return [await client.ask(next(prompts), asked.new_tokens) for _ in iter(lambda: next(left, None), None)]

    left = iter(range(requests))

    async def run() -> list[Answer]:
        return [answer for answers in await asyncio.gather(*(one() for _ in range(clients))) for answer in answers]

    return await _measured(client, run, clients=clients)


async def at_rate(client: Client, asked: Asked, rate: float, requests: int) -> Load:
    """``requests`` requests, so many a second."""
    prompts, drawn = _prompts(asked, client.vocabulary), random.Random(asked.seed)

    async def run() -> list[Answer]:
        running: list[Awaitable[Answer]] = []
        due_s = time.perf_counter()
        for _ in range(requests):
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            running.append(asyncio.ensure_future(client.ask(next(prompts), asked.new_tokens)))
            due_s += drawn.expovariate(rate)
        return await asyncio.gather(*running)

    return await _measured(client, run, rate=rate)


async def _measured(
    client: Client, run: Callable[[], Awaitable[list[Answer]]], *, clients: int | None = None, rate: float | None = None
) -> Load:
    """Run a load and sum it up. Raises JobError: not one request was answered."""
    began_s = time.perf_counter()
    answers = await run()
    seconds = time.perf_counter() - began_s
    good = [answer for answer in answers if answer.failure is None and answer.times_s]
    failure = next((answer.failure for answer in answers if answer.failure is not None), None)
    if not good:
        raise JobError(f"none of {len(answers)} requests was answered; the first: {failure or 'no tokens'}")
    tokens = sum(answer.tokens for answer in good)
    gaps_s = [later - now for answer in good for now, later in zip(answer.times_s, answer.times_s[1:], strict=False)]
    return Load(
        clients=clients,
        rate=rate,
        requests=len(answers),
        failed=len(answers) - len(good),
        failure=failure,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        tokens_per_s_per_device=tokens / seconds / client.devices,
        requests_per_s=len(good) / seconds,
        first_token=Spread.of([answer.times_s[0] for answer in good]),
        per_token=Spread.of(gaps_s),
    )


def _prompts(asked: Asked, vocabulary: int) -> Iterator[list[int]]:
    """Prompts without end."""
    drawn = random.Random(asked.seed)
    while True:
        yield [drawn.randrange(vocabulary) for _ in range(asked.prompt_tokens)]
