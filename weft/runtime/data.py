"""Data parallelism: gradients are summed over the replicas once a step, while the last microbatch's backward runs.

Two ways, one face. Which one is a function of the plan:

    replicas that hold copies     a reducer of our own: buckets, overlapped with backward
    sharded (dp_shard > 1)        fully_shard(): parameters are gathered when used, gradients reduce-scattered; with
                                  dp_replicate > 1 too, then all-reduced over the replicas of a shard

What tensor parallelism divides are plain tensors here: a replica's copy is a copy of this rank's pieces. Both ways
sum. The weights that turn the sum into the mean over the global batch are in the losses (``engine``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_map

from weft.plan import Plan, shard_dim
from weft.runtime.grid import Grid
from weft.runtime.reducer import Reducer
from weft.runtime.touch import forget_untouched
from weft.runtime.unused import leave_unused

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Shard


class DataParallel(Protocol):
    """How the gradients of replicas come together."""

    def before_backward(self, *, last: bool) -> None:
        """Called before every microbatch's backward; ``last`` starts the synchronisation."""

    def finish(self) -> None:
        """Called after the last backward."""


class Alone:
    """One replica: nothing to bring together."""

    def before_backward(self, *, last: bool) -> None:
        """Nothing to do."""

    def finish(self) -> None:
        """Nothing to do."""


class Replicated:
    """Whole copies: a Reducer over the bare parameters, no hook on the user's model."""

    def __init__(self, parameters: list[nn.Parameter], grid: Grid) -> None:
        self._reducer = Reducer([p for p in parameters if p.requires_grad], grid.group("dp_replicate"))

    def before_backward(self, *, last: bool) -> None:
        """Arm the reducer for the last backward."""
        self._reducer.before_backward(last=last)

    def finish(self) -> None:
        """Wait for the sums."""
        self._reducer.finish()


class Sharded:
    """Sharded parameters, through fully_shard, as ``plan.zero`` says: 1 reduces gradients in the last backward only, 1
    and 2 gather parameters once a step."""

    def __init__(
        self, modules: list[FSDPModule], grid: Grid, zero: int, conditional: Sequence[nn.Parameter] = ()
    ) -> None:
        self._modules, self._grid, self._zero, self._conditional = modules, grid, zero, conditional
        self._syncing = True
        for module in modules:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def before_backward(self, *, last: bool) -> None:
        """Say what this backward reduces and frees."""
        root = self._modules[-1]
        root.set_is_last_backward(last)
        # What the root itself gathered is in the graphs of later microbatches too, and in the middle of a pipeline no
        # hook would gather it again for them: the model's own output is not computed there.
        root.set_reshard_after_backward(last, recurse=self._zero < 3)
        syncs = last or self._zero >= 2
        if syncs != self._syncing:
            root.set_requires_gradient_sync(syncs)
            self._syncing = syncs

    def finish(self) -> None:
        """FSDP finishes in a callback at the end of the backward. What no replica used has no gradient."""
        forget_untouched(self._conditional, self._grid)


def shard(
    whole: nn.Module, units: Sequence[nn.Module], absent: set[nn.Parameter], grid: Grid, plan: Plan
) -> list[FSDPModule]:
    """Apply fully_shard to units and then to the whole, which takes what is left.

    Args:
        whole: the user's model, entered by way of the loss.
        units: modules whose parameters are gathered together.
        absent: parameters that live on other stages.
        grid, plan: of the job.

    Returns:
        Every wrapped module, the root last.
    """
    from torch.distributed.fsdp import fully_shard  # what it needs is as large as torch, and other plans do without
    from torch.distributed.tensor import Shard

    for module in units:
        module.register_forward_hook(_without_views)  # before fully_shard's own hooks: they see what it gives
    mesh = grid.mesh[("dp_replicate", "dp_shard") if plan.dp_replicate > 1 else ("dp_shard",)]

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(shard_dim(parameter.shape, plan.dp_shard))

    wrapped = [
        fully_shard(
            module,
            mesh=mesh,
            ignored_params=absent,
            shard_placement_fn=placement,
            reshard_after_forward=None if plan.zero == 3 else False,
        )
        for module in (*units, whole)
    ]
    for each in wrapped[:-1]:
        leave_unused(each)
    return wrapped


class _Alias(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Tensor | None:
        return gradient


def _without_views(module: nn.Module, args: Any, output: Any) -> Any:
    """A module's output with no view in it, and nothing copied but views of its parameters.

    fully_shard gathers parameters for the backward from a hook on the output; on a view (what ``nn.Linear`` gives for
    three dimensions) the hook is lost when the user's code writes to it (``x += y``). The memory of gathered parameters
    is freed when the forward is over.
    """
    freed = {parameter.untyped_storage()._cdata for parameter in module.parameters()}

    def alias(value: Any) -> Any:
        if isinstance(value, Tensor) and value.untyped_storage()._cdata in freed:
            return value.clone()
        if isinstance(value, Tensor) and value._base is not None and value.requires_grad:
            return cast(Tensor, _Alias.apply(value))  # type: ignore[no-untyped-call]  # torch's
        return value

    return tree_map(alias, output)
