"""JSON lines over a loopback socket, between the server and rank 0 of its job.

Rank 0 connects to the server and says the secret that it found in its environment; nothing that another process of this
machine sends is looked at before that, and what is sent is never pickled.
"""

from __future__ import annotations

import json
import select
import socket
from typing import Any

Message = dict[str, Any]

SECRET = "WEFT_SERVE_SECRET"
"""Names the secret to the processes of the job. Read once, when they connect."""

LINE_BYTES = 64 * 2**20
"""The longest line: a request with a very long prompt is one."""


def line_of(message: Message) -> bytes:
    """A message as it is sent."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Channel:
    """Rank 0's end. The server's is a pair of asyncio streams.

    Args:
        port: where the server listens on 127.0.0.1.
    """

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""

    def send(self, message: Message) -> bool:
        """Send a message; False where the server is gone."""
        try:
            self._socket.sendall(line_of(message))
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def receive(self, timeout_s: float) -> list[Message] | None:
        """All messages that are there, or, waiting ``timeout_s`` for them, the next. None: the server is gone."""
        while select.select([self._socket], [], [], timeout_s)[0]:
            try:
                data = self._socket.recv(2**20)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self._buffer += data
            if b"\n" in data:
                *lines, self._buffer = self._buffer.split(b"\n")
                return [json.loads(line) for line in lines]
        return []

    def close(self) -> None:
        """Hang up."""
        self._socket.close()
