"""Configuration: what a transformers model is made from, for checkpoints and for what is exported of them."""

from __future__ import annotations

import json
import sys
from typing import Any

from torch import nn


def configuration_of(model: nn.Module) -> dict[str, Any] | None:
    """The configuration of a transformers model, as its config.json has it; None of another."""
    if "transformers" not in sys.modules:
        return None
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    try:
        text = model.config.to_json_string(use_diff=False)
    except TypeError:  # the user added what JSON has not: null stands for it
        text = json.dumps(model.config.to_dict(), default=lambda _: None, skipkeys=True)
    described: dict[str, Any] = json.loads(text)
    return described | {"architectures": [type(model).__name__]}
