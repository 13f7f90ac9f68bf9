"""Names: the first names of a model's tensors (parameters, buffers, plain attributes), by identity."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

REGISTRIES = ("_parameters", "_buffers", "_modules")


class Names(dict[int, str]):
    """First name by ``id`` of the tensor."""

    def tensors_in(self, module: nn.Module) -> list[Tensor]:
        """The named tensors a module holds, each once."""
        parameters: list[Tensor | None] = []
        buffers: list[Tensor | None] = []
        others: list[Tensor] = []
        for each in module.modules():
            attributes = vars(each)
            parameters += attributes["_parameters"].values()
            buffers += attributes["_buffers"].values()
            for key, value in attributes.items():
                if isinstance(value, Tensor):
                    others.append(value)
                elif type(value) in (list, tuple, dict) and value and key not in REGISTRIES:
                    others += _inside(value)
        return list({id(t): t for t in (*parameters, *buffers, *others) if t is not None and id(t) in self}.values())

    def names_in(self, module: nn.Module) -> list[str]:
        """Their first names, each once."""
        return list(dict.fromkeys(self[id(t)] for t in self.tensors_in(module)))


def _inside(value: Any) -> list[Tensor]:
    """Tensors in lists, tuples and dicts, as ``initial.map_tensors`` finds them."""
    if isinstance(value, Tensor):
        return [value]
    if type(value) in (list, tuple):
        return [tensor for x in value for tensor in _inside(x)]
    return [tensor for x in value.values() for tensor in _inside(x)] if type(value) is dict else []
