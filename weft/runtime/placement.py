"""Placement: the user's forward runs in full on every rank, with stand-ins for the calls that live elsewhere.

A unit's ``forward`` is replaced on the instance. A call of this stage runs the original. Any other call is a stand-in:
it costs nothing and returns, leaf by leaf, the tensor received from its owner where something on this stage needs it,
and an empty fake tensor of the recorded shape where nothing does. Glue code between units runs where its inputs are
real, and gives fake tensors where they are not.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_unflatten

from weft.adapters import running
from weft.capture.profile import Source
from weft.capture.recorder import RecordedCall, Recording, TensorLeaf
from weft.errors import LossError, ModelError
from weft.runtime.randomness import Seeds, stream
from weft.runtime.routes import Routes
from weft.workload import Loss, Workload

Call = Callable[..., Any]


@dataclass
class Run:
    """One forward of one microbatch on one stage.

    Attributes:
        recording: the recording of this microbatch's shapes.
        routes: what travels, for these shapes.
        received: outputs of other stages that this stage needs.
        seeds: of the random streams.
        produced: outputs of this stage's calls, filled as they run.
        seen: how often every unit has been called.
        unfinite: if values are checked, the number of the first call that gave a NaN or an infinity.
        check: whether to check.
    """

    recording: Recording
    routes: Routes
    received: Mapping[Source, Tensor]
    seeds: Seeds
    produced: dict[Source, Tensor] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)
    check: bool = False
    unfinite: int | None = None

    def produce(self, source: Source, tensor: Tensor) -> None:
        """Note an output of this stage."""
        self.produced[source] = tensor
        if self.check and self.unfinite is None and not bool(tensor.detach().isfinite().all()):
            self.unfinite = source.call


class Placement:
    """One stage's view of the model.

    Args:
        model: the user's model; units of this stage have real parameters, all others fake ones of ``mode``.
        units: names of the units.
        stage: the stage this rank runs.
        mode: the mode of this rank's fake tensors.
        device: the device of this rank.
    """

    def __init__(
        self, model: nn.Module, units: list[str], *, stage: int, mode: FakeTensorMode, device: torch.device
    ) -> None:
        self.model, self.stage, self.mode, self.device = model, stage, mode, device
        self._run: Run | None = None
        self._empty: dict[TensorLeaf, Tensor] = {}
        for name in units:
            module = model.get_submodule(name)
            module.forward = self._placed(name, module.forward)
            # registered last: sees what leaves the unit after PyTorch's own hooks
            module.register_forward_hook(self._note(name))

    def forward(self, workload: Workload, batch: Any, run: Run) -> Loss:
        """Run the user's loss for one microbatch; ``run.produced`` holds this stage's outputs afterwards.

        Returns:
            The user's loss: real on the last stage, fake on the others.

        Raises:
            ModelError: the forward took another path than the recorded one.
        """
        assert self._run is None
        self._run = run
        try:
            with running(self.device), stream(run.seeds.glue(), self.device, when=run.routes.glue_random):
                return workload.loss(self.model, batch)
        finally:
            self._run = None

    def _placed(self, unit: str, original: Call) -> Call:
        def forward(*args: Any, **kwargs: Any) -> Any:
            run = self._run
            if run is None:  # outside a step: the user calls the module by hand
                return original(*args, **kwargs)
            run.seen[unit] += 1
            number = run.routes.numbers.get((unit, run.seen[unit]))
            if number is None:
                raise ModelError(
                    f"{unit} was called {run.seen[unit]} times in a step, less often when the model was captured; the "
                    "forward depends on something that changes from step to step"
                )
            call = run.recording.calls[number]
            if run.routes.stage_of[number] != self.stage:
                return self._stand_in(run, number, call)
            if any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
                raise ModelError(
                    f"{call.name} was given a tensor that lives on another stage and was not used when the "
                    "model was captured; the forward depends on something that changes from step to step. Keep it on "
                    "one stage, or use pp=1"
                )
            with stream(run.seeds.call(number), self.device, when=number in run.routes.random):
                return original(*args, **kwargs)

        return forward

    def _note(self, unit: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            run = self._run
            if run is None:
                return
            number = run.routes.numbers[unit, run.seen[unit]]
            if run.routes.stage_of[number] == self.stage:
                tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
                for i, tensor in enumerate(tensors):
                    run.produce(Source(number, i), tensor)

        return hook

    def _stand_in(self, run: Run, number: int, call: RecordedCall) -> Any:
        count = itertools.count()
        leaves = [
            self._leaf(run, Source(number, next(count)), leaf) if isinstance(leaf, TensorLeaf) else leaf
            for leaf in call.leaves
        ]
        return tree_unflatten(leaves, call.spec)

    def _leaf(self, run: Run, source: Source, leaf: TensorLeaf) -> Tensor:
        if source in run.received:
            return run.received[source]
        if leaf not in self._empty:
            self._empty[leaf] = torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device="meta")
        # A new one every time: the glue may hang something on a tensor (Keras its masks).
        return FakeTensor(self.mode, self._empty[leaf], self.device)


def split_loss(loss: Any) -> tuple[Tensor, Tensor | int | float | None]:
    """A user's loss as ``(mean, None)`` or ``(sum, count)``.

    Raises:
        LossError: it is neither a scalar nor a pair of a scalar and a count.
    """
    value, count = loss if isinstance(loss, tuple) and len(loss) == 2 else (loss, None)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise LossError(f"loss(model, batch) must return a scalar tensor (a mean) or (sum, count); got {got}")
    if isinstance(count, Tensor) and count.numel() != 1:
        raise LossError(f"the count of (sum, count) must be one number; got a tensor of shape {tuple(count.shape)}")
    if count is not None and not isinstance(count, Tensor | int | float):
        raise LossError(f"the count of (sum, count) must be one number; got a {type(count).__name__}")
    return value, count
