"""Checkpoint: model and optimizer through ``torch.distributed.checkpoint``, under single-device names.

    DIR/step-00000040/        one checkpoint; complete once training.json is there
        *.distcp, .metadata   torch.distributed.checkpoint: "model.<name>", "optimizer.<name>.<key>"
        training.json         step, the plan, the plain settings of the optimizer's groups and scheduler, the loss scale

Every rank writes its own pieces; what several ranks hold is written once. A name says nothing of the plan.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

from weft.errors import CheckpointError
from weft.plan import Plan
from weft.runtime.division import Division
from weft.runtime.optimizer import plain
from weft.runtime.part import Part
from weft.runtime.pieces import Pieces

MARK = "training.json"


@dataclass(frozen=True)
class Training:
    """The plain part of a checkpoint: the step it was made after, the plan, the optimizer's settings per parameter
    group, the scheduler's state as far as it is plain data, and the loss scale of a float16 plan."""

    step: int
    plan: Plan
    groups: list[dict[str, Any]]
    scheduler: dict[str, Any]
    loss_scale: dict[str, Any] | None = None


def newest(directory: Path) -> Path:
    """The complete checkpoint with the highest step.

    Raises:
        CheckpointError: there is none.
    """
    complete = sorted(mark.parent for mark in directory.glob(f"step-*/{MARK}"))
    if not complete:
        raise CheckpointError(f"{directory}: holds no complete checkpoint; start without --resume")
    return complete[-1]


def save(
    directory: Path,
    step: int,
    plan: Plan,
    part: Part,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None = None,
    *,
    loss_scale: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint; all ranks call it. Returns the folder made for it."""
    path = directory / f"step-{step:08d}"
    write_tensors({**model_state(part), **optimizer_state(part, optimizer)}, checkpoint_id=path)
    dist.barrier()
    if dist.get_rank() == 0:
        groups = [{k: v for k, v in group.items() if is_plain(v) and k != "params"} for group in optimizer.param_groups]
        state = plain(scheduler.state_dict()) if scheduler is not None else {}
        training = {
            "step": step,
            "plan": plan.to_json(),
            "groups": groups,
            "scheduler": state,
            "loss_scale": loss_scale,
        }
        text = json.dumps(training, indent=2)
        partial = path / f"{MARK}.partial"
        partial.write_text(text + "\n")
        partial.replace(path / MARK)  # in one go: a reader sees a whole checkpoint or none
    dist.barrier()
    return path


def load(directory: Path, plan: Plan, part: Part, optimizer: torch.optim.Optimizer) -> Training:
    """Read the newest checkpoint of a folder, or the one given, into a part and its optimizer; all ranks call it.

    Raises:
        CheckpointError: there is none, or it is of another model or optimizer.
    """
    path = directory if (directory / MARK).exists() else newest(directory)
    training = read_training(path)
    reader = FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    model = _stored_model(path, part, stored)
    moments = blank_optimizer_state(part, stored)
    read_tensors({**model, **_in_pieces(part, moments)}, storage_reader=reader)
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in moments.items():
        owner, _, key = name.rpartition(".")
        states.setdefault(owner, {})[key] = value
    for held in part.held:
        if state := states.get(f"optimizer.{held.name}"):
            optimizer.state[held.parameter] = state
    if len(training.groups) != len(optimizer.param_groups):
        raise CheckpointError(
            f"{path}: its optimizer has {len(training.groups)} parameter groups, "
            f"the workload's has {len(optimizer.param_groups)}"
        )
    for group, settings in zip(optimizer.param_groups, training.groups, strict=True):
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in settings.items()})
    return training


def load_model(directory: Path, part: Part) -> None:
    """Read parameters and buffers alone of the newest checkpoint of a folder, or of the one given; all ranks call it.

    Raises:
        CheckpointError: there is none, or it is of another model.
    """
    path = directory if (directory / MARK).exists() else newest(directory)
    reader = FileSystemReader(path)
    read_tensors(_stored_model(path, part, reader.read_metadata().state_dict_metadata), storage_reader=reader)


def _stored_model(path: Path, part: Part, stored: dict[str, Any]) -> dict[str, Tensor]:
    """This rank's parameters and buffers by checkpoint name.

    Raises:
        CheckpointError: one of them is not stored, or not in this shape.
    """
    model = model_state(part)
    for name, tensor in model.items():
        entry = stored.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{path}: has no {name}; it is a checkpoint of another model")
        if entry.size != tensor.shape:
            raise CheckpointError(f"{path}: {name} has shape {tuple(entry.size)}, the model's is {tuple(tensor.shape)}")
    return model


def model_state(part: Part) -> dict[str, Tensor]:
    """This rank's parameters and buffers by checkpoint name, sharing memory with the model."""
    tensors = {held.name: held.parameter.detach() for held in part.held} | part.buffers
    return {f"model.{name}": _pieces(tensor, part.divisions.get(name)) for name, tensor in tensors.items()}


def optimizer_state(part: Part, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """This rank's optimizer state by checkpoint name; plain numbers as scalar tensors."""
    state = {}
    for held in part.held:
        for key, value in optimizer.state.get(held.parameter, {}).items():
            state[f"optimizer.{held.name}.{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return _in_pieces(part, state)


def _in_pieces(part: Part, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Optimizer state for the checkpoint: what is shaped as its parameter is divided as it is.

    Raises:
        CheckpointError: state of another shape, of a parameter this rank has a piece of: nothing says what it is of.
    """
    held = {f"optimizer.{entry.name}": entry for entry in part.held}
    result = {}
    for name, value in state.items():
        owner, _, key = name.rpartition(".")
        parameter, division = held[owner].parameter, part.divisions.get(held[owner].name)
        sharded = isinstance(parameter, DTensor)
        if value.shape == parameter.shape and isinstance(value, DTensor) == sharded:
            result[name] = _pieces(value, division)
        elif value.numel() > 1 and (sharded or division):
            raise CheckpointError(
                f"the optimizer keeps {key!r} of shape {tuple(value.shape)} for {held[owner].name}, of which every "
                "rank has a piece; use an optimizer whose state has its parameters' shapes, or tp=1 and dp_shard=1"
            )
        else:
            result[name] = value
    return result


def _pieces(tensor: Tensor, division: Division | None) -> Tensor:
    return Pieces(tensor, division) if division or isinstance(tensor, DTensor) else tensor


def blank_optimizer_state(part: Part, stored: dict[str, Any]) -> dict[str, Tensor]:
    """Room for the stored optimizer state of what this rank holds: shaped as the parameter is held, or a whole small
    tensor."""
    blank: dict[str, Tensor] = {}
    held = {f"optimizer.{entry.name}": entry for entry in part.held}
    for name, entry in stored.items():
        owner = held.get(name.rpartition(".")[0])
        if owner is None or not isinstance(entry, TensorStorageMetadata):
            continue
        dtype, division = entry.properties.dtype, part.divisions.get(owner.name)
        whole = division.whole(owner.parameter.shape) if division else owner.parameter.shape
        if entry.size == whole:
            blank[name] = torch.zeros_like(owner.parameter, dtype=dtype).detach()
        else:
            blank[name] = torch.zeros(entry.size, dtype=dtype)
    return blank


def read_training(path: Path) -> Training:
    """The plain part of a checkpoint.

    Raises:
        CheckpointError: it is not what ``save`` wrote.
    """
    try:
        data = json.loads((path / MARK).read_text())
        plan = Plan.from_json(data["plan"], source=str(path / MARK))
        scheduler = dict(data["scheduler"])
        return Training(int(data["step"]), plan, list(data["groups"]), scheduler, data.get("loss_scale"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MARK}: cannot be read as a checkpoint: {error}") from error


def is_plain(value: Any) -> bool:
    """Whether JSON keeps a setting as it is."""
    return (
        value is None
        or isinstance(value, bool | int | float | str)
        or (isinstance(value, tuple | list) and all(map(is_plain, value)))
    )
