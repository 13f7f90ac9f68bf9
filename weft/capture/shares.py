"""Shares: one rank's part of a unit's parameters and numbers, put into the fake unit for a rehearsal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.plan import TensorStyle

WHOLE = ("sum_gradient", "first_rank")
"""Styles of parameters that every rank has whole."""


class Shares:
    """Puts one rank's shares into a fake unit.

    Args:
        model, unit: the model, and the unit in it.
        styles: how it is divided.
        degree: into how many shares.
        plain: modules that do nothing but multiply by their weight and add their bias.
        hidden: a context in which what runs is no step of the unit's.
    """

    def __init__(
        self,
        model: nn.Module,
        unit: nn.Module,
        styles: Mapping[str, TensorStyle],
        *,
        degree: int,
        plain: frozenset[str],
        hidden: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.model, self.unit, self.styles = model, unit, styles
        self.degree, self.plain, self.hidden = degree, plain, hidden
        self.new: dict[int, nn.Parameter] = {}

    def put(self) -> None:
        """Divide what the styles name."""
        for name, style in self.styles.items():
            path, _, key = name.rpartition(".")
            if style.name == "share":
                module = self.model.get_submodule(path)
                setattr(module, key, getattr(module, key) // self.degree)
            elif style.name == "shard":
                assert style.dim is not None
                self._cut(self.model.get_parameter(name), style.dim, style.parts)
            elif style.name not in ("reduce", *WHOLE):
                self._module(name, style)
        for module in self.unit.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in self.new:
                    module._parameters[key] = self.new[id(parameter)]

    def _module(self, name: str, style: TensorStyle) -> None:
        module = self.model.get_submodule(name)
        whole = {key: p for key, p in module.named_parameters(recurse=False)}
        for key, dim in divided_dims(module, style).items():
            self._cut(whole[key], dim, style.parts)
        own = self._product(module, style) if name in self.plain else module.forward
        (weight,) = (p for p in whole.values() if p.dim() > 1)
        features = weight.shape[output_dim(module, style)]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if style.name == "embedding_rowwise":  # the look-up itself is the runtime's affair
                local, module._parameters["weight"] = module._parameters["weight"], weight
                result = own(*args, **kwargs)
                module._parameters["weight"] = local
                return result
            result = own(*args, **kwargs)
            if style.name.startswith("colwise_gather"):
                dim = -1 if weight.dim() == 2 else 1 - weight.dim()
                with self.hidden():
                    result = torch.cat([result] * self.degree, dim).narrow(dim, 0, features).contiguous()
            return result

        module.__dict__["forward"] = forward

    def _product(self, module: nn.Module, style: TensorStyle) -> Callable[[Tensor], Tensor]:
        (key,) = (key for key, p in module.named_parameters(recurse=False) if p.dim() > 1)
        others = [k for k, _ in module.named_parameters(recurse=False) if k != key]

        def product(x: Tensor) -> Tensor:
            weight = module._parameters[key]
            assert weight is not None
            transposed = style.name.endswith("_transposed")
            return F.linear(x, weight.t() if transposed else weight, module._parameters[others[0]] if others else None)

        return product

    def _cut(self, whole: nn.Parameter, dim: int, parts: tuple[int, ...]) -> None:
        if id(whole) not in self.new:
            shape = list(whole.shape)
            shape[dim] = sum(-(-n // self.degree) for n in parts or (shape[dim],))
            local = torch.empty(shape, dtype=whole.dtype, device=whole.device)
            self.new[id(whole)] = nn.Parameter(local, requires_grad=whole.requires_grad)


def output_dim(module: nn.Module, style: TensorStyle) -> int:
    """The dimension of a projection's weight that makes its outputs."""
    return int(style.name.endswith("_transposed") or isinstance(module, nn.modules.conv._ConvTransposeNd))


def divided_dims(module: nn.Module, style: TensorStyle) -> dict[str, int]:
    """The dimension of each parameter of a module that its style divides, by the parameter's own name."""
    outputs = output_dim(module, style)
    column = style.name.startswith("colwise")
    dims = {}
    for key, parameter in module.named_parameters(recurse=False):
        if parameter.dim() > 1:
            dims[key] = 0 if style.name == "embedding_rowwise" else outputs if column else 1 - outputs
        elif column:
            dims[key] = 0
    return dims
