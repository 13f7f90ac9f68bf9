"""Predictor: what a workload's ``predict`` gives for a global batch, on every rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from weft.containers import opened
from weft.errors import InputError, ModelError
from weft.plan import Plan
from weft.runtime.batches import count_samples, cut, layout
from weft.runtime.delivery import Delivery
from weft.runtime.ending import Function
from weft.runtime.forwards import Evaluation, Forwards
from weft.runtime.grid import Grid
from weft.runtime.shared import share
from weft.workload import Workload


def predict_of(workload: Workload) -> Function:
    """What a workload predicts.

    Raises:
        InputError: it does not say.
    """
    if workload.predict is None:
        raise InputError(
            "this Workload does not say what to predict; give it predict=lambda model, batch: ..., which returns "
            "tensors with the samples in dimension 0"
        )
    return workload.predict


class Predictor:
    """Predictions of one job.

    Args:
        forwards: of the workload's ``predict``.
        workload, plan, grid: of the job.
    """

    def __init__(self, forwards: Forwards, workload: Workload, plan: Plan, grid: Grid) -> None:
        self.forwards, self.workload, self.plan, self.grid = forwards, workload, plan, grid
        self._delivery: Delivery | None = None

    def predict(self, batch: Any) -> Any:
        """Predictions for a whole batch, the same on every rank. All ranks call it with the same batch.

        Args:
            batch: as the workload's ``collate`` makes it, of any number of samples.

        Returns:
            what the workload's ``predict`` gives for the whole batch: tensors with the samples in dimension 0.

        Raises:
            BatchError: its tensors do not share a dimension of samples.
            ModelError: what ``predict`` gives does not have the samples in dimension 0.
        """
        batch = opened(batch)
        every = self._layout(count_samples(batch))
        with Evaluation(self.forwards.placement.model):
            parts = self._parts([cut(batch, samples) for samples in every[self.grid.replica]])
        self.forwards.finish()
        return whole(share(parts, self.grid), every)

    def predictions(self, batches: Iterable[Sequence[int]]) -> Iterator[Any]:
        """Predictions for one batch after the other. All ranks call it with the same batches and go through all of it.

        A rank reads its own samples alone, and no replica waits for another to begin the next batch.

        Args:
            batches: numbers of samples in the workload's data.

        Yields:
            on rank 0, for every batch in order, what ``predict`` gives for it, on the CPU. Nothing on the other ranks.

        Raises:
            ModelError: what ``predict`` gives does not have the samples in dimension 0.
        """
        if self._delivery is None:
            self._delivery = Delivery(self.grid)
        exchange, layouts = self._delivery.open(), deque[list[list[range]]]()
        for numbers in batches:
            for results in exchange.begin():
                yield whole(results, layouts.popleft())
            every = self._layout(len(numbers))
            layouts.append(every)
            mine = [[numbers[n] for n in r] or numbers[:1] for r in every[self.grid.replica]]
            with Evaluation(self.forwards.placement.model):
                exchange.put(self._parts([opened(self.workload.batch_of(own)) for own in mine]))
        self.forwards.finish()
        for results in exchange.end():
            yield whole(results, layouts.popleft())

    def _layout(self, total: int) -> list[list[range]]:
        """Which of so many samples are in every microbatch of every replica."""
        microbatches = min(self.plan.microbatches, max(1, total // self.plan.replicas))
        return layout(total, self.plan.portions, microbatches)

    def _parts(self, microbatches: Iterable[Any]) -> list[Any]:
        """What this stage gives for this replica's microbatches."""
        return [without_classes(opened(self.forwards.run(microbatch))) for microbatch in microbatches]


def whole(every: Sequence[Sequence[Any]], ranges: Sequence[Sequence[range]]) -> Any:
    """The predictions for a batch, of what each replica has for its microbatches and which samples those are."""
    pieces = {}
    for results, theirs in zip(every, ranges, strict=True):
        for samples, result in zip(theirs, results, strict=True):
            if len(samples):
                pieces[samples.start] = checked(result, len(samples))
    return joined([pieces[start] for start in sorted(pieces)])


def without_classes(result: Any) -> Any:
    """The same in plain dicts where it is in a class of dicts, as models of transformers return."""
    if isinstance(result, dict):
        return {key: without_classes(value) for key, value in result.items()}
    return result


def checked(result: Any, samples: int) -> Any:
    """The result of so many samples.

    Raises:
        ModelError: one of its tensors has not as many.
    """

    def check(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or len(leaf) != samples):
            raise ModelError(
                f"predict(model, batch) of {samples} samples returned a tensor of shape {tuple(leaf.shape)}; every "
                "tensor it returns needs the samples in dimension 0, so that batches can be divided"
            )
        return leaf

    return tree_map(check, result)


def joined(parts: list[Any]) -> Any:
    """Results of consecutive samples as one."""
    flat = [tree_flatten(part) for part in parts]
    leaves = [
        torch.cat(list(each)) if isinstance(each[0], Tensor) else each[0]
        for each in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return tree_unflatten(leaves, flat[0][1])
