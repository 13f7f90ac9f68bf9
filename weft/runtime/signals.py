"""Signals: those that end a job.

PyTorch's elastic agent catches them whenever it starts processes, to end these, and leaves its handlers behind. Here
the caller's own come back, and what the caller ignores goes on being ignored: SIGHUP under ``nohup``, or SIGINT of what
a script put in the background.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from torch.distributed.elastic.multiprocessing import SignalException

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
"""What the agent catches where nobody says otherwise."""

CAUGHT = "TORCHELASTIC_SIGNALS_TO_HANDLE"
"""Says otherwise: names with commas between."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn what the agent makes of a signal into what the caller would have seen: KeyboardInterrupt, or the signal."""
    try:
        yield
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        signal.raise_signal(error.sigval)  # handlers are the caller's own again
        raise SystemExit(128 + error.sigval) from None


@contextlib.contextmanager
def given_back() -> Iterator[None]:
    """Around the agent: gives the caller's handlers back, and has it catch nothing that the caller ignores."""
    if not _in_main_thread():
        yield
        return
    wanted, asked = os.environ.get(CAUGHT), (os.environ.get(CAUGHT) or ",".join(NAMES)).split(",")
    before = {number: signal.getsignal(number) for name in asked if (number := _number(name)) is not None}
    os.environ[CAUGHT] = ",".join(number.name for number, handler in before.items() if handler != signal.SIG_IGN)
    try:
        yield
    finally:
        if wanted is None:
            del os.environ[CAUGHT]
        else:
            os.environ[CAUGHT] = wanted
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Have signals that would end this process at once end the block first, as those that the agent catches do.

    Raises:
        SignalException: one came.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise SignalException(f"got signal {number}", sigval=signal.Signals(number))

    names = NAMES if _in_main_thread() else ()
    numbers = [number for name in names if (number := _number(name)) and signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _number(name: str) -> signal.Signals | None:
    """Of a signal; None where this system has no such."""
    return signal.Signals.__members__.get(name.strip())


def _in_main_thread() -> bool:
    """Others may not set handlers."""
    return threading.current_thread() is threading.main_thread()
