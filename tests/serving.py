"""A server in a thread of the tests, its job in processes as always."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from weft.serving import server as serving
from weft.serving.decoder import Decoder
from weft.serving.job import Job
from weft.serving.launcher import Launcher
from weft.serving.scheduler import Facts
from weft.serving.server import Settings, listener
from weft.serving.tokenizer import Numbers, Tokenizer

KEY = "sesame"
MODEL = "tiny"


class Bytes:
    """A tokenizer of bytes; 0 ends a text."""

    ends = frozenset({0})

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self.encode("".join(f"{message['role']}: {message['content']}\n" for message in messages))


@dataclass
class Running:
    """A server that runs, and what it said."""

    url: str
    said: list[str] = field(default_factory=list)
    error: BaseException | None = None
    ready: threading.Event = field(default_factory=threading.Event)

    def http(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60, **more)

    def health(self) -> dict[str, Any]:
        with self.http() as http:
            return http.get("/health").json()

    def idle(self, within_s: float = 20) -> dict[str, Any]:
        """Its health once nothing is left to do."""
        until = time.monotonic() + within_s
        while (found := self.health())["running"] + found["waiting"] and time.monotonic() < until:
            time.sleep(0.05)
        return found


def job_processes() -> list[psutil.Process]:
    """The processes of this process' servers: those that wait for workers, and workers."""
    found = []
    for child in psutil.Process().children():  # others are those of other tests
        with contextlib.suppress(psutil.NoSuchProcess):
            if "weft.serving.job" in " ".join(child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def workers() -> list[psutil.Process]:
    """The worker processes of this process' servers."""
    return [process for process in job_processes() if "weft.runtime.worker" in " ".join(process.cmdline())]


@contextlib.contextmanager
def server(
    make: Callable[[], Decoder], *, devices: int = 1, tokenizer: Tokenizer | None = None, **settings: Any
) -> Iterator[Running]:
    """A server while the block runs, ready when it begins."""
    given = Settings(**{"model": MODEL, "port": 0, "api_key": KEY, **settings})
    at = listener(given)
    running = Running(f"http://127.0.0.1:{at.getsockname()[1]}")
    loop = asyncio.new_event_loop()
    tasks: list[asyncio.Task[None]] = []

    def on_ready(facts: Facts) -> None:
        running.ready.set()

    async def main() -> None:
        tasks.append(asyncio.current_task())
        with contextlib.closing(Launcher()) as launcher:
            await serving.serve(
                given,
                Job(make=make, devices=devices, device="cpu"),
                tokenizer or Numbers(),
                launcher=launcher,
                at=at,
                on_ready=on_ready,
                say=running.said.append,
            )

    def thread() -> None:
        try:
            loop.run_until_complete(main())
        except BaseException as error:
            running.error = error
        finally:
            running.ready.set()
            loop.close()

    working = threading.Thread(target=thread)
    working.start()
    try:
        assert running.ready.wait(120)
        if running.error is not None:
            raise running.error
        yield running
    finally:
        if running.error is None:
            loop.call_soon_threadsafe(tasks[0].cancel)
        working.join(30)
        assert not working.is_alive()
