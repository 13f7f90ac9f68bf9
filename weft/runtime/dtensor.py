"""DTensor: fully_shard's tensors told from plain ones, for the price of a look into a table.

``torch.distributed.tensor`` takes as long to import as a good part of torch itself, and only sharded parameters are of
it. So nothing here imports it: where nobody has, there are no such tensors.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

MODULE = "torch.distributed.tensor"


def is_dtensor(value: object) -> TypeIs[DTensor]:
    """Whether something is a DTensor."""
    module = sys.modules.get(MODULE)
    return module is not None and isinstance(value, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing memory with it."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def cuts(tensor: Tensor) -> dict[int, int]:
    """How a tensor is cut: the dimension of the mesh whose ranks have pieces of it, and the tensor's own that is cut
    for them; empty for a plain tensor."""
    if not is_dtensor(tensor):
        return {}
    shard = sys.modules[MODULE].Shard
    return {i: placement.dim for i, placement in enumerate(tensor.placements) if isinstance(placement, shard)}
