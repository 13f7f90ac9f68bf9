"""Who may ask, and how much: what stands before the routes, as plain ASGI, so that streams pass through as they are."""

from __future__ import annotations

import hmac
from collections.abc import Iterator

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weft.quantity import format_bytes
from weft.serving.refusal import RefusedError

OPEN = ("/health", "/metrics")
"""Routes that need no key: those who watch the server ask them."""


class Limits:
    """An application behind a key and a largest size of bodies.

    Args:
        app: answers what passes.
        api_key: what ``Authorization: Bearer`` must say; None lets everyone in.
        largest_bytes: of a body.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, largest_bytes: int) -> None:
        self._app, self._key, self._largest = app, api_key, largest_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check_key(scope, headers)
            body = await self._body(headers, receive)
        except RefusedError as refusal:
            answer = Response(refusal.body(), refusal.status, {**refusal.headers, "Connection": "close"}, JSON)
            await answer(scope, receive, send)
            return
        read: Iterator[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> Message:
            return next(read, None) or await receive()

        await self._app(scope, again, send)

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        """Raises RefusedError: the key is wrong."""
        if self._key is None or scope["path"] in OPEN:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), self._key.encode()):
            text = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
            raise RefusedError(401, text, code="invalid_api_key")

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """All of it. Raises RefusedError: it is too large."""
        text = f"the body is larger than {format_bytes(self._largest)}, which is the most this server reads"
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._largest:
            raise RefusedError(413, text, code="request_too_large")
        parts: list[bytes] = []
        while True:
            message = await receive()
            parts.append(message.get("body", b""))
            if sum(map(len, parts)) > self._largest:
                raise RefusedError(413, text, code="request_too_large")
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return b"".join(parts)


JSON = "application/json"
