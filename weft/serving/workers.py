"""The server's end of its job: start it, hear what it decodes, and start it again when it dies or hangs."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
import time
from collections.abc import Callable

import psutil

from weft.errors import JobError, WeftError
from weft.serving.channel import LINE_BYTES, Message, line_of
from weft.serving.job import Job
from weft.serving.launcher import Launcher
from weft.serving.pulse import LOADING_LOOKS, LOOK_S, SERVING_LOOKS, Pulse
from weft.serving.scheduler import Facts, Scheduler

HELLO_S = 10.0
"""Seconds someone who connects has to say the secret."""

ORPHAN_S = 10.0
"""Seconds that the job gets to end when rank 0 is gone."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Before a job is started again; twice as long each time, until one has lived for the longest."""


class Workers:
    """See the module. ``await workers.run()`` in a task; cancel it to end the job.

    Args:
        job: what to start.
        launcher: starts it, the first time.
        scheduler: is told when workers come, of what they decode, and when they are gone.
        on_ready: is called each time workers are ready.
        say: tells people what happened, in one line.
    """

    def __init__(
        self,
        job: Job,
        launcher: Launcher,
        scheduler: Scheduler,
        *,
        on_ready: Callable[[Facts], None],
        say: Callable[[str], None],
    ) -> None:
        self.restarts = 0
        self._job, self._scheduler, self._on_ready, self._say = job, scheduler, on_ready, say
        self._launcher, self._pulse = launcher, Pulse(launcher.workers)
        self._secret = ""
        self._came = self._lost = False
        self._hung = ""
        self._hanging_up: Callable[[], None] = lambda: None

    async def run(self) -> None:
        """Keep a job running.

        Raises:
            WeftError: the first start failed.
        """
        hearing: set[asyncio.Task[None]] = set()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            # A task of ours: asyncio's own of Python 3.11 complains on stderr when it is cancelled.
            task = asyncio.create_task(self._connected(reader, writer))
            hearing.add(task)
            task.add_done_callback(hearing.discard)

        server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=LINE_BYTES)
        port = int(server.sockets[0].getsockname()[1])
        pause_s = FIRST_PAUSE_S
        try:
            while True:
                began_s = time.monotonic()
                error = await self._once(port)
                if self._scheduler.facts is None:
                    raise error
                self._scheduler.down(str(error), waiting=not self._came)
                if time.monotonic() - began_s > LONGEST_PAUSE_S:
                    pause_s = FIRST_PAUSE_S
                self._say(f"{error}; starting the workers again in {pause_s:.1f} s")
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                self.restarts += 1
        finally:
            server.close()
            self._hanging_up()
            await self._launcher.end()
            for task in hearing:
                task.cancel()

    async def _once(self, port: int) -> WeftError:
        """One life of the job; what it died of."""
        if self._launcher.gone:
            self._launcher.close()
            self._launcher = Launcher()
        self._secret, self._hung = secrets.token_urlsafe(32), ""
        self._came = self._lost = False
        self._pulse = Pulse(self._launcher.workers)
        watch = asyncio.create_task(self._watch())
        try:
            error = await self._launcher.run(self._job, {"port": port, "secret": self._secret})
        finally:
            watch.cancel()
        return JobError(self._hung) if self._hung else error

    async def _watch(self) -> None:
        """End workers that hang, and a job that stays when rank 0 is gone."""
        gone_s = 0.0
        while True:
            await asyncio.sleep(LOOK_S)
            if self._lost:
                gone_s += LOOK_S
                if gone_s > ORPHAN_S:
                    self._launcher.kill()
            elif self._scheduler.ready and self._scheduler.running == 0:
                self._pulse.beat()
            elif hung := self._pulse.look(SERVING_LOOKS if self._came else LOADING_LOOKS):
                self._hung = hung
                self._scheduler.down(hung, waiting=False)
                for process in self._launcher.workers():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Someone connected: rank 0, if it knows the secret."""
        try:
            facts = await self._greeted(reader)
            if facts is not None:
                await self._hear(facts, reader, writer)
        finally:
            writer.close()

    async def _greeted(self, reader: asyncio.StreamReader) -> Facts | None:
        """What rank 0 says of itself; None of anyone else."""
        try:
            async with asyncio.timeout(HELLO_S):
                hello = json.loads(await reader.readline())
            known = hmac.compare_digest(str(hello.pop("secret")).encode(), self._secret.encode())
            return Facts(**hello) if known and not self._came else None
        except (TimeoutError, ValueError, LookupError, TypeError, AttributeError, OSError):
            return None  # whatever a stranger sends

    async def _hear(self, facts: Facts, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what rank 0 says, until it is gone."""
        self._came, self._hanging_up = True, writer.close

        def send(message: Message) -> None:
            writer.write(line_of(message))

        self._scheduler.up(facts, send)
        self._pulse.beat()
        self._on_ready(facts)
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                self._pulse.beat()
                self._scheduler.received(json.loads(line)["tokens"])
        self._lost = True
        self._scheduler.down(self._hung or "a worker process died", waiting=False)
