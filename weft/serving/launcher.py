"""The process that starts a job's workers (``job.main``), from the server's side.

It is started before there is anything for it to do: importing torch takes it seconds, in which the server plans.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections.abc import Callable

import psutil

from weft.errors import InputError, JobError, WeftError
from weft.runtime.failure import exit_cause
from weft.serving.channel import Message, line_of
from weft.serving.job import Job, command, introduction

GOODBYE_S = 5.0
"""Seconds it gets to end by itself once there is nothing more for it to do, and then after SIGTERM."""


class Launcher:
    """One such process. It starts in the thread that makes this, and lives no longer than that thread."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server, which then ends the job
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._introduced = False

    async def run(self, job: Job, start: Message) -> WeftError:
        """Run a job's workers, the same job every time; what they ended of.

        Args:
            start: where they find the server.
        """
        text = line_of(start) if self._introduced else introduction(job) + line_of(start)
        self._introduced = True
        await asyncio.to_thread(self._tell, text)
        answer = await asyncio.to_thread(self._stdout.readline)
        if not answer:
            return JobError(f"the job {exit_cause(await asyncio.to_thread(self._process.wait))}")
        found = json.loads(answer)
        cause = found.get("error") or "the workers ended, as if they had been told to"
        return InputError(cause) if found.get("input") else JobError(cause)

    @property
    def gone(self) -> bool:
        """Whether it has ended, so that another is needed."""
        return self._process.poll() is not None

    def workers(self) -> list[psutil.Process]:
        """The processes that it started, and theirs."""
        try:
            return list(psutil.Process(self._process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """End it at once, after which the system ends its workers."""
        self._process.kill()

    async def end(self) -> None:
        """End it: by closing its stdin, by SIGTERM, by SIGKILL."""
        ways: list[Callable[[], object]] = [self._stdin.close, self._process.terminate, self._process.kill]
        for way in ways:
            with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
                way()
                await asyncio.to_thread(self._process.wait, GOODBYE_S)
                return

    def close(self) -> None:
        """End it at once, and let go of its pipes."""
        self.kill()
        self._process.wait()
        self._stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()

    def _tell(self, text: bytes) -> None:
        """Write to its stdin, as far as it still reads: how it ended is told when it is waited for."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(text)
            self._stdin.flush()
