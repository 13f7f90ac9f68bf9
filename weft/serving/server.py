"""A server, listening."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass

import uvicorn

from weft.errors import InputError
from weft.serving.app import make_app
from weft.serving.job import Job
from weft.serving.launcher import Launcher
from weft.serving.limits import Limits
from weft.serving.metrics import Metrics
from weft.serving.scheduler import Facts, Scheduler
from weft.serving.tokenizer import Tokenizer
from weft.serving.workers import Workers

DRAIN_S = 10
"""Seconds that answers under way get when the server is told to end."""

KEEP_ALIVE_S = 75
"""Seconds a connection may be idle. Clients give theirs up after 5, and the first to do so must not be the server: a
request on its way would find the door shut."""

BACKLOG = 2048


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to serve.

    Attributes:
        model: the name that requests call it by.
        host, port: where to listen; port 0 takes one that is free.
        api_key: what requests must bring; None: nothing.
        max_queue: requests that may wait.
        max_concurrent: requests that may be decoded at once.
        largest_bytes: of a request's body.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_queue: int = 256
    max_concurrent: int = 64
    largest_bytes: int = 4 * 2**20

    def __post_init__(self) -> None:
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise InputError("--api-key must be printable ASCII, and not empty")
        for name in ("max_queue", "max_concurrent", "largest_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")


def listener(settings: Settings) -> socket.socket:
    """The socket to serve at.

    Raises:
        InputError: it cannot be had.
    """
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        # asyncio sends small pieces at once only where it sees that a socket speaks TCP; otherwise the first token of a
        # stream waits 40 ms for the client to acknowledge the head.
        found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind((settings.host, settings.port))
            found.listen(BACKLOG)
        except OSError:
            found.close()
            raise
    except OSError as error:
        raise InputError(f"cannot listen at {settings.host}:{settings.port}: {error}; name another --port") from None
    return found


async def serve(
    settings: Settings,
    job: Job,
    tokenizer: Tokenizer,
    *,
    launcher: Launcher,
    at: socket.socket,
    on_ready: Callable[[Facts], None],
    say: Callable[[str], None],
) -> None:
    """Serve until the process is told to end.

    Args:
        launcher: starts the job; it is ended here.
        at: what ``listener`` gave.
        on_ready: is called each time the workers are ready.
        say: tells people what happened, in one line.

    Raises:
        WeftError: the workers could not be started the first time.
    """
    metrics = Metrics()
    scheduler = Scheduler(max_queue=settings.max_queue, max_concurrent=settings.max_concurrent, watcher=metrics)
    workers = Workers(job, launcher, scheduler, on_ready=on_ready, say=say)
    metrics.watch(scheduler, workers)
    app = make_app(
        model=settings.model,
        scheduler=scheduler,
        workers=workers,
        tokenizer=tokenizer,
        metrics=metrics,
        guarded=settings.api_key is not None,
    )
    config = uvicorn.Config(
        Limits(app, api_key=settings.api_key, largest_bytes=settings.largest_bytes),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=DRAIN_S,
        timeout_keep_alive=KEEP_ALIVE_S,
        lifespan="off",
    )
    server = uvicorn.Server(config)
    working = asyncio.create_task(workers.run())

    def over(task: asyncio.Task[None]) -> None:
        server.should_exit = True

    working.add_done_callback(over)
    try:
        await server.serve(sockets=[at])
    finally:
        working.cancel()
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError:  # uvicorn raises Ctrl-C again when it is done with it; the workers end first
            await asyncio.wait([working])
            raise
    if not working.cancelled() and (error := working.exception()) is not None:
        raise error
