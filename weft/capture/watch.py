"""Watch: what a forward does besides computing: statistics over the batch, changes to buffers.

None of it shows in the operations alone (an instance normalisation runs the operation of a batch normalisation, an
assignment to a buffer runs none), so the user's loss is watched from outside while it is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from weft.capture.recording import Recording

Loss = Callable[[nn.Module, Any], Any]


@dataclass
class Watch:
    """What was seen of a loss.

    Attributes:
        batch_statistics: a normalisation took its statistics from the batch.
        remade: it put modules in the place of others.
        changed: first names of the buffers that were changed, in the calls that were run: of repeated blocks one alone.
    """

    batch_statistics: bool = False
    remade: bool = False
    changed: set[str] = field(default_factory=set)

    def of(self, loss: Loss) -> Loss:
        """The loss, watched. It is given a model on fake tensors."""

        def watched(model: nn.Module, batch: Any) -> Any:
            modules = list(model.modules())
            before = {name: (buffer, buffer._version) for name, buffer in model.named_buffers()}
            with _Statistics(self, model):
                result = loss(model, batch)
            for name, buffer in model.named_buffers():
                if name in before and (before[name][0] is not buffer or before[name][1] != buffer._version):
                    self.changed.add(name)
            self.remade |= modules != list(model.modules())
            return result

        return watched

    def changed_in(self, recording: Recording) -> set[str]:
        """First names of all buffers a forward changes: blocks that were not run change what the one like them does."""
        names = set(self.changed)
        for call in recording.calls:
            example = recording.examples[call.kind].unit
            if example and example != call.unit:
                prefix = f"{example}."
                names |= {f"{call.unit}.{n.removeprefix(prefix)}" for n in self.changed if n.startswith(prefix)}
        return names


class _Statistics(TorchFunctionMode):
    """Notes normalisations over the batch, and answers what they count their batches with."""

    def __init__(self, watch: Watch, model: nn.Module) -> None:
        super().__init__()
        self.watch = watch
        self.names = {id(buffer): name for name, buffer in model.named_buffers()}
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.num_batches_tracked is not None]
        # a cumulative average divides by the number of batches, which no fake tensor knows
        self.counters = {id(m.num_batches_tracked) for m in norms}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run and note."""
        kwargs = kwargs or {}
        if func is F.batch_norm and kwargs.get("training"):
            self.watch.batch_statistics = True
            x, *running = args
            self.watch.changed |= {self.names[id(t)] for t in running if id(t) in self.names}
            if x.numel() == x.shape[1]:  # refused for one replica's only sample, though all replicas' are normalised
                return func(x, x.new_zeros(x.shape[1]), x.new_ones(x.shape[1]), **{**kwargs, "training": False})
        if func is Tensor.__float__ and id(args[0]) in self.counters:
            return 1.0
        return func(*args, **kwargs)


def plain_synchronised(model: nn.Module) -> None:
    """Let synchronised normalisations of a model run as on one device; who meets whom is for the plan to say."""
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            vars(module)["forward"] = partial(_BatchNorm.forward, module)
