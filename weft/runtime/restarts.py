"""Restarts: whether a job whose processes died begins again, when, and on which devices.

A job that made progress since it last died begins again after a second; one that did not, after twice the pause before.
It is given up after so many restarts, or where it dies at the same step twice in a row on the same devices: what is
wrong there is wrong every time.

Which devices are left is asked before each start: a command of the user's for every one of them
(``WEFT_DEVICE=2 COMMAND``), which fails where the device is lost (``inquiry``). While the job runs on fewer than it
began with, the lost ones are asked again from time to time; nobody waits for what they say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from weft.errors import GaveUpError, JobError, WorkerError
from weft.runtime.failure import read_failure
from weft.runtime.inquiry import Inquiry
from weft.runtime.logbook import step_of
from weft.runtime.signals import raised

PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
ASK_EVERY_S, ASK_AT_MOST_S = 15.0, 60.0
"""How often lost devices are asked, and how long a command may take to answer."""


@dataclass(frozen=True)
class Death:
    """The end of one attempt.

    Attributes:
        step: the step that was being done, counted from 1; None before the first.
        cause: of what, in one line.
        devices: those of this machine that it ran on.
        world: ranks, those on other machines too.
        pause_s: what was waited before the next attempt.
    """

    step: int | None
    cause: str
    devices: tuple[int, ...]
    world: int
    pause_s: float = 0.0

    def describe(self) -> str:
        """In a line."""
        count, more = len(self.devices), self.world - len(self.devices)
        elsewhere = f" here and {more} elsewhere" if more else ""
        return f"{place(self.step)} on {count} device{'s' if count != 1 else ''}{elsewhere}: {self.cause}"

    def again(self, before: Death) -> bool:
        """Whether it is the same as one before: at the same step, on the same devices."""
        return (self.step, self.devices, self.world) == (before.step, before.devices, before.world)


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
        ask_at_most_s: how long a command may take to answer.
        deaths: so far.
    """

    limit: int = 0
    command: str | None = None
    say: Callable[[str], None] = print
    timeout_s: float | None = None
    pause_s: float = PAUSE_S
    ask_every_s: float = ASK_EVERY_S
    ask_at_most_s: float = ASK_AT_MOST_S
    deaths: list[Death] = field(default_factory=list)
    _asked: float = 0.0
    _inquiry: Inquiry | None = None

    def there(self, devices: Sequence[int]) -> tuple[int, ...]:
        """Those of some devices that are not lost; takes as long as the command does.

        Raises:
            JobError: none is left.
            SignalException: this process is to end.
        """
        if self.command is None:
            return tuple(devices)
        self.close()
        with raised(), Inquiry(self.command, devices, self.ask_at_most_s) as inquiry:
            inquiry.begin()
            inquiry.wait()
            found = inquiry.found()
        self._asked = time.monotonic()
        if not found:
            raise JobError(f"no device is left: {self.command!r} failed for all {len(devices)} of them")
        return found

    def more(self, devices: Sequence[int], running: Sequence[int]) -> tuple[int, ...]:
        """Devices that are there again, of those the job is not running on. Asks only from time to time, and never
        waits: an answer is told in a later call."""
        if self._inquiry is None:
            lost = [device for device in devices if device not in running]
            if self.command is not None and lost and time.monotonic() - self._asked >= self.ask_every_s:
                self._inquiry = Inquiry(self.command, lost, self.ask_at_most_s)
                self._inquiry.begin()
            return ()
        if not self._inquiry.over:
            return ()
        found = self._inquiry.found()
        self.close()
        self._asked = time.monotonic()
        return found

    def close(self) -> None:
        """Ask no more: end commands that have not answered."""
        if self._inquiry is not None:
            self._inquiry.close()
            self._inquiry = None

    def after_death(self, job: Path, exits: Mapping[int, int], devices: Sequence[int], world: int) -> None:
        """Take note of a death, and wait.

        Args:
            job: the directory of what the processes left.
            exits: exit codes of those that failed, by rank.
            devices: which they ran on.
            world: ranks of the job.

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
        death = Death(step, str(error), tuple(devices), world)
        again = bool(self.deaths) and death.again(self.deaths[-1])
        if again or len(self.deaths) == self.limit:
            times = "once" if self.limit == 1 else f"{self.limit} times"
            why = f"it died {place(step)} twice in a row" if again else f"it was restarted {times}"
            report = "; ".join(each.describe() for each in (*self.deaths, death))
            raise GaveUpError(f"gave up: {why}; {report}", traceback=error.traceback) from error
        pause = self._pause(step)
        self.deaths.append(replace(death, pause_s=pause))
        self.say(f"died {self.deaths[-1].describe()}; restart {len(self.deaths)} of {self.limit} in {pause:g} s")
        time.sleep(pause)

    def _pause(self, step: int | None) -> float:
        """Twice the last one where nothing was gained since."""
        if not self.deaths:
            return self.pause_s
        before = self.deaths[-1].step or 0
        return self.pause_s if (step or 0) > before else min(LONGEST_PAUSE_S, 2 * self.deaths[-1].pause_s)
