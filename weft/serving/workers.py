"""The server's end of its job: start it, hear what it decodes, and start it again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
import time
from collections.abc import Callable

from weft.errors import InputError, JobError, WeftError
from weft.runtime.failure import exit_cause
from weft.serving import job
from weft.serving.channel import LINE_BYTES, Message, line_of
from weft.serving.scheduler import Facts, Scheduler

HELLO_S = 10.0
"""Seconds someone who connects has to say the secret."""

GOODBYE_S = 5.0
"""Seconds the workers get to end by themselves, and then the job's process to end them."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Before a job is started again; twice as long each time, until one has lived for the longest."""

STALL_S = 900.0
"""Seconds without a step, with requests under way, after which the job counts as dead. Collectives give up before."""


class Workers:
    """See the module. ``await workers.run()`` in a task; cancel it to end the job.

    Args:
        job: what to start.
        scheduler: is told when workers come, of what they decode, and when they are gone.
        on_ready: is called each time workers are ready.
        say: tells people what happened, in one line.
    """

    def __init__(
        self, job: job.Job, scheduler: Scheduler, *, on_ready: Callable[[Facts], None], say: Callable[[str], None]
    ) -> None:
        self.restarts = 0
        self._job, self._scheduler, self._on_ready, self._say = job, scheduler, on_ready, say
        self._process: asyncio.subprocess.Process | None = None
        self._secret = ""
        self._came = self._lost = False
        self._hanging_up: Callable[[], None] = lambda: None
        self._heard_s = 0.0

    async def run(self) -> None:
        """Keep a job running.

        Raises:
            WeftError: the first start failed.
        """
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=LINE_BYTES)
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
            await self._end()

    async def _once(self, port: int) -> WeftError:
        """One life of the job; what it died of."""
        self._secret = secrets.token_urlsafe(32)
        self._came = self._lost = False
        process = self._process = self._process or await self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        watch = asyncio.create_task(self._watch(process))
        try:
            process.stdin.write(line_of({"port": port, "secret": self._secret}))
            said = await process.stdout.readline()
        finally:
            watch.cancel()
        if said:
            found = json.loads(said)
            text = found.get("error") or "the workers ended, as if they had been told to"
            return InputError(text) if found.get("input") else JobError(text)
        self._process = None
        return JobError(f"the job {exit_cause(await process.wait())}")

    async def _started(self) -> asyncio.subprocess.Process:
        """A process for the job."""
        process = await asyncio.create_subprocess_exec(
            *job.command(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server, which then ends the job
        )
        assert process.stdin is not None
        process.stdin.write(job.introduction(self._job))
        return process

    async def _end(self) -> None:
        """End the job: by hanging up, by SIGTERM, by SIGKILL, after which the system ends its children."""
        self._hanging_up()
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        ways: list[Callable[[], object]] = [lambda: None, process.terminate, process.kill]
        for end in ways:
            if process.returncode is not None:
                return
            end()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), GOODBYE_S)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """End a job that has not done a step for long, or stays when rank 0 is gone."""
        while True:
            await asyncio.sleep(1)
            now_s = time.monotonic()
            if self._scheduler.running == 0 and not self._lost:
                self._heard_s = now_s
            elif now_s - self._heard_s > (2 * GOODBYE_S if self._lost else STALL_S):
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
        self._came, self._hanging_up, self._heard_s = True, writer.close, time.monotonic()

        def send(message: Message) -> None:
            writer.write(line_of(message))

        self._scheduler.up(facts, send)
        self._on_ready(facts)
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                self._heard_s = time.monotonic()
                self._scheduler.received(json.loads(line)["tokens"])
        self._lost, self._heard_s = True, time.monotonic()
        self._scheduler.down("a worker process died", waiting=False)
