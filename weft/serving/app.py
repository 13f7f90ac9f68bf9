"""The routes."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

import weft
from weft.serving import protocol
from weft.serving.answers import ChatForm, CompletionForm, Form, answer
from weft.serving.completion import request_of
from weft.serving.metrics import CONTENT_TYPE, Metrics
from weft.serving.refusal import RefusedError
from weft.serving.scheduler import Scheduler
from weft.serving.tokenizer import Tokenizer
from weft.serving.workers import Workers

REASONS = {
    400: "The request is wrong; the message says what.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "Too many requests wait.",
    500: "A worker process failed.",
    503: "The model is not ready.",
}


def make_app(
    *, model: str, scheduler: Scheduler, workers: Workers, tokenizer: Tokenizer, metrics: Metrics, guarded: bool
) -> FastAPI:
    """The application of one server.

    Args:
        model: the name it is served by.
        guarded: whether an API key is asked for, to be told in the description of the routes.
    """
    bearer = HTTPBearer(auto_error=False, description="the key that the server was started with")
    app = FastAPI(
        title="weft serve",
        version=weft.__version__,
        description=f"{model}, divided over devices. The routes are OpenAI's.",
    )
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(bearer)] if guarded else [])
    created = int(time.time())

    def described() -> protocol.Model:
        facts = scheduler.facts
        if facts is None:
            return protocol.Model(id=model, created=created)
        return protocol.Model(
            id=model,
            created=created,
            max_model_len=min(facts.max_length, facts.capacity_tokens),
            vocabulary=facts.vocabulary,
            devices=facts.devices,
        )

    async def complete(http: HttpRequest, body: protocol.CompletionBody | protocol.ChatBody, form: Form) -> Response:
        if body.model != model:
            text = f"there is no model {body.model!r} here; it is called {model!r}"
            raise RefusedError(404, text, code="model_not_found", param="model")
        ticket = scheduler.submit(await request_of(body, scheduler, tokenizer))
        found = await answer(http, scheduler, ticket, body, tokenizer, form)
        metrics.answered(http.url.path, found.status_code)
        return found

    @v1.post("/completions", response_model=protocol.Completion, responses=STREAMED)
    async def completions(http: HttpRequest, body: protocol.CompletionBody) -> Response:
        """Go on with a text, or with token ids."""
        return await complete(http, body, CompletionForm(model))

    @v1.post("/chat/completions", response_model=protocol.Chat, responses=STREAMED)
    async def chat_completions(http: HttpRequest, body: protocol.ChatBody) -> Response:
        """Answer a conversation."""
        return await complete(http, body, ChatForm(model))

    @v1.get("/models", responses=errors(401))
    async def models() -> protocol.Models:
        """What is served."""
        return protocol.Models(data=[described()])

    @v1.get("/models/{name:path}", responses=errors(400, 401, 404))
    async def one_model(name: str) -> protocol.Model:
        """The model of a name."""
        if name != model:
            raise RefusedError(404, f"there is no model {name!r} here; it is called {model!r}", code="model_not_found")
        return described()

    app.include_router(v1)

    @app.get("/health", response_model=protocol.Health, responses={503: {"model": protocol.Health}})
    async def health() -> Response:
        """Whether requests are decoded: 200, or 503."""
        facts = scheduler.facts
        found = protocol.Health(
            status="ready" if scheduler.ready else "not ready",
            running=scheduler.running,
            waiting=scheduler.waiting,
            cache_tokens_used=scheduler.slots_used,
            cache_tokens=None if facts is None else facts.capacity_tokens,
            restarts=workers.restarts,
        )
        return Response(found.model_dump_json(), 200 if scheduler.ready else 503, media_type="application/json")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    def refused(http: HttpRequest, refusal: RefusedError, more: dict[str, str] | None = None) -> Response:
        route = http.scope.get("route")
        metrics.answered(getattr(route, "path", "other"), refusal.status)
        return Response(refusal.body(), refusal.status, {**refusal.headers, **(more or {})}, "application/json")

    @app.exception_handler(RefusedError)
    async def on_refusal(http: HttpRequest, error: RefusedError) -> Response:
        return refused(http, error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(http: HttpRequest, error: RequestValidationError) -> Response:
        return refused(http, reason_of(error))

    @app.exception_handler(HTTPException)
    async def on_http(http: HttpRequest, error: HTTPException) -> Response:
        text = f"{http.method} {http.url.path}: {error.detail}"
        return refused(http, RefusedError(error.status_code, text), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def on_failure(http: HttpRequest, error: Exception) -> Response:
        return refused(http, RefusedError(500, f"the server failed: {type(error).__name__}"))

    return app


def reason_of(error: RequestValidationError) -> RefusedError:
    """What is wrong with a body, by its first fault in each field."""
    if any(fault["type"] == "json_invalid" for fault in error.errors()):
        return RefusedError(400, "the body is not JSON")
    faults: dict[str, str] = {}
    for fault in error.errors():
        place = ".".join(str(part) for part in fault["loc"][1:]) or "the body"
        faults.setdefault(place, fault["msg"])
    told = "; ".join(f"{place}: {text}" for place, text in faults.items())
    first = str(next((fault["loc"][1] for fault in error.errors() if len(fault["loc"]) > 1), ""))
    return RefusedError(400, told, param=first or None)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The description of answers that are errors."""
    return {status: {"model": protocol.Error, "description": REASONS[status]} for status in statuses}


STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "The answer."},
    **errors(*REASONS),
}
