"""Inquiry: a command of the user's is asked about every one of some devices, all at once; it fails for a lost one.

A command may hang, which is what the tools of a broken device do. Then it counts as failed, and is ended with all that
it started: each has a session of its own.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from types import TracebackType

POLL_S, REAP_S = 0.02, 1.0
"""How often commands are looked at, and how long one that was killed may take to be over: a process in the kernel's
hands, as of a driver that hangs, is not over before that lets it go."""


class Inquiry:
    """See the module. As a context manager, or by ``close``, it ends what has not answered.

    Args:
        command: as the user would type it; the device's number is in WEFT_DEVICE.
        devices: their numbers.
        at_most_s: what a command may take.
    """

    def __init__(self, command: str, devices: Sequence[int], at_most_s: float) -> None:
        self._command, self._devices, self._at_most_s = command, tuple(devices), at_most_s
        self._until = math.inf
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def begin(self) -> None:
        """Start the commands."""
        self._until = time.monotonic() + self._at_most_s
        for device in self._devices:
            self._processes[device] = subprocess.Popen(
                self._command,
                shell=True,  # the user's own command line, as the user would type it
                env={**os.environ, "WEFT_DEVICE": str(device)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def over(self) -> bool:
        """Whether all have answered, or had their time."""
        answered = all(process.poll() is not None for process in self._processes.values())
        return answered or time.monotonic() >= self._until

    def wait(self) -> None:
        """Until it is over."""
        while not self.over:
            time.sleep(POLL_S)

    def found(self) -> tuple[int, ...]:
        """The devices that are not lost, as far as is known."""
        return tuple(device for device, process in self._processes.items() if process.poll() == 0)

    def close(self) -> None:
        """End those that have not answered."""
        running = [process for process in self._processes.values() if process.poll() is None]
        for process in running:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it has just ended
                os.killpg(process.pid, signal.SIGKILL)
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(REAP_S)
        self._processes.clear()

    def __enter__(self) -> Inquiry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
