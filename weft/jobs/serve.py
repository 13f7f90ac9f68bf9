"""Serve: a target's model, divided by a plan, behind HTTP.

The process that starts the workers imports torch while this one plans.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from weft.capture.inference import Tokens, capture_inference
from weft.cluster import Cluster
from weft.engines import parallelize
from weft.inference.decoder import make_decoder
from weft.plan import Plan
from weft.planner import choose_inference
from weft.runtime import memory
from weft.runtime.worker import join
from weft.serving.decoder import Decoder
from weft.serving.job import Job
from weft.serving.launcher import Launcher
from weft.serving.scheduler import Facts
from weft.serving.server import Settings, listener, serve
from weft.serving.tokenizer import tokenizer_of
from weft.target import Target


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to serve.

    Attributes:
        plan: how the model is divided; None: as a search for ``cluster`` finds.
        cluster: what to plan for, where there is no plan.
        constraints: what a search must keep to.
        memory_bytes: limit of each device, or of one after the other; empty: none.
        checkpoint: folder whose newest checkpoint has the weights; None: the target's own.
        cache_tokens: slots of the cache of all requests together; None: what a share of the free memory holds.
        tokenizer: directory to read the tokenizer from; None: the target's own.
        settings: of the server.
    """

    plan: Plan | None = None
    cluster: Cluster | None = None
    constraints: Mapping[str, Any] = field(default_factory=dict)
    memory_bytes: tuple[int, ...] = ()
    checkpoint: str | None = None
    cache_tokens: int | None = None
    tokenizer: Path | None = None
    settings: Settings


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A server that is ready."""

    url: str
    model: str
    plan: Plan
    facts: Facts

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"url": self.url, "model": self.model, **asdict(self.facts), "plan": self.plan.to_json()}

    def describe(self) -> str:
        """One line."""
        on = "one device" if self.plan.devices == 1 else f"{self.plan.devices} devices ({self.plan.describe()})"
        return (
            f"{self.url}/v1 serves {self.model} on {on}: room for {self.facts.capacity_tokens:,} tokens, "
            f"{self.facts.max_length:,} a request. Ctrl-C ends it."
        )


def run(
    target: Target, order: Order, *, on_ready: Callable[[Serving], None], say: Callable[[str], None] = print
) -> None:
    """Serve until this process is told to end, by Ctrl-C or SIGTERM. Called in the main thread.

    Args:
        on_ready: is called once the model can be asked, the first time.
        say: tells people what happened, in one line.

    Raises:
        InputError: what was asked for cannot be.
        WorkerError: the workers could not be started the first time.
        KeyboardInterrupt: Ctrl-C.
    """
    at = listener(order.settings)
    with contextlib.closing(at), contextlib.closing(Launcher()) as launcher:
        target.load()  # what is wrong with it shows before any worker starts
        tokenizer = tokenizer_of(target, order.tokenizer)
        plan = order.plan or planned(target, order)
        host = f"[{order.settings.host}]" if ":" in order.settings.host else order.settings.host
        url = f"http://{host}:{at.getsockname()[1]}"
        if order.settings.api_key is None and not at.getsockname()[0].startswith(("127.", "::1")):
            say(f"whoever reaches {url} may use it; --api-key @FILE asks for a key")
        told: list[Serving] = []

        def ready(facts: Facts) -> None:
            if not told:
                told.append(Serving(url=url, model=order.settings.model, plan=plan, facts=facts))
                on_ready(told[0])
            else:
                say("the workers are ready again")

        job = Job(
            make=functools.partial(decoder_here, target, plan, order.checkpoint, order.cache_tokens),
            devices=plan.devices,
            memory=order.memory_bytes,
        )
        with ending_by_sigterm():
            asyncio.run(serve(order.settings, job, tokenizer, launcher=launcher, at=at, on_ready=ready, say=say))


@contextlib.contextmanager
def ending_by_sigterm() -> Iterator[None]:
    """Have SIGTERM end this process as if it had come to its end. uvicorn answers what is under way first, and raises
    the signal again when it is done."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def planned(target: Target, order: Order) -> Plan:
    """A plan to serve as many requests at once by as the order allows.

    Raises:
        InputError: the model does not generate.
        PlanError: what is fixed cannot be.
    """
    assert order.cluster is not None
    precision = order.constraints.get("precision", "float32")
    at_once = order.settings.max_concurrent
    what = capture_inference(target.load(), precision, tokens=Tokens(), batch_size=at_once)
    return choose_inference(what, order.cluster, **{"dp_shard": 1, **order.constraints}).plan


def decoder_here(target: Target, plan: Plan, checkpoint: str | None, cache_tokens: int | None) -> Decoder:
    """The decoder, in every process of a job."""
    join()
    with memory.uncounted():  # the libraries it brings are no memory of the plan
        workload = target.load()
    engine = parallelize(workload, plan, purpose="inference")
    if checkpoint is not None:
        engine.load(checkpoint)
    return make_decoder(engine, cache_tokens)
