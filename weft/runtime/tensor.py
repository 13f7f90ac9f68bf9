"""Tensor parallelism: a model's modules, parameters and numbers made this rank's share of them, as a plan says.

Inside a divided group the unit's own code runs on local shards, which are plain tensors: a column projection takes the
whole input and gives this rank's part of its output features; the row projection that closes the group takes the parts
and sums them over the ranks (Shoeybi et al. 2019, "Megatron-LM"). What is not divided is repeated by every rank. How a
shard sits in the whole is kept beside it (``division``), and what goes in and out of divided modules is converted by
``crossing``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.errors import PlanError
from weft.plan import TensorStyle
from weft.runtime.crossing import Crossing
from weft.runtime.division import Division
from weft.runtime.projection import (
    CONVOLUTIONS,
    TRANSPOSED_CONVOLUTIONS,
    column,
    embedding,
    reduced,
    row,
    weights_of,
    without,
)


class Claim(NamedTuple):
    """A slot of a module whose tensor is to be divided, and its single-device name."""

    module: nn.Module
    key: str
    name: str
    division: Division
    uneven: bool | None
    """Whether pieces may differ in length; None: where another claim to the tensor says so."""


@dataclass(frozen=True)
class Divided:
    """What tensor parallelism has made of a model.

    Attributes:
        divisions: of the tensors this rank has a piece of, by first name.
        partial: first names of whole parameters whose gradient is a rank's part of a sum.
    """

    divisions: Mapping[str, Division] = field(default_factory=dict)
    partial: frozenset[str] = frozenset()


def divide(model: nn.Module, styles: Mapping[str, TensorStyle], group: dist.ProcessGroup) -> Divided:
    """Divide a model of ``meta`` tensors in place over a group of ranks. A parameter modules share stays shared.

    Raises:
        PlanError: the model has nothing of a name, a style does not suit what it is for, or two contradict.
    """
    divider = Divider(model, group)
    for name, style in styles.items():
        divider.apply(name, style)
    return divider.finish()


class Divider:
    """Collects what a plan's styles ask for, then puts the pieces in place."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        self.model, self.crossing = model, Crossing(group)
        self.index, self.degree = dist.get_rank(group), dist.get_world_size(group)
        self.claims: list[Claim] = []
        self.partial: dict[str, Tensor] = {}
        self.shared: set[tuple[nn.Module, str]] = set()
        self.wrapped: dict[nn.Module, tuple[str, TensorStyle]] = {}

    def apply(self, name: str, style: TensorStyle) -> None:
        """Take one style of the plan."""
        match style.name:
            case "shard":
                module, key = self._tensor(name, style)
                assert style.dim is not None
                self._claim(module, key, name, style, style.dim, uneven=None)
            case "sum_gradient" | "first_rank":
                module, key = self._tensor(name, style)
                self.partial[name] = getattr(module, key)
                if style.name == "first_rank" and self.index:
                    module.forward = without(module, key)
            case "share":
                self._share(name, style)
            case _:
                self._wrap(self._module(name), name, style)

    def finish(self) -> Divided:
        """Put this rank's pieces in the place of the whole tensors.

        Raises:
            PlanError: a tensor is divided in two ways, or divided in one of its places and whole in another.
        """
        by_tensor: dict[Tensor, list[Claim]] = {}
        for claim in self.claims:
            by_tensor.setdefault(getattr(claim.module, claim.key), []).append(claim)
        for name, module in self.model.named_modules():
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                claims = by_tensor.get(tensor, []) if tensor is not None else []
                if claims and not any(c.module is module and c.key == key for c in claims):
                    raise PlanError(
                        f"the plan divides {claims[0].name} but leaves {name}.{key} whole, which is the same tensor; "
                        "divide both alike, or neither"
                    )
        pieces: dict[Tensor, Tensor] = {}
        for whole, claims in by_tensor.items():
            first = claims[0]
            if other := next((c for c in claims if c.division != first.division), None):
                raise PlanError(
                    f"the plan divides {first.name} and {other.name} in different ways, but they are the same tensor; "
                    "divide both alike, or neither"
                )
            if partial := next((name for name, tensor in self.partial.items() if tensor is whole), None):
                raise PlanError(f"the plan divides {first.name} and sums the gradient of {partial}, the same tensor")
            allowed = [claim.uneven for claim in claims]
            odd = next((part for part in first.division.parts if part % self.degree), None)
            if odd and (False in allowed or True not in allowed):
                raise PlanError(
                    f"the plan divides {first.name}, but {odd} is not divisible by tp={self.degree}; use another tp"
                )
            shape = list(whole.shape)
            shape[first.division.dim] = first.division.length()
            piece = torch.empty(shape, dtype=whole.dtype, device=whole.device)
            is_parameter = isinstance(whole, nn.Parameter)
            pieces[whole] = nn.Parameter(piece, requires_grad=whole.requires_grad) if is_parameter else piece
            for claim in claims:
                slots = claim.module._parameters if is_parameter else claim.module._buffers
                slots[claim.key] = pieces[whole]  # type: ignore[assignment]  # a Parameter where the slot is for one
        divisions = {pieces[whole]: claims[0].division for whole, claims in by_tensor.items()}
        partial_tensors = set(self.partial.values())
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return Divided(
            {name: divisions[tensor] for name, tensor in named if tensor in divisions},
            frozenset(name for name, tensor in named if tensor in partial_tensors),
        )

    def _wrap(self, module: nn.Module, name: str, style: TensorStyle) -> None:
        """Give a module its style, once: a module may have several names."""
        before = self.wrapped.setdefault(module, (name, style))
        if before != (name, style):
            if before[1] != style:
                raise PlanError(
                    f"the plan divides {before[0]} as {before[1]} and {name} as {style}, but they are the same module; "
                    "give both the same style"
                )
        elif style.name == "reduce":
            module.forward = reduced(module.forward, self.crossing)
        elif style.name == "embedding_rowwise":
            self._embedding(module, name, style)
        else:
            self._projection(module, name, style)

    def _projection(self, module: nn.Module, name: str, style: TensorStyle) -> None:
        transposed = style.name.endswith("_transposed")
        weights = weights_of(module, name, style)
        is_column = style.name.startswith("colwise")
        outputs = int(transposed or isinstance(module, TRANSPOSED_CONVOLUTIONS))
        if isinstance(module, CONVOLUTIONS) and module.groups != 1:
            raise PlanError(f"the plan divides {name} as {style.name}, but it is a convolution in groups; leave it out")
        if getattr(module, "max_norm", None):
            raise PlanError(f"the plan divides {name} as {style.name}, which max_norm rules out; leave it out")
        gathers = style.name.startswith("colwise_gather")
        division = self._claim(
            module, weights.weight, name, style, outputs if is_column else 1 - outputs, uneven=gathers
        )
        if is_column and weights.bias:
            self._claim(module, weights.bias, name, style, 0, uneven=gathers)
        wrap = column if is_column else row
        module.forward = wrap(module, weights, division if gathers else None, self.crossing)

    def _embedding(self, module: nn.Module, name: str, style: TensorStyle) -> None:
        if not isinstance(module, nn.Embedding):
            raise PlanError(f"the plan divides {name} as {style.name}, but it is a {type(module).__name__}")
        for setting in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, setting):
                raise PlanError(f"the plan divides {name} as {style.name}, which {setting} rules out; leave it out")
        division = self._claim(module, "weight", name, style, 0, uneven=True)
        wrap: nn.Module = module
        wrap.forward = embedding(module, division, self.crossing)

    def _share(self, name: str, style: TensorStyle) -> None:
        path, _, attribute = name.rpartition(".")
        module = self._module(path, name)
        value = getattr(module, attribute, None)
        if not isinstance(value, int) or isinstance(value, bool):
            kind = type(value).__name__
            raise PlanError(f"the plan divides the number {name}, but it is a {kind}; make the plan again")
        if (module, attribute) in self.shared:
            return
        if value % self.degree:
            raise PlanError(f"the plan divides the number {name}, but {value} is not divisible by tp={self.degree}")
        self.shared.add((module, attribute))
        setattr(module, attribute, value // self.degree)

    def _claim(
        self, module: nn.Module, key: str, name: str, style: TensorStyle, dim: int, *, uneven: bool | None = False
    ) -> Division:
        whole: Tensor = getattr(module, key)
        name = name if style.name == "shard" else f"{name}.{key}"
        if dim >= whole.dim():
            raise PlanError(f"the plan divides dimension {dim} of {name}, which has {whole.dim()}; make the plan again")
        size = whole.shape[dim]
        parts = style.parts or (size,)
        if sum(parts) != size:
            raise PlanError(
                f"the plan divides {name} in parts of {', '.join(map(str, parts))}, which add to {sum(parts)}, "
                f"but its dimension {dim} has {size}; make the plan again"
            )
        division = Division(dim, parts, self.index, self.degree)
        self.claims.append(Claim(module, key, name, division, uneven))
        return division

    def _module(self, name: str, what: str | None = None) -> nn.Module:
        try:
            return self.model.get_submodule(name)
        except AttributeError as error:
            raise PlanError(
                f"the plan divides {what or name!r}, which this model does not have; make the plan again"
            ) from error

    def _tensor(self, name: str, style: TensorStyle) -> tuple[nn.Module, str]:
        path, _, key = name.rpartition(".")
        module = self._module(path, name)
        if module._parameters.get(key) is None and module._buffers.get(key) is None:
            raise PlanError(f"the plan has {style.name} for {name!r}, which is no parameter of this model")
        return module, key
