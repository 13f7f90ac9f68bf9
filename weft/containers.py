"""Containers: batches in classes that torch's pytrees do not open by themselves.

A collator may return a dict-like object (``collections.UserDict``: tokenizers do) or a dataclass of tensors. The first
time such a class is seen it is registered, so that its tensors are found, cut, moved and put together again.
"""

from __future__ import annotations

import dataclasses
from collections import UserDict
from typing import Any

from torch import Tensor
from torch.utils._pytree import MappingKey, register_dataclass, register_pytree_node, tree_leaves


def opened(batch: Any) -> Any:
    """The batch; containers in it are known to torch's pytrees afterwards."""
    found = True
    while found:
        found = any([_register(leaf) for leaf in tree_leaves(batch)])
    return batch


def _register(leaf: Any) -> bool:
    """Register the class of a leaf that holds tensors; whether it did."""
    kind = type(leaf)
    if isinstance(leaf, UserDict):
        register_pytree_node(
            kind,
            lambda box: (list(box.values()), list(box)),
            lambda values, keys: kind(dict(zip(keys, values, strict=True))),
            flatten_with_keys_fn=lambda box: ([(MappingKey(key), x) for key, x in box.items()], list(box)),
        )
        return True
    if dataclasses.is_dataclass(leaf) and any(isinstance(x, Tensor) for x in tree_leaves(list(vars(leaf).values()))):
        register_dataclass(kind)
        return True
    return False
