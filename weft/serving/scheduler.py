"""Which requests are decoded now, and which wait: first come, first served, as far as the cache goes.

A request takes ``Request.positions`` slots of the cache from when it joins until it is over, so what takes part can
never run out of cache half-way. The first that waits joins as soon as there is room for it, between two steps; one
behind it that would fit already does not overtake, or long requests would starve.

Nothing here waits or knows of sockets: the server's end of the job calls ``up``, ``received`` and ``down``, routes call
``submit`` and ``withdraw``.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from weft.serving.channel import Message
from weft.serving.decoder import Request
from weft.serving.refusal import RefusedError

End = Literal["stop", "length"]

STARTING = "the model is being loaded; ask again in a moment"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What rank 0 says of its decoder; ``devices``: of the job."""

    vocabulary: int
    max_length: int
    capacity_tokens: int
    devices: int


class Watcher(Protocol):
    """Is told of what happens to requests."""

    def first_token(self, wait_s: float) -> None:
        """A request has its first token, so long after it was submitted."""

    def ended(self, tokens: int, prompt: int, decode_s: float) -> None:
        """A request left with so many tokens, so long after the first of them."""


@dataclass(eq=False)
class Ticket:
    """One request that was submitted. Iterate over it for its tokens; ``end`` says why they ended.

    Raises:
        RefusedError: in the iteration, where it could not be finished.
    """

    request: Request
    submitted: float
    first: float = 0.0
    produced: int = 0
    end: End | None = None
    news: asyncio.Queue[int | RefusedError | None] = field(default_factory=asyncio.Queue)

    async def __aiter__(self) -> AsyncIterator[int]:
        while (news := await self.news.get()) is not None:
            if isinstance(news, RefusedError):
                raise news
            yield news


class Scheduler:
    """See the module.

    Args:
        max_queue: requests that may wait; more are refused.
        max_concurrent: requests that may take part at once.
        watcher: is told of what happens.
    """

    def __init__(self, *, max_queue: int, max_concurrent: int, watcher: Watcher) -> None:
        self.facts: Facts | None = None
        self.ready = False
        self.slots_used = 0
        self._max_queue, self._max_concurrent, self._watcher = max_queue, max_concurrent, watcher
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}
        self._numbers = itertools.count(1)
        self._send: Callable[[Message], None] = lambda message: None
        self._step_s = 0.0
        self._why = STARTING

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that take part."""
        return len(self._running)

    def number(self) -> int:
        """The next request's id."""
        return next(self._numbers)

    def submit(self, request: Request) -> Ticket:
        """Have a request decoded. Whoever submits it must ``withdraw`` it, whatever happens.

        Raises:
            RefusedError: 503 where no workers are ready, 429 where too many wait.
        """
        if not self.ready:
            raise RefusedError(503, self._why, code="not_ready", retry_s=1)
        if len(self._waiting) >= self._max_queue:
            text = f"{len(self._waiting)} requests wait already, as many as may; ask again later"
            raise RefusedError(429, text, code="queue_full", retry_s=self._patience_s())
        ticket = Ticket(request, time.monotonic())
        self._waiting.append(ticket)
        self._admit()
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        """Forget a request, done or not; its slots are free. Again does nothing."""
        if self._running.get(ticket.request.id) is ticket:
            self._drop(ticket)
            self._send({"leave": [ticket.request.id]})
            self._admit()
        elif ticket in self._waiting:
            self._waiting.remove(ticket)

    def up(self, facts: Facts, send: Callable[[Message], None]) -> None:
        """Workers are ready and hear what is sent."""
        self.facts, self._send, self.ready = facts, send, True
        too_long = [t for t in self._waiting if t.request.positions > min(facts.max_length, facts.capacity_tokens)]
        for ticket in too_long:  # what came back is smaller than what was there
            self._waiting.remove(ticket)
            ticket.news.put_nowait(RefusedError(500, "the workers came back with less room than this request needs"))
        self._admit()

    def received(self, tokens: Iterable[Sequence[int]]) -> None:
        """A step's tokens: pairs of id and token. Those of requests that left meanwhile count for nothing."""
        now = time.monotonic()
        for id, token in tokens:
            ticket = self._running.get(id)
            if ticket is None:
                continue
            if ticket.produced == 0:
                ticket.first = now
                self._watcher.first_token(now - ticket.submitted)
            ticket.produced += 1
            ticket.news.put_nowait(token)
            if token in ticket.request.stop_token_ids:
                ticket.end = "stop"
            elif ticket.produced == ticket.request.max_new_tokens:
                ticket.end = "length"
            if ticket.end is not None:
                ticket.news.put_nowait(None)
                self._drop(ticket)
        self._admit()

    def down(self, why: str, *, waiting: bool) -> None:
        """The workers are gone: what was being decoded fails, and, if ``waiting``, what waits. May be said again."""
        lost = list(self._running.values())
        if waiting:
            lost += self._waiting
            self._waiting.clear()
        self.ready, self._why = False, f"{why}; the workers are started again, ask again in a moment"
        self._send = lambda message: None
        for ticket in lost:
            if ticket.request.id in self._running:
                self._drop(ticket)
            ticket.news.put_nowait(RefusedError(500, why, code="worker_failed"))

    def _admit(self) -> None:
        """Have those join that there is room for."""
        joining: list[Request] = []
        while self.ready and self._waiting and len(self._running) < self._max_concurrent:
            assert self.facts is not None
            ticket = self._waiting[0]
            if self.slots_used + ticket.request.positions > self.facts.capacity_tokens:
                break
            self._waiting.popleft()
            self._running[ticket.request.id] = ticket
            self.slots_used += ticket.request.positions
            joining.append(ticket.request)
        if joining:
            self._send({"join": [request.to_json() for request in joining]})

    def _drop(self, ticket: Ticket) -> None:
        """It takes part no longer."""
        del self._running[ticket.request.id]
        self.slots_used -= ticket.request.positions
        decode_s = time.monotonic() - ticket.first if ticket.produced else 0.0
        if ticket.produced > 1:
            mine_s = decode_s / (ticket.produced - 1)
            self._step_s = mine_s if self._step_s == 0 else 0.9 * self._step_s + 0.1 * mine_s
        self._watcher.ended(ticket.produced, len(ticket.request.prompt), decode_s)

    def _patience_s(self) -> int:
        """Seconds until the first of those that take part is likely to be over."""
        left = [ticket.request.max_new_tokens - ticket.produced for ticket in self._running.values()]
        return max(1, min(60, math.ceil(min(left, default=1) * self._step_s)))
