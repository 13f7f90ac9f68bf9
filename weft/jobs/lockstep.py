"""Lockstep: replicas on one device that normalise together, each drawing from its own random streams.

Every replica's forward runs in a thread of its own, one at a time, up to the next normalisation over the batch. There
it waits until all have come; the rows of all are normalised in one piece by torch itself, and each goes on with its own
part. What a replica has drawn does not move another's generator.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def run_together(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run forwards, whose normalisations over the batch meet; their results, in order."""
    return _Lockstep(len(jobs)).run(jobs)


class _Lockstep:
    def __init__(self, count: int) -> None:
        self.turns = [threading.Semaphore(0) for _ in range(count)]
        self.over = threading.Semaphore(0)
        self.given: list[Tensor | None] = [None] * count
        self.taken: list[Tensor] = []
        self.results: list[Any] = [None] * count
        self.error: BaseException | None = None

    def run(self, jobs: Sequence[Callable[[], Any]]) -> list[Any]:
        threads = [threading.Thread(target=self._run, args=(r, job), daemon=True) for r, job in enumerate(jobs)]
        for thread in threads:
            thread.start()
        before = _generators()
        self.turns[0].release()
        self.over.acquire()
        _set_generators(before)
        if self.error is not None:
            raise self.error
        return self.results

    def meet(self, r: int, x: Tensor, settings: dict[str, Any]) -> Tensor:
        self.given[r] = x
        mine = _generators()
        if r == len(self.turns) - 1:
            self.taken = _normalise([x for x in self.given if x is not None], settings)
        self.turns[(r + 1) % len(self.turns)].release()
        self.turns[r].acquire()
        _set_generators(mine)
        return self.taken[r]

    def _run(self, r: int, job: Callable[[], Any]) -> None:
        self.turns[r].acquire()
        try:
            with _Meeting(self, r):
                self.results[r] = job()
        except BaseException as error:  # it is raised where the replicas were started
            self.error = error
            self.over.release()
            return
        if r == len(self.turns) - 1:
            self.over.release()
        else:
            self.turns[r + 1].release()


class _Meeting(TorchFunctionMode):
    def __init__(self, lockstep: _Lockstep, r: int) -> None:
        super().__init__()
        self.lockstep, self.r = lockstep, r

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and kwargs.get("training"):
            x, running_mean, running_var = args
            return self.lockstep.meet(self.r, x, {"running_mean": running_mean, "running_var": running_var, **kwargs})
        return func(*args, **kwargs)


def _normalise(xs: list[Tensor], settings: dict[str, Any]) -> list[Tensor]:
    """Normalise in one piece. The last one's running statistics are updated."""
    rows = [x.movedim(1, -1) for x in xs]
    flat = [x.reshape(-1, x.shape[-1]) for x in rows]
    out = torch.split(F.batch_norm(torch.cat(flat), **settings), [len(x) for x in flat])
    # laid out in memory as what came in: masks are drawn in the order of the memory
    return [torch.empty_like(x).copy_(y.view(r.shape).movedim(-1, 1)) for x, r, y in zip(xs, rows, out, strict=True)]


def _generators() -> tuple[Any, ...]:
    accelerator = torch.accelerator.current_accelerator()
    device = None if accelerator is None else torch.get_device_module(accelerator).get_rng_state()
    return torch.get_rng_state(), device, random.getstate(), np.random.get_state()


def _set_generators(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.get_device_module().set_rng_state(states[1])
    random.setstate(states[2])
    np.random.set_state(states[3])
