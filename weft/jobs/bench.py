"""Bench: load a server and tell what it does, one load after the other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from weft.errors import InputError, JobError
from weft.serving.load import Asked, Client, Load, at_once, at_rate

BOOTSTRAP = "import json,sys;sys.path[:]=json.loads(sys.argv.pop(1));from weft.cli import main;main()"

END_S = 30.0
"""Seconds a server that was started here has to end."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to ask of a server.

    Attributes:
        clients: loads of so many clients at once.
        rates: loads of so many requests a second.
        requests: of each load.
        asked: what every request is.
    """

    clients: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    requests: int
    asked: Asked

    def __post_init__(self) -> None:
        wrong = [x for x in (*self.clients, *self.rates, self.requests) if x <= 0]
        wrong += [x for x in (self.asked.prompt_tokens, self.asked.new_tokens) if x < 1]
        if wrong or not (self.clients or self.rates):
            raise InputError(f"numbers of clients, rates, requests and tokens must be above 0, got {wrong or 'none'}")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a server did under each load."""

    url: str
    model: str
    devices: int
    asked: Asked
    loads: list[Load]

    def to_json(self) -> dict[str, Any]:
        """Plain data, times in seconds."""
        return asdict(self)


def run(url: str, order: Order, *, api_key: str | None = None, on_load: Callable[[str], None]) -> Bench:
    """Load the server at a URL.

    Args:
        on_load: is told of each load before it begins.

    Raises:
        InputError: no server is there.
        JobError: it answered no request.
    """
    return asyncio.run(_run(url, order, api_key, on_load))


async def _run(url: str, order: Order, api_key: str | None, on_load: Callable[[str], None]) -> Bench:
    client = Client(url, api_key)
    try:
        await client.look()
        on_load("warming up")
        await at_once(client, order.asked, 1, 2)
        loads = []
        for count in order.clients:
            on_load(f"{count} clients")
            loads.append(await at_once(client, order.asked, count, max(order.requests, count)))
        for rate in order.rates:
            on_load(f"{rate:g} requests/s")
            loads.append(await at_rate(client, order.asked, rate, order.requests))
        return Bench(url=url, model=client.model, devices=client.devices, asked=order.asked, loads=loads)
    finally:
        await client.close()


@contextlib.contextmanager
def started(arguments: Sequence[str]) -> Iterator[str]:
    """A server by ``weft serve`` with these arguments while the block runs; yields its URL.

    Raises:
        InputError, JobError: it did not start; why stands on stderr.
    """
    path = json.dumps([path or os.getcwd() for path in sys.path])
    command = [sys.executable, "-c", BOOTSTRAP, path, "serve", *arguments, "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            kind = InputError if process.wait() == 2 else JobError
            raise kind("the server did not start; weft serve with the same target says why")
        yield str(json.loads(line)["url"])
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
