"""Tensor parallelism: the modules a plan divides, through DTensor and PyTorch's own parallel styles' mechanism.

Inside a divided group the unit's own code runs on local shards: a column projection takes the whole input and gives
this rank's part of its output features; the row projection that closes the group takes the parts and sums them over the
ranks (Shoeybi et al. 2019, "Megatron-LM"). What is not divided is repeated by every rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.distributed.tensor.placement_types import Placement

from weft.errors import PlanError
from weft.plan import TensorStyle


class Entrance:
    """Makes DTensors of inputs, one for all projections that are called in a row with the same tensor.

    So the gradient of an input that three projections share (query, key, value) is summed over the ranks once.
    """

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], int, weakref.ref[DTensor], Placement] | None = None

    def enter(self, tensor: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
        """The DTensor of a local tensor, made anew or remembered (weakly: it lives as long as backward needs it)."""
        if self._last is not None:
            before, version, entered, as_ = self._last
            known = entered()
            if before() is tensor and version == tensor._version and known is not None and as_ == placement:
                return known
        made = DTensor.from_local(tensor, mesh, [placement], run_check=False)
        self._last = (weakref.ref(tensor), tensor._version, weakref.ref(made), placement)
        return made


class Projection(ParallelStyle):
    """Divide one module's weight and bias, and convert what goes in and what comes out.

    Args:
        weight: dimension of the weight that is divided.
        bias: dimension of the bias that is divided; None keeps it whole.
        inputs, outputs: how the input comes and how the output goes on, as local tensors.
        entrance: shared by the projections of a model.
    """

    def __init__(
        self, entrance: Entrance, *, weight: int, bias: int | None, inputs: Placement, outputs: Placement
    ) -> None:
        super().__init__()
        self.entrance, self.weight, self.bias, self.inputs, self.outputs = entrance, weight, bias, inputs, outputs

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        # torch says its functions return None; it uses what they return
        enter, leave = cast(Any, self._enter), cast(Any, self._leave)
        return distribute_module(module, device_mesh, self._divide, enter, leave)

    def _divide(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            dimension = self.weight if parameter.dim() > 1 else self.bias
            placement = Replicate() if dimension is None else Shard(dimension)
            # src_data_rank=None: every rank has (or will be given) its own part, nothing is sent
            divided = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
            setattr(module, key, nn.Parameter(divided, requires_grad=parameter.requires_grad))

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
        first, *rest = inputs
        assert isinstance(first, Tensor)
        return (self.entrance.enter(first, mesh, self.inputs), *rest)

    def _leave(self, module: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
        assert isinstance(output, DTensor)
        if output.placements != (self.outputs,):
            output = output.redistribute(placements=[self.outputs], async_op=True)
        return cast(Tensor, output.to_local())


WHOLE, FEATURES = Replicate(), Shard(-1)
STYLES = {
    "colwise": partial(Projection, weight=0, bias=0, inputs=WHOLE, outputs=FEATURES),
    "rowwise": partial(Projection, weight=1, bias=None, inputs=FEATURES, outputs=WHOLE),
    "colwise_gather": partial(Projection, weight=0, bias=0, inputs=WHOLE, outputs=WHOLE),
    "embedding_rowwise": partial(Projection, weight=0, bias=None, inputs=WHOLE, outputs=WHOLE),
    "colwise_transposed": partial(Projection, weight=1, bias=0, inputs=WHOLE, outputs=FEATURES),
    "rowwise_transposed": partial(Projection, weight=0, bias=None, inputs=FEATURES, outputs=WHOLE),
}


def divide_modules(model: nn.Module, styles: Mapping[str, TensorStyle], mesh: DeviceMesh) -> None:
    """Divide modules in place over a one-dimensional mesh. A parameter that several modules share stays shared.

    Raises:
        PlanError: the model has no such module.
    """
    entrance = Entrance()
    shared: dict[Tensor, DTensor] = {}
    for name, style in styles.items():
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise PlanError(
                f"the plan divides module {name!r}, which this model does not have; make the plan again"
            ) from error
        before = dict(module.named_parameters(recurse=False))
        parallelize_module(module, mesh, STYLES[style.name](entrance), src_data_rank=None)
        for key, whole in before.items():
            divided = module.get_parameter(key)
            assert isinstance(divided, DTensor)
            first = shared.setdefault(whole, divided)
            if first.placements != divided.placements:
                raise PlanError(
                    f"the plan divides {name}.{key} as {divided.placements} but a module that shares it "
                    f"as {first.placements}; give both modules the same style, or none"
                )
            setattr(module, key, first)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter in shared:
                module._parameters[key] = cast(nn.Parameter, shared[parameter])
