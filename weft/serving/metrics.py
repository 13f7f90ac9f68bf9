"""What Prometheus reads of a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

if TYPE_CHECKING:
    from weft.serving.scheduler import Scheduler
    from weft.serving.workers import Workers

CONTENT_TYPE = CONTENT_TYPE_LATEST
WAITS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKENS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counts and times of one server; the scheduler's ``Watcher``."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        to = self._registry
        self._requests = Counter("weft_requests", "Answers, by route and HTTP status", ["route", "status"], registry=to)
        self._prompt = Counter("weft_prompt_tokens", "Tokens of prompts that were decoded for", registry=to)
        self._generated = Counter("weft_generated_tokens", "Tokens that were generated", registry=to)
        self._wait = Histogram(
            "weft_time_to_first_token_seconds", "From a request to its first token", buckets=WAITS_S, registry=to
        )
        self._token = Histogram(
            "weft_time_per_output_token_seconds", "Mean of a request, after its first", buckets=TOKENS_S, registry=to
        )

    def watch(self, scheduler: Scheduler, workers: Workers) -> None:
        """Read from these what is asked for when it is asked for."""
        for name, text, read in (
            ("weft_requests_running", "Requests being decoded", lambda: scheduler.running),
            ("weft_requests_waiting", "Requests in the queue", lambda: scheduler.waiting),
            (
                "weft_cache_tokens_used",
                "Slots of the cache promised to requests",
                lambda: scheduler.slots_used,
            ),
            (
                "weft_cache_tokens",
                "Slots of the cache",
                lambda: scheduler.facts.capacity_tokens if scheduler.facts else 0,
            ),
            ("weft_ready", "1 where requests are decoded", lambda: int(scheduler.ready)),
            ("weft_worker_restarts", "Times the workers were started again", lambda: workers.restarts),
        ):
            Gauge(name, text, registry=self._registry).set_function(read)

    def answered(self, route: str, status: int) -> None:
        """A request has its answer, or the head of one."""
        self._requests.labels(route, str(status)).inc()

    def first_token(self, wait_s: float) -> None:
        """See Watcher."""
        self._wait.observe(wait_s)

    def ended(self, tokens: int, prompt: int, decode_s: float) -> None:
        """See Watcher."""
        self._generated.inc(tokens)
        self._prompt.inc(prompt)
        if tokens > 1:
            self._token.observe(decode_s / (tokens - 1))

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)
