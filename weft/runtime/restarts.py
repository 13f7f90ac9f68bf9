"""Restarts: whether a job whose processes died begins again, when, and on which devices.

A job that made progress since it last died begins again after a second; one that did not, after twice the pause before.
It is given up after so many restarts, or where it dies at the same step twice in a row on the same devices: what is
wrong there is wrong every time.

Which devices are left is asked before each start: a command of the user's for every one of them
(``WEFT_DEVICE=2 COMMAND``), which fails where the device is lost. While the job runs on fewer than it began with, the
lost ones are asked again from time to time.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weft.errors import JobError, WorkerError
from weft.runtime.failure import read_failure
from weft.runtime.logbook import step_of

PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
ASK_EVERY_S, ASK_AT_MOST_S = 15.0, 60.0
"""How often lost devices are asked, and how long a command may take to answer."""


class GaveUpError(JobError):
    """A job that died too often, or at the same step twice in a row. The message is the report."""


@dataclass(frozen=True)
class Death:
    """The end of one attempt.

    Attributes:
        step: the step that was being done, counted from 1; None before the first.
        cause: of what, in one line.
        devices: those it ran on.
        pause_s: what was waited before the next attempt.
    """

    step: int | None
    cause: str
    devices: tuple[int, ...]
    pause_s: float = 0.0

    def describe(self) -> str:
        """In a line."""
        count = len(self.devices)
        return f"{place(self.step)} on {count} device{'s' if count != 1 else ''}: {self.cause}"


def place(step: int | None) -> str:
    """Where in training, in words."""
    return "while it started" if step is None else f"at step {step}"


@dataclass
class Restarts:
    """What becomes of a job whose processes die.

    Attributes:
        limit: restarts at most.
        command: fails for a lost device, whose number is in WEFT_DEVICE; None: all devices are there.
        say: tells people.
        timeout_s: processes that hang for so long count as dead (``vigil``); None: nobody looks.
        pause_s: the first pause.
        ask_every_s: how often lost devices are asked again.
        deaths: so far.
    """

    limit: int = 0
    command: str | None = None
    say: Callable[[str], None] = print
    timeout_s: float | None = None
    pause_s: float = PAUSE_S
    ask_every_s: float = ASK_EVERY_S
    deaths: list[Death] = field(default_factory=list)
    _asked: float = 0.0

    def there(self, devices: Sequence[int]) -> tuple[int, ...]:
        """Those of some devices that are not lost.

        Raises:
            JobError: none is left.
        """
        self._asked = time.monotonic()
        if self.command is None:
            return tuple(devices)
        asked = [(device, self._ask(device)) for device in devices]
        found = tuple(device for device, process in asked if _answered(process, self._asked + ASK_AT_MOST_S))
        if not found:
            raise JobError(f"no device is left: {self.command!r} failed for all {len(devices)} of them")
        return found

    def more(self, devices: Sequence[int], running: Sequence[int]) -> tuple[int, ...]:
        """Devices that are there again, of those the job is not running on. Asks only from time to time."""
        lost = [device for device in devices if device not in running]
        if not lost or time.monotonic() - self._asked < self.ask_every_s:
            return ()
        try:
            return self.there(lost)
        except JobError:
            return ()

    def after_death(self, job: Path, exits: Mapping[int, int], devices: Sequence[int]) -> None:
        """Take note of a death, and wait.

        Args:
            job: the directory of what the processes left.
            exits: exit codes of those that failed, by rank.
            devices: which they ran on.

        Raises:
            InputError: what the user gave is wrong: that is so every time.
            WorkerError: there were to be no restarts.
            GaveUpError: it is given up.
        """
        error = read_failure(job, exits)
        if not isinstance(error, WorkerError) or self.limit == 0:
            raise error
        begun = step_of(job)
        step = None if begun is None else begun + 1
        death = Death(step, str(error), tuple(devices))
        again = bool(self.deaths) and (self.deaths[-1].step, self.deaths[-1].devices) == (step, death.devices)
        if again or len(self.deaths) == self.limit:
            why = f"it died {place(step)} twice in a row" if again else f"it was restarted {self.limit} times"
            raise GaveUpError(f"gave up: {why}; " + "; ".join(each.describe() for each in (*self.deaths, death)))
        pause = self._pause(step)
        self.deaths.append(Death(step, death.cause, death.devices, pause))
        self.say(f"died {self.deaths[-1].describe()}; restart {len(self.deaths)} of {self.limit} in {pause:g} s")
        time.sleep(pause)

    def _pause(self, step: int | None) -> float:
        """Twice the last one where nothing was gained since."""
        if not self.deaths:
            return self.pause_s
        before = self.deaths[-1].step or 0
        return self.pause_s if (step or 0) > before else min(LONGEST_PAUSE_S, 2 * self.deaths[-1].pause_s)

    def _ask(self, device: int) -> subprocess.Popen[bytes]:
        assert self.command is not None
        return subprocess.Popen(
            self.command,
            shell=True,  # the user's own command line, as the user would type it
            env={**os.environ, "WEFT_DEVICE": str(device)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def _answered(process: subprocess.Popen[bytes], until: float) -> bool:
    """Whether a command ended well in time."""
    try:
        return process.wait(max(0.0, until - time.monotonic())) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
