"""Register: who is at a meeting, as this host sees it: by its own clock, and without waiting for ever.

PyTorch's rendezvous has one state for all hosts, in a store. In it is when each of them said last that it is there, by
its own clock, and others compare that with theirs: clocks that differ by more than a host may be silent make a host
strike out one that is well, and the two disagree on who is in the job. Here a host only sees that such a time has
changed, and when it saw that; the times PyTorch gets to compare are of this host's clock, and those the others wrote
stay in the store as they are.

A store whose machine is silent (a dead link, a host that is stopped) does not answer, and PyTorch's calls wait for it
for ever, whatever its timeout, and hear no signal. So they are made in threads, which nobody waits for too long.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from concurrent import futures
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar

from torch._C._distributed_c10d import Store  # torch.distributed has it too, but not for type checkers
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend

T = TypeVar("T")

READING = timedelta(seconds=60)
"""How long a store may take to answer."""

LOOKS_S = 2.0
"""A look at the state stands for so much time at most: a host that was stopped itself knows nothing of the others."""


class SilentError(RendezvousConnectionError):
    """A store that did not answer in time; it is asked no more."""


def answer(ask: Callable[[], T], within: timedelta | None = None) -> T:
    """What a call of a store returns. Signals are heard while it waits.

    Args:
        ask: makes the call. It is made in a thread, which stays behind where there is no answer.
        within: what it may take; None: READING.

    Raises:
        SilentError: there is no answer.
    """
    within = READING if within is None else within
    outcome: futures.Future[T] = futures.Future()

    def call() -> None:
        try:
            outcome.set_result(ask())
        except Exception as error:  # whatever it is, it is raised where the answer is waited for
            outcome.set_exception(error)

    threading.Thread(target=call, name="weft-answer", daemon=True).start()
    if futures.wait([outcome], within.total_seconds()).not_done:
        raise SilentError(f"the store of this job's machines has not answered for {within.total_seconds():g} s")
    return outcome.result()


class Time(NamedTuple):
    """Of the state.

    Attributes:
        written: as it is in the store; by whose clock does not matter.
        changed: when this host saw it change, in seconds of its looking.
        shown: by this host's clock.
    """

    written: datetime
    changed: float
    shown: datetime


class Register(RendezvousBackend):
    """See the module.

    Args:
        store: where the state is.
        run_id: of the meeting.
        last_call: how long after its deadline was set a round is complete.

    Raises:
        RendezvousConnectionError: the store is gone, or does not answer.
    """

    def __init__(self, store: Store, run_id: str, last_call: timedelta) -> None:
        self._backend = answer(lambda: C10dRendezvousBackend(store, run_id))
        self._last_call, self._silent = last_call, False
        self._looked, self._looking_s = time.monotonic(), 0.0
        self._times: dict[Any, Time] = {}

    @property
    def name(self) -> str:
        """See the base class."""
        return self._backend.name

    def get_state(self) -> tuple[bytes, Any] | None:
        """See the base class."""
        found = self._ask(self._backend.get_state)
        return None if found is None else (self._shown(found[0]), found[1])

    def set_state(self, state: bytes, token: Any = None) -> tuple[bytes, Any, bool] | None:
        """See the base class."""
        written = self._written(state)
        found = self._ask(lambda: self._backend.set_state(written, token))
        return None if found is None else (self._shown(found[0]), *found[1:])

    def _ask(self, ask: Callable[[], T]) -> T:
        """What the store answers. One that was silent once is not waited for again: its calls stand in line."""
        if self._silent:
            raise SilentError("the store of this job's machines does not answer any more")
        try:
            return answer(ask)
        except SilentError:
            self._silent = True
            raise

    def _shown(self, written: bytes) -> bytes:
        """A state of the store, by this host's clock."""
        state = pickle.loads(written)  # as PyTorch does with what it gets from here
        looked, now = time.monotonic(), datetime.now(UTC)
        self._looking_s += min(LOOKS_S, looked - self._looked)
        self._looked, before, self._times = looked, self._times, {}

        def shown(of: Any, written: datetime, ahead: timedelta) -> datetime:
            same = of in before and before[of].written == written
            changed = before[of].changed if same else self._looking_s
            own = now - timedelta(seconds=self._looking_s - changed) + ahead
            self._times[of] = Time(written, changed, own)
            return own

        state.last_heartbeats = {
            node: shown(node, written, timedelta(0)) for node, written in state.last_heartbeats.items()
        }
        if state.deadline is not None:
            state.deadline = shown("deadline", state.deadline, self._last_call)
        return pickle.dumps(state)

    def _written(self, shown: bytes) -> bytes:
        """A state for the store: times that were not changed here stay as they were written."""
        state = pickle.loads(shown)

        def written(of: Any, own: datetime) -> datetime:
            known = self._times.get(of)
            return own if known is None or known.shown != own else known.written

        state.last_heartbeats = {node: written(node, own) for node, own in state.last_heartbeats.items()}
        if state.deadline is not None:
            state.deadline = written("deadline", state.deadline)
        return pickle.dumps(state)
