"""The answers of the two routes that complete: the whole of it at once, or one event for each piece.

An answer lets go of its request however it ends: done, failed, or the client gone.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from weft.serving.completion import Piece, pieces, stops_of, usage_of
from weft.serving.protocol import (
    Chat,
    ChatBody,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatMessage,
    Completion,
    CompletionBody,
    CompletionChoice,
    Delta,
    Usage,
)
from weft.serving.refusal import RefusedError
from weft.serving.scheduler import End, Scheduler, Ticket
from weft.serving.tokenizer import Tokenizer

CLIENT_GONE = 499
"""The status, for the metrics, of an answer that nobody waits for any more."""


class Form(ABC):
    """How an answer looks; one for each route.

    Args:
        model: its name.
    """

    prefix = ""

    def __init__(self, model: str) -> None:
        id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._head: dict[str, Any] = {"id": id, "created": int(time.time()), "model": model}

    @abstractmethod
    def whole(self, text: str, end: End, usage: Usage) -> BaseModel:
        """The answer at once."""

    @abstractmethod
    def first(self) -> BaseModel | None:
        """The event before any text, if there is one."""

    @abstractmethod
    def chunk(self, piece: Piece) -> BaseModel:
        """The event of a piece."""

    @abstractmethod
    def last(self, usage: Usage) -> BaseModel:
        """The event with the counts."""


class CompletionForm(Form):
    """Of ``/v1/completions``."""

    prefix = "cmpl"

    def whole(self, text: str, end: End, usage: Usage) -> BaseModel:
        """See Form."""
        return Completion(**self._head, choices=[CompletionChoice(text=text, finish_reason=end)], usage=usage)

    def first(self) -> None:
        """There is none."""

    def chunk(self, piece: Piece) -> BaseModel:
        """See Form."""
        return Completion(**self._head, choices=[CompletionChoice(text=piece.text, finish_reason=piece.end)])

    def last(self, usage: Usage) -> BaseModel:
        """See Form."""
        return Completion(**self._head, choices=[], usage=usage)


class ChatForm(Form):
    """Of ``/v1/chat/completions``."""

    prefix = "chatcmpl"

    def whole(self, text: str, end: End, usage: Usage) -> BaseModel:
        """See Form."""
        choice = ChatChoice(message=ChatMessage(content=text), finish_reason=end)
        return Chat(**self._head, choices=[choice], usage=usage)

    def first(self) -> BaseModel:
        """Who speaks."""
        return self._with(Delta(role="assistant", content=""), None)

    def chunk(self, piece: Piece) -> BaseModel:
        """See Form."""
        return self._with(Delta(content=piece.text), piece.end)

    def last(self, usage: Usage) -> BaseModel:
        """See Form."""
        return ChatChunk(**self._head, choices=[], usage=usage)

    def _with(self, delta: Delta, end: End | None) -> ChatChunk:
        return ChatChunk(**self._head, choices=[ChatChunkChoice(delta=delta, finish_reason=end)])


async def at_once(
    http: HttpRequest, ticket: Ticket, body: CompletionBody | ChatBody, tokenizer: Tokenizer, form: Form
) -> Response:
    """The whole answer. Raises RefusedError: it could not be finished."""

    async def collect() -> Response:
        text: list[str] = []
        async for piece in pieces(ticket, tokenizer, stops_of(body)):
            text.append(piece.text)
        assert piece.end is not None
        found = form.whole("".join(text), piece.end, usage_of(ticket.request, piece.tokens))
        return Response(found.model_dump_json(), media_type="application/json")

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    collecting, leaving = asyncio.ensure_future(collect()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
        return collecting.result() if collecting.done() else Response(status_code=CLIENT_GONE)
    finally:
        collecting.cancel()
        leaving.cancel()


async def events(
    ticket: Ticket, body: CompletionBody | ChatBody, tokenizer: Tokenizer, form: Form
) -> AsyncIterator[bytes]:
    """The answer as server-sent events; what goes wrong on the way is an event too."""
    tokens = 0
    try:
        if (opening := form.first()) is not None:
            yield event(opening)
        async for piece in pieces(ticket, tokenizer, stops_of(body)):
            tokens = piece.tokens
            yield event(form.chunk(piece))
        if body.stream_options is not None and body.stream_options.include_usage:
            yield event(form.last(usage_of(ticket.request, tokens)))
    except RefusedError as refusal:
        yield b"data: " + refusal.body() + b"\n\n"
    yield b"data: [DONE]\n\n"


def event(data: BaseModel) -> bytes:
    """One server-sent event."""
    return b"data: " + data.model_dump_json(exclude_unset=False).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """Events, and what is to be done when they are over or nobody reads them any more."""

    def __init__(self, content: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def answer(
    http: HttpRequest,
    scheduler: Scheduler,
    ticket: Ticket,
    body: CompletionBody | ChatBody,
    tokenizer: Tokenizer,
    form: Form,
) -> Response:
    """The answer to a request that was submitted. Raises RefusedError: it could not be finished."""
    if body.stream:
        return EventStream(events(ticket, body, tokenizer, form), lambda: scheduler.withdraw(ticket))
    try:
        return await at_once(http, ticket, body, tokenizer, form)
    finally:
        scheduler.withdraw(ticket)
