"""Names: the first names of a model's tensors (parameters, buffers, plain attributes), by identity."""

from __future__ import annotations

from torch import Tensor, nn

from weft.capture.initial import map_tensors


class Names(dict[int, str]):
    """First name by ``id`` of the tensor."""

    def tensors_in(self, module: nn.Module) -> list[Tensor]:
        """The named tensors a module holds, each once."""
        tensors: dict[int, Tensor] = {}

        def note(_: str, tensor: Tensor) -> Tensor:
            if id(tensor) in self:
                tensors[id(tensor)] = tensor
            return tensor

        map_tensors(module, note)
        return list(tensors.values())

    def names_in(self, module: nn.Module) -> list[str]:
        """Their first names, each once."""
        return list(dict.fromkeys(self[id(t)] for t in self.tensors_in(module)))
