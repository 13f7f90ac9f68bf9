"""Compiled: a unit's forward through ``torch.compile``.

What is compiled is the forward of the unit's class, with the unit as its first argument: repeated blocks share one
function, and so what was compiled for the first of them. Placement, random streams, recomputation and the hooks of
data parallelism are around it and never traced; the forwards of modules that tensor parallelism divides are inside and
left out of it, as breaks between compiled pieces.

What does not compile runs as it is, after one warning for all units of the class.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Call = Callable[..., Any]

COMPILER = ("torch._dynamo", "torch._inductor.compile_fx", "torch.utils.mkldnn")
"""Modules that compiling imports."""


class Shared:
    """A function that units share, compiled when it is first called with inputs of some form; ``compiled`` is None
    once that has failed."""

    def __init__(self, function: Call) -> None:
        with warnings.catch_warnings():  # the compiler's modules use what torch itself deprecates
            warnings.simplefilter("ignore", DeprecationWarning)
            for module in COMPILER:
                importlib.import_module(module)
        # dynamic=False: microbatches come in few sizes, and each is better served by code of its own.
        # fallback_random: numbers are drawn from the generator that the random stream has set, as eager code does.
        self.compiled: Call | None = torch.compile(function, dynamic=False, options={"fallback_random": True})


class Compiled:
    """One unit's forward.

    Args:
        name: of the unit, for the warning.
        module: the unit; tensor parallelism has been applied to it.
        shared: what other units of this model share, by function; it grows.
    """

    def __init__(self, name: str, module: nn.Module, shared: dict[Call, Shared]) -> None:
        self.name, self.eager = name, module.forward
        for child in module.modules():
            own = vars(child).get("forward")
            if own is not None and _is_ours(own):
                vars(child)["forward"] = torch._dynamo.disable(own)  # type: ignore[no-untyped-call]  # torch's
        function = getattr(self.eager, "__func__", None)
        self._self: tuple[Any, ...] = () if function is None else (self.eager.__self__,)  # type: ignore[attr-defined]  # a bound method
        self._shared: Shared | None = None
        if function is not None or not _is_ours(self.eager):  # a unit that is divided itself has nothing to gain
            function = function or self.eager
            if function not in shared:
                shared[function] = Shared(function)
            self._shared = shared[function]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compiled = self._shared.compiled if self._shared else None
        if self._shared is None or compiled is None:
            return self.eager(*args, **kwargs)
        try:
            return compiled(*self._self, *args, **kwargs)
        except Exception as error:  # the compiler's: of many classes, and as many causes as there are models
            if not _is_compilers(error):
                raise
            self._shared.compiled = None
            warnings.warn(
                f"{self.name} and units like it run uncompiled: torch.compile failed with {type(error).__name__}: "
                f"{_reason(error)}",
                RuntimeWarning,
                stacklevel=2,
            )
        return self.eager(*args, **kwargs)


def _is_ours(function: Call) -> bool:
    return (getattr(function, "__module__", None) or "").startswith("weft.")


def _is_compilers(error: Exception) -> bool:
    """Whether an error is the compiler's rather than the model's own."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch", "torch._export"))


def _reason(error: Exception) -> str:
    """The first line that says something."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), "no reason given")
