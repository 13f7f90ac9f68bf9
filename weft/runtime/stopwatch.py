"""Stopwatch: what the seconds of a rank's steps go to, besides computing.

    waiting         for other stages: transfers between them, tied gradients, and the sums that end a step
    communication   gradients averaged over the replicas, as far as the backward does not hide it
    optimizer       gradient norm, clipping and the optimizer's step

On a processor it is time on the wall; on an accelerator, events on its stream, which nobody waits for before the step
is over. Off, which is how an engine starts, it costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Times of one rank.

    Args:
        device: of this rank.
        inside: whether ranks communicate inside forward and backward too, where it has no hand on the clock.
    """

    def __init__(self, device: torch.device, *, inside: bool = False) -> None:
        self.device, self.inside, self.on = device, inside, False
        self._spent: dict[str, float] = {}
        self._events: list[tuple[tuple[str, ...], torch.Event, torch.Event]] = []
        self._open: tuple[str, ...] = ()

    def start(self) -> None:
        """From now on."""
        self._spent, self._events, self.on = {}, [], True

    def stop(self) -> dict[str, float]:
        """Seconds by term since the start. What the device was given to do must be done."""
        self.on = False
        for path, begin, end in self._events:
            self._add(path, begin.elapsed_time(end) / 1000)
        return {term: self._spent.get(term, 0.0) for term in ("waiting", "communication", "optimizer")}

    @contextmanager
    def time(self, term: str) -> Iterator[None]:
        """Count what is done inside as this term's, and not as that of a term around it."""
        if not self.on:
            yield
            return
        outer, self._open = self._open, (*self._open[-1:], term)
        path, cpu = self._open, self.device.type == "cpu"
        began = time.perf_counter() if cpu else self._event()
        try:
            yield
        finally:
            self._open = outer
            if isinstance(began, float):
                self._add(path, time.perf_counter() - began)
            else:
                self._events.append((path, began, self._event()))

    def _event(self) -> torch.Event:
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def _add(self, path: tuple[str, ...], seconds: float) -> None:
        *around, term = path
        self._spent[term] = self._spent.get(term, 0.0) + seconds
        for outer in around:
            self._spent[outer] = self._spent.get(outer, 0.0) - seconds
