"""Workers that hang: noticed soon, and not taken for those that compute for long."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest
import torch.distributed as dist
from reference_decoder import CountingDecoder
from serving import KEY, MODEL, Running, server, workers

from weft.serving.decoder import Request
from weft.serving.pulse import SERVING_LOOKS, Pulse

PATIENCE = 5
"""Looks that the tests' server has for workers that do nothing."""


@dataclass
class Process:
    """One that is looked at."""

    used_s: float = 0.0
    state: str = psutil.STATUS_SLEEPING
    pid: int = 7

    def cpu_times(self) -> Any:
        times = psutil.Process().cpu_times()
        return times._replace(user=self.used_s / 2, system=self.used_s / 2)

    def status(self) -> str:
        return self.state


def looks(pulse: Pulse, most: int = 100) -> int:
    """After how many looks something is wrong; ``most``: nothing was."""
    return next((n for n in range(1, most) if pulse.look(SERVING_LOOKS)), most)


def test_workers_that_do_nothing_hang():
    pulse = Pulse(lambda: [Process(), Process()])
    assert looks(pulse) == SERVING_LOOKS
    assert "the workers hang: for 21 s there was no step" in str(pulse.look(SERVING_LOOKS))
    pulse.beat()
    assert looks(pulse) == SERVING_LOOKS


def test_a_step_may_take_as_long_as_it_computes():
    busy = Process()

    def seen() -> list[Process]:
        busy.used_s += 0.05  # of each second: there is not much of a core for it
        return [Process(), busy]

    assert looks(Pulse(seen)) == 100


def test_waiting_is_no_work():
    waiting = Process(used_s=500)

    def seen() -> list[Process]:
        waiting.used_s += 0.002
        return [waiting]

    assert looks(Pulse(seen)) <= SERVING_LOOKS + 1


def test_one_that_is_stopped_hangs_whatever_the_others_do():
    busy = Process()

    def seen() -> list[Process]:
        busy.used_s += 1
        return [Process(state=psutil.STATUS_STOPPED), busy]

    pulse = Pulse(seen)
    assert looks(pulse) == SERVING_LOOKS
    assert pulse.look(SERVING_LOOKS) == "worker process 7 is stopped"


class LongDecoder(CountingDecoder):
    """Computes for longer than anything may hang after a prompt of 8 tokens, and hangs on rank 1 after one of 9."""

    length = 0

    def join(self, requests: Sequence[Request]) -> None:
        super().join(requests)
        self.length = max(len(request.prompt) for request in requests)

    def step(self) -> dict[int, int]:
        if self.length == 9 and dist.get_rank() == 1:
            time.sleep(1000)
        until = time.monotonic() + (PATIENCE + 4 if self.length == 8 else 0.02)
        while time.monotonic() < until:
            sum(range(1000))
        self.length = 0
        dist.barrier()
        return super().step()


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch, server(LongDecoder, devices=2) as found:
        patch.setattr("weft.serving.workers.SERVING_LOOKS", PATIENCE)
        yield found


@pytest.mark.long
def test_a_long_step_is_let_be(running: Running):
    with running.http() as http:
        body = {"model": MODEL, "prompt": [1] * 8, "max_tokens": 2}
        assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == "2 3"
    assert running.health()["restarts"] == 0


@pytest.mark.parametrize("how", ["stopped", "asleep"])
@pytest.mark.long
def test_a_worker_that_hangs_is_noticed_and_replaced(running: Running, how: str):
    before = running.health()["restarts"]
    victim = max(workers(), key=psutil.Process.create_time)  # rank 1

    async def asked() -> httpx.Response:
        async with httpx.AsyncClient(base_url=running.url, headers={"Authorization": f"Bearer {KEY}"}) as http:
            body = {"model": MODEL, "prompt": [1] * (9 if how == "asleep" else 1), "max_tokens": 240}
            asking = asyncio.create_task(http.post("/v1/completions", json=body, timeout=60))
            if how == "stopped":
                await asyncio.sleep(1)
                victim.send_signal(signal.SIGSTOP)
            return await asking

    began = time.monotonic()
    response = asyncio.run(asked())
    assert response.status_code == 500
    said = response.json()["error"]["message"]
    assert (
        said == f"worker process {victim.pid} is stopped" if how == "stopped" else said.startswith("the workers hang")
    )
    assert time.monotonic() - began < PATIENCE + 10
    with running.http() as http:
        assert http.get("/health").status_code == 503
        while http.get("/health").status_code == 503:
            assert time.monotonic() - began < 60
            time.sleep(0.1)
        found = http.post("/v1/completions", json={"model": MODEL, "prompt": [1], "max_tokens": 3})
    assert found.json()["choices"][0]["text"] == "2 3 4"
    assert running.health()["restarts"] == before + 1
    assert said in running.said[-1]
    assert not victim.is_running()
