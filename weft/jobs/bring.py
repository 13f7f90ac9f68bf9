"""Bring: weights from elsewhere into a checkpoint that any plan trains on from. One tensor is in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from weft.capture.initial import build_fake
from weft.checkpoint.exchange import bring
from weft.errors import ModelError
from weft.inference.weights import SINGLE, entries_of, header_of, match
from weft.runtime.configuration import configuration_of
from weft.workload import Stored, Workload


def run(workload: Workload, weights: Path, directory: Path) -> Path:
    """Make a checkpoint of step 0 for a workload.

    Args:
        workload: whose model it is for.
        weights: a safetensors file, or a directory as ``save_pretrained`` writes it.
        directory: of checkpoints; it must hold none.

    Raises:
        ModelError: the weights are not this model's.
        CheckpointError: there are checkpoints already.
    """
    model = build_fake(workload.model, workload.seed).model
    found = stored_for(model, weights)
    first = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    held = model.state_dict(keep_vars=True)
    named = {first[id(held[name])]: stored for name, stored in found.items()}
    kinds = {name: "parameter" if isinstance(held[name], nn.Parameter) else "buffer" for name in named}
    return bring(named, kinds, directory, configuration_of(model))


def stored_for(model: nn.Module, weights: Path) -> Mapping[str, Stored]:
    """Where the values of a model's state dict are, by one of each tensor's names.

    Raises:
        ModelError: something is missing, left over, or of another shape.
    """
    entries = header_of(weights) if weights.is_file() else entries_of(weights)
    if configuration_of(model) is not None:
        return match(model, entries, where=weights)
    held = model.state_dict(keep_vars=True)
    there = {id(held[name]) for name in entries if name in held}
    wrong = [f"has {name}, which the model has not" for name in entries if name not in held]
    wrong += [f"lacks {name}" for name, tensor in held.items() if id(tensor) not in there]
    wrong += [
        f"has {name} of shape {entry.shape}, the model's is {tuple(held[name].shape)}"
        for name, entry in entries.items()
        if name in held and entry.shape != tuple(held[name].shape)
    ]
    if wrong:
        raise ModelError(
            f"{weights}: {wrong[0]}{f', and {len(wrong) - 1} things more' if len(wrong) > 1 else ''}; give {SINGLE} as "
            "safetensors.torch.save_model writes it of this model"
        )
    return entries
