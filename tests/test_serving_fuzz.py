"""Requests of all kinds, drawn from the server's own description of its routes, and from outside it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import hypothesis
import pytest
from reference_decoder import CountingDecoder
from serving import KEY, Running, server

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what it imports
    import schemathesis

CASES = 40
"""Of each route."""


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with server(CountingDecoder, max_queue=1000) as found:
        yield found
        assert found.idle()["restarts"] == 0


@pytest.fixture(scope="module")
def schema(running: Running) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{running.url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"})


routes = schemathesis.pytest.from_fixture("schema")


@routes.parametrize()
@hypothesis.settings(max_examples=CASES, suppress_health_check=list(hypothesis.HealthCheck), deadline=None)
def test_every_answer_is_as_described(case: schemathesis.Case, running: Running):
    case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
    assert running.health()["status"] == "ready"
