"""Predictor: what a workload's ``predict`` gives for a global batch, on every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from weft.containers import opened
from weft.errors import InputError, ModelError
from weft.plan import Plan
from weft.runtime.batches import count_samples, divide, layout
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
        plan, grid: of the job.
    """

    def __init__(self, forwards: Forwards, plan: Plan, grid: Grid) -> None:
        self.forwards, self.plan, self.grid = forwards, plan, grid

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
        total = count_samples(batch)
        microbatches = min(self.plan.microbatches, max(1, total // self.plan.replicas))
        mine = divide(batch, replica=self.grid.replica, shares=self.plan.portions, microbatches=microbatches)
        parts = []
        with Evaluation(self.forwards.placement.model):
            for microbatch in mine.microbatches:
                parts.append(opened(self.forwards.run(microbatch)))
        self.forwards.finish()
        last = self.grid.stage == self.plan.pp - 1
        every = share(list(map(without_classes, parts)) if last else None, self.grid)
        pieces = {}
        for ranges, results in zip(layout(total, self.plan.portions, microbatches), every, strict=True):
            for samples, result in zip(ranges, results, strict=True):
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
