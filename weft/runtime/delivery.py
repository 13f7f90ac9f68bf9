"""Delivery: results brought to rank 0 batch by batch, while every replica goes on with its own.

A replica does not wait for another: its results leave while it computes the next batch, and a thread of rank 0 takes
them in. None is more than AHEAD batches ahead of rank 0, or rank 0 of it, so that what waits is bounded::

    replica 0 (rank 0)   batch 0   batch 1     batch 2   ...
      its thread           0 of replica 1    1 of replica 1
    replica 1            batch 0     batch 1      batch 2

Results travel as bytes through the memory of the hosts, since they are going to be written: a group of Gloo of its own,
which other traffic does not meet.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Iterator
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from weft.runtime.grid import Grid
from weft.runtime.shared import tellers

AHEAD = 8
"""Batches."""


class Delivery:
    """The way of results to rank 0. All ranks make it.

    Args:
        grid: the ranks.
    """

    def __init__(self, grid: Grid) -> None:
        self._rank, self._sources = dist.get_rank(), tellers(grid)
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None

    def open(self) -> Exchange:
        """One sequence of batches."""
        return Exchange(self._rank, self._sources, self._group)


class Exchange:
    """The results of a sequence of batches, on one rank; ``begin`` and ``put`` are called for every batch in order.

    Args:
        rank: this one.
        sources: the rank of each replica that has its results.
        group: of all ranks; None: there is one.
    """

    def __init__(self, rank: int, sources: list[int], group: dist.ProcessGroup | None) -> None:
        self._rank, self._sources, self._group = rank, sources, group
        self._sends: deque[list[tuple[dist.Work | None, Tensor]]] = deque()
        self._own: deque[Any] = deque()
        self._begun: SimpleQueue[bool] = SimpleQueue()
        self._came: SimpleQueue[list[Any] | Exception] = SimpleQueue()
        self._missing = 0
        if rank == 0 and any(self._sources):
            Thread(target=self._receive, name="weft results", daemon=True).start()

    def begin(self) -> Iterator[list[Any]]:
        """A batch begins: first comes what has to be out of the way, on rank 0, as from ``end``."""
        while len(self._sends) > AHEAD:
            self._leave()
        if self._rank == 0:
            while self._missing >= AHEAD or not self._came.empty():
                yield self._next()
            self._missing += 1
            self._begun.put(True)  # from here on the thread may take its results in

    def put(self, result: Any) -> None:
        """This replica's results of the batch that was begun last. Not looked at on ranks that do not tell."""
        if self._rank not in self._sources:
            return
        result = tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, result)
        if self._rank == 0:
            self._own.append(result)
            if not any(self._sources):
                self._came.put([])
            return
        body = torch.frombuffer(bytearray(pickle.dumps(result)), dtype=torch.uint8)
        sends = [torch.tensor([len(body)]), body]
        self._sends.append([(dist.isend(x, group=self._group, group_dst=0), x) for x in sends])

    def end(self) -> Iterator[list[Any]]:
        """All batches were begun: the results that are missing, on rank 0, each by replica."""
        while self._sends:
            self._leave()
        if self._rank == 0:
            self._begun.put(False)
            while self._missing:
                yield self._next()

    def _next(self) -> list[Any]:
        """The results of the oldest batch that were not given out."""
        came = self._came.get()
        if isinstance(came, Exception):
            raise came
        self._missing -= 1
        others = iter(came)
        return [self._own.popleft() if source == 0 else next(others) for source in self._sources]

    def _leave(self) -> None:
        """Wait until the oldest batch's results have left."""
        for work, _ in self._sends.popleft():
            assert work is not None
            work.wait()

    def _receive(self) -> None:
        """The thread: for every batch that was begun, what the other replicas have."""
        try:
            while self._begun.get():
                self._came.put([self._received(source) for source in self._sources if source])
        except Exception as error:  # whatever the process group raises is raised again where it is waited for
            self._came.put(error)

    def _received(self, source: int) -> Any:
        size = torch.zeros(1, dtype=torch.long)
        dist.recv(size, group=self._group, group_src=source)
        body = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(body, group=self._group, group_src=source)
        return pickle.loads(body.numpy().tobytes())
