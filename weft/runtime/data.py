"""Data parallelism: gradients are summed over the replicas once a step, while the last microbatch's backward runs.

Three ways, one face. Which one is a function of the plan:

    replicas that hold whole copies     DistributedDataParallel's reducer: buckets, overlapped with backward
    the same, with divided tensors      replicate() of the FSDP2 family, which takes DTensors
    sharded (dp_shard > 1)              fully_shard(): parameters are gathered when used, gradients reduce-scattered;
                                        with dp_replicate > 1 too, then all-reduced over the replicas of a shard

All sum. The weights that turn the sum into the mean over the global batch are in the losses (``engine``).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from weft.plan import Plan
from weft.runtime.grid import Grid
from weft.runtime.touch import forget_untouched


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
    """Sharded parameters (fully_shard) or whole copies of divided tensors (replicate): the FSDP2 family."""

    loss_scale = 1.0

    def __init__(self, modules: list[FSDPModule], grid: Grid, conditional: Sequence[nn.Parameter] = ()) -> None:
        # The output of a divided module is a view of its DTensor's local part; nothing here writes to it.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
        self._modules, self._grid, self._conditional = modules, grid, conditional
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
        """FSDP finishes in a callback at the end of the backward. What no replica used has no gradient."""
        forget_untouched(self._conditional, self._grid)


def shard(
    model: nn.Module, units: Sequence[nn.Module], absent: set[nn.Parameter], grid: Grid, plan: Plan
) -> list[FSDPModule]:
    """Apply fully_shard, or replicate for divided tensors, to units and then to the model, which takes what is left.

    Args:
        model: the user's model.
        units: modules whose parameters are gathered together.
        absent: parameters that live on other stages.
        grid, plan: of the job.

    Returns:
        Every wrapped module, the root last.
    """
    if plan.dp_shard > 1:
        names = ("dp_replicate", "dp_shard") if plan.dp_replicate > 1 else ("dp_shard",)
        mesh = grid.mesh[names]
        wrapped = [fully_shard(unit, mesh=mesh, ignored_params=absent) for unit in units]
        root = fully_shard(model, mesh=mesh, ignored_params=absent)
    else:
        mesh = grid.mesh["dp_replicate"]
        wrapped = [replicate(unit, mesh=mesh, ignored_params=absent) for unit in units]
        root = replicate(model, mesh=mesh, ignored_params=absent)
    return [*wrapped, root]
