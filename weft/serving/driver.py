"""The loop of every rank of a serving job.

Rank 0 hears the server and gives one order for each turn to all ranks, which carry it out together::

    server ──join, leave──► rank 0 ──order──► ranks: leave, join, step
           ◄────tokens─────

Rank 0 does not wait for the server between steps: it lets go of a request by itself when its last token has come, by
the same rule as the server (``Request.max_new_tokens``, ``stop_token_ids``). Where nothing takes part, it sleeps in its
socket and the others in the broadcast, from which an empty order wakes them well before the process group gives up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from weft.runtime.worker import TIMEOUT_S
from weft.serving.channel import Channel, Message
from weft.serving.decoder import Decoder, Request

HEARTBEAT_S = TIMEOUT_S / 10
"""Seconds without anything to do after which rank 0 gives an empty order."""

STEP, STOP = 1, 2


@dataclass(frozen=True, kw_only=True)
class Order:
    """What all ranks do next, in this order; ``stop``: nothing more."""

    leave: tuple[int, ...] = ()
    join: tuple[Request, ...] = ()
    step: bool = False
    stop: bool = False


def drive(decoder: Decoder, leader: Leader | None) -> None:
    """Decode until the server is gone or says stop. Every rank calls it; rank 0 brings the leader."""
    while True:
        order = shared(None if leader is None else leader.order())
        if order.stop:
            return
        if order.leave:
            decoder.leave(order.leave)
        if order.join:
            decoder.join(order.join)
        if order.step:
            tokens = decoder.step()
            if leader is not None:
                leader.report(tokens)


class Leader:
    """Rank 0's: turns what the server says into orders."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._left: dict[int, int] = {}
        self._ends: dict[int, frozenset[int]] = {}
        self._leaving: list[int] = []

    def order(self) -> Order:
        """What to do next; waits where there is nothing to do."""
        busy = bool(self._left or self._leaving)
        messages = self._channel.receive(0.0 if busy else HEARTBEAT_S)
        if messages is None:
            return Order(stop=True)
        joining: dict[int, Request] = {}
        for message in messages:
            if message.get("stop"):
                return Order(stop=True)
            for data in message.get("join", ()):
                request = Request.from_json(data)
                joining[request.id] = request
            for id in message.get("leave", ()):
                if joining.pop(id, None) is None and self._left.pop(id, None) is not None:
                    self._leaving.append(id)
        for request in joining.values():
            self._left[request.id] = request.max_new_tokens
            self._ends[request.id] = request.stop_token_ids
        leaving, self._leaving = self._leaving, []
        for id in leaving:
            self._ends.pop(id, None)
        return Order(leave=tuple(leaving), join=tuple(joining.values()), step=bool(self._left))

    def report(self, tokens: Mapping[int, int]) -> None:
        """Tell the server of a step, and let go of the requests that it ended."""
        self._channel.send({"tokens": list(tokens.items())})
        for id, token in tokens.items():
            self._left[id] -= 1
            if self._left[id] == 0 or token in self._ends[id]:
                del self._left[id]
                self._leaving.append(id)


def shared(order: Order | None) -> Order:
    """Rank 0's order, on every rank: a header of two numbers, then as many bytes of JSON as it says."""
    text = b""
    header = torch.zeros(2, dtype=torch.int64)
    if order is not None:
        if order.leave or order.join:
            changes: Message = {"leave": order.leave, "join": [request.to_json() for request in order.join]}
            text = json.dumps(changes).encode()
        header = torch.tensor([len(text), STEP * order.step + STOP * order.stop])
    dist.broadcast(header, src=0)
    length, flags = header.tolist()
    changes = {}
    if length:
        body = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.zeros(length, dtype=torch.uint8)
        dist.broadcast(body, src=0)
        changes = json.loads(body.numpy().tobytes())
    return order or _order_of(changes, flags)


def _order_of(changes: Mapping[str, Any], flags: int) -> Order:
    """An order as it came."""
    return Order(
        leave=tuple(changes.get("leave", ())),
        join=tuple(Request.from_json(data) for data in changes.get("join", ())),
        step=bool(flags & STEP),
        stop=bool(flags & STOP),
    )
