"""What a user may fix of a plan, as options of the command line."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

FIXED: dict[str, tuple[type, str]] = {
    "pp": (int, "pipeline stages"),
    "dp_replicate": (int, "whole copies that share the batch"),
    "dp_shard": (int, "sharded copies that share the batch"),
    "cp": (int, "context parallelism"),
    "tp": (int, "tensor parallelism"),
    "ep": (int, "expert parallelism"),
    "microbatches": (int, "pieces of each copy's share of a batch"),
    "schedule": (str, "order of a pipeline: gpipe or 1f1b"),
    "zero": (int, "what dp_shard shards: 1 optimizer state, 2 gradients too, 3 parameters too"),
    "recompute": (str, "activations to compute again: none, selective or full"),
    "precision": (str, "of operations: float32, bf16 or fp16"),
    "compile": (bool, "run every unit through torch.compile"),
}
"""What a user may fix of a plan. Every verb that plans takes these as options."""

WITHOUT_DEGREES = ("recompute", "precision", "compile")
"""Those of them that do not say how the model is divided."""


def takes_fixed(verb: Callable[..., None], names: Sequence[str] = tuple(FIXED)) -> Callable[..., None]:
    """Give a verb options of FIXED; those that were given reach it as its argument ``fixed``."""

    @functools.wraps(verb)
    def with_options(**values: Any) -> None:
        given = {name: value for name in names if (value := values.pop(name)) is not None}
        verb(**values, fixed=given)

    signature = inspect.signature(verb, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "fixed"]
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                kind | None, typer.Option(*flags(name, kind), help=text, rich_help_panel="Fixed, not searched")
            ],
        )
        for name, (kind, text) in FIXED.items()
        if name in names
    ]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + options
    with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # typer reads it
    with_options.__annotations__ = {p.name: p.annotation for p in parameters}
    return with_options


def flags(name: str, kind: type) -> list[str]:
    """How an option of FIXED is written; one that is true or false has no opposite."""
    return ["--" + name.replace("_", "-")] if kind is bool else []
