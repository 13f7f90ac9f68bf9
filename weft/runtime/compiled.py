"""Compiled: a unit's forward through ``torch.compile``.

What is compiled is the forward of the unit's class, with the unit as its first argument: repeated blocks share one
piece of code object, and so what was compiled for the first. Placement, random streams, recomputation and the hooks of
data parallelism are around it and are never traced.

A unit that does not compile runs as it is, after one warning.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Call = Callable[..., Any]


class Compiled:
    """One unit's forward, compiled when it is first called for inputs of some form.

    Args:
        name: of the unit, for the warning.
        module: the unit.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.eager: Call = module.forward
        self.compiled: Call | None = _compile(self.eager)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.compiled is None:
            return self.eager(*args, **kwargs)
        try:
            return self.compiled(*args, **kwargs)
        except Exception as error:  # the compiler's: of many classes, and as many causes as there are models
            if not _is_compilers(error):
                raise
            self.compiled = None
            warnings.warn(
                f"{self.name} runs uncompiled: torch.compile failed with {type(error).__name__}: {_reason(error)}",
                RuntimeWarning,
                stacklevel=2,
            )
        return self.eager(*args, **kwargs)


def _compile(forward: Call) -> Call:
    function = getattr(forward, "__func__", None)
    if function is None:  # replaced on the instance by a plain function
        return _of(forward)
    return functools.partial(_of(function), forward.__self__)  # type: ignore[attr-defined]  # a bound method


@functools.cache
def _of(function: Call) -> Call:
    # dynamic=False: microbatches come in few sizes, and each is better served by code of its own.
    return torch.compile(function, dynamic=False)


def _is_compilers(error: Exception) -> bool:
    """Whether an error is the compiler's rather than the model's own."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch", "torch._export"))


def _reason(error: Exception) -> str:
    """The first line that says something."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), "no reason given")
