"""Data parallelism: gradients are summed over the replicas once a step, while the last microbatch's backward runs.

Two ways, one face. Which one is a function of the plan:

    replicas that hold copies     DistributedDataParallel's reducer: buckets, overlapped with backward
    sharded (dp_shard > 1)        fully_shard(): parameters are gathered when used, gradients reduce-scattered; with
                                  dp_replicate > 1 too, then all-reduced over the replicas of a shard

What tensor parallelism divides are plain tensors here: a replica's copy is a copy of this rank's pieces. Both ways
sum. The weights that turn the sum into the mean over the global batch are in the losses (``engine``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from weft.plan import Plan
from weft.runtime.grid import Grid


class DataParallel(Protocol):
    """How the gradients of replicas come together."""

    loss_scale: float
    """What losses are multiplied by, so that the reduction gives a sum."""

    def before_backward(self, *, last: bool, roots: Sequence[Tensor]) -> None:
        """Called before every microbatch's backward from ``roots``; ``last`` starts the synchronisation."""

    def finish(self) -> None:
        """Called after the last backward."""


class Alone:
    """One replica: nothing to bring together."""

    loss_scale = 1.0

    def before_backward(self, *, last: bool, roots: Sequence[Tensor]) -> None:
        """Nothing to do."""

    def finish(self) -> None:
        """Nothing to do."""


class Replicated:
    """Whole copies, through the reducer of DistributedDataParallel over the bare parameters: no hook on the user's
    model.

    The reducer averages, hence ``loss_scale``. It is armed right before the last backward rather than in the forward,
    since in a pipeline the last forward comes before earlier microbatches' backwards.
    """

    def __init__(self, parameters: list[nn.Parameter], grid: Grid, *, some_unused: bool) -> None:
        self.loss_scale = float(grid.degree("dp_replicate"))
        trainable = [p for p in parameters if p.requires_grad]
        self._reducer = DistributedDataParallel(
            nn.ParameterList(trainable),
            process_group=grid.group("dp_replicate"),
            gradient_as_bucket_view=True,
            find_unused_parameters=some_unused,
            init_sync=False,  # every rank has drawn the same weights
        )
        self._some_unused = some_unused

    def before_backward(self, *, last: bool, roots: Sequence[Tensor]) -> None:
        """Arm the reducer for the last backward, keep it quiet before."""
        self._reducer.require_backward_grad_sync = last
        if last:
            self._reducer.reducer.prepare_for_backward(list(roots) if self._some_unused else [])

    def finish(self) -> None:
        """The reducer finishes inside the backward."""


class Sharded:
    """Sharded parameters, through fully_shard."""

    loss_scale = 1.0

    def __init__(self, modules: list[FSDPModule]) -> None:
        self._modules = modules
        self._syncing = True
        for module in modules:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def before_backward(self, *, last: bool, roots: Sequence[Tensor]) -> None:
        """Reduce in the last backward only."""
        root = self._modules[-1]
        root.set_is_last_backward(last)
        # What the root itself gathered is in the graphs of later microbatches too, and in the middle of a pipeline no
        # hook would gather it again for them: the model's own output is not computed there.
        root.set_reshard_after_backward(last, recurse=False)
        if last != self._syncing:
            root.set_requires_gradient_sync(last)
            self._syncing = last

    def finish(self) -> None:
        """FSDP finishes in a callback at the end of the backward."""


def shard(
    model: nn.Module, units: Sequence[nn.Module], absent: set[nn.Parameter], grid: Grid, plan: Plan
) -> list[FSDPModule]:
    """Apply fully_shard to units and then to the model, which takes what is left.

    Args:
        model: the user's model.
        units: modules whose parameters are gathered together.
        absent: parameters that live on other stages.
        grid, plan: of the job.

    Returns:
        Every wrapped module, the root last.
    """
    for module in (*units, model):
        module.register_forward_hook(_without_views)  # before fully_shard's own hooks: they see what it gives
    mesh = grid.mesh[("dp_replicate", "dp_shard") if plan.dp_replicate > 1 else ("dp_shard",)]
    wrapped = [fully_shard(unit, mesh=mesh, ignored_params=absent) for unit in units]
    return [*wrapped, fully_shard(model, mesh=mesh, ignored_params=absent)]


class _Alias(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _without_views(module: nn.Module, args: Any, output: Any) -> Any:
    """A module's output with no view in it, and nothing copied.

    fully_shard gathers parameters for the backward from a hook on the output; on a view (what ``nn.Linear`` gives for
    three dimensions) the hook is lost when the user's code writes to it (``x += y``).
    """

    def alias(value: Any) -> Any:
        if isinstance(value, Tensor) and value._base is not None and value.requires_grad:
            return cast(Tensor, _Alias.apply(value))  # type: ignore[no-untyped-call]  # torch's
        return value

    return tree_map(alias, output)
