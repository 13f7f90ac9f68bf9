"""Requests of all kinds, drawn from the server's own description of its routes, and from outside it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import hypothesis
import psutil
import pytest
import requests
from hypothesis import strategies as st
from reference_decoder import CountingDecoder
from serving import KEY, MODEL, Bytes, Running, server, workers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    import schemathesis
    from schemathesis.specs.openapi.checks import positive_data_acceptance  # no schema says what fits a model

CASES = hypothesis.settings.default.max_examples // 4
"""Of each route and each kind: 250 cases in all, and 2,500 with ``--hypothesis-profile long``."""

ROUTES = {
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
    "/v1/models": "GET",
    "/v1/models/{name}": "GET",
    "/health": "GET",
    "/metrics": "GET",
}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with server(CountingDecoder, tokenizer=Bytes(), max_queue=1000) as found:
        before = {process.pid for process in workers()}
        yield found
        health = found.idle()
        assert (health["status"], health["restarts"], health["cache_tokens_used"]) == ("ready", 0, 0)
        assert {process.pid for process in workers()} == before
        assert all(process.status() != psutil.STATUS_ZOMBIE for process in workers())


def test_the_description_has_these_routes(running: Running):
    with running.http() as http:
        paths = http.get("/openapi.json").json()["paths"]
    assert {path.replace(":path", ""): next(iter(found)).upper() for path, found in paths.items()} == ROUTES


def fitting(body: dict[str, Any]) -> dict[str, Any]:
    """The same body where what only this server's model decides is right, or all would be sent away for that."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and all(type(id) is int for id in prompt):
        body = {**body, "prompt": [id % 256 for id in prompt][:200]}
    body = {name: value for name, value in body.items() if name != "stop_token_ids" or type(value) is not list}
    if type(body.get("max_tokens")) is int and body["max_tokens"] > 8:
        body = {**body, "max_tokens": 8}
    return {**body, "model": MODEL} if isinstance(body.get("model"), str) else body


KINDS = [
    pytest.param(route, mode, id=f"{route}-{mode.value}")
    for route in ROUTES
    for mode in schemathesis.GenerationMode
    if mode is schemathesis.GenerationMode.POSITIVE or route.startswith("/v1")  # elsewhere nothing can be wrong
]


@pytest.mark.parametrize(("route", "mode"), KINDS)
@pytest.mark.matrix
def test_every_answer_is_as_described(running: Running, route: str, mode: schemathesis.GenerationMode):
    headers = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json", headers=headers)
    operation = schema[route][ROUTES[route]]

    asked = 0

    @hypothesis.settings(max_examples=CASES, suppress_health_check=list(hypothesis.HealthCheck), database=None)
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode), right=st.booleans())
    def ask(case: schemathesis.Case, right: bool) -> None:
        nonlocal asked
        asked += 1
        if right and isinstance(case.body, dict):
            case.body = fitting(case.body)
        with requests.Session() as session:
            answer = case.call(headers=headers, timeout=30, session=session)
        assert answer.status_code < 500
        if answer.text == "Invalid HTTP request received.":
            return  # a header that is no HTTP (content-length: Inf): uvicorn has answered, and no route was reached
        case.validate_response(answer, excluded_checks=[positive_data_acceptance])

    ask()
    print(f"{asked} cases")
