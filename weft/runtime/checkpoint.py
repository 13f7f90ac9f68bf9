"""Checkpoint: what a rank has for one, and what it takes from one.

Every rank has boxes of whole tensors under single-device names (``pieces``), so that any plan reads what any other has
written. What several ranks hold is written by one of them, by turns, so that all write alike.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from weft.checkpoint.checkpoint import Checkpoint, StoredTensor
from weft.checkpoint.folder import candidates
from weft.checkpoint.index import Index
from weft.checkpoint.tensors import NAMES
from weft.errors import CheckpointError
from weft.plain import shown
from weft.plan import Plan
from weft.runtime.configuration import configuration_of
from weft.runtime.dtensor import is_dtensor
from weft.runtime.optimizer import kind_of, plain, restore_settings, settings_of
from weft.runtime.part import Part
from weft.runtime.pieces import boxes
from weft.workload import Box

T = TypeVar("T")
MODEL, OPTIMIZER = "model.", "optimizer."
KIND = "engine.optimizer"
"""What the optimizer's class is called among a checkpoint's values."""


@dataclass(frozen=True)
class Piece:
    """A box that a rank has of a whole tensor.

    Attributes:
        name: of the tensor in checkpoints.
        shape: of the whole tensor.
        kind: see ``weft.checkpoint.index.KINDS``.
        offsets: where the box begins.
        values: sharing memory with what is trained.
        source: what is trained; of a DTensor only this counts changes.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    offsets: tuple[int, ...]
    values: Tensor
    source: Tensor

    @property
    def version(self) -> int:
        """Changes so far."""
        return self.source._version


def pieces_of(part: Part, optimizer: torch.optim.Optimizer | None) -> list[Piece]:
    """Everything this rank has for a checkpoint that is a tensor.

    Raises:
        CheckpointError: optimizer state of another shape than its parameter's, of a parameter this rank has a piece
            of: nothing says what it is of. Or a dtype that files cannot have.
    """
    found = list(_model(part))
    if optimizer is not None:
        found += _optimizer(part, optimizer)
    for piece in found:
        if piece.values.dtype not in NAMES:
            raise CheckpointError(f"{piece.name} is of {piece.values.dtype}, which no checkpoint can hold; convert it")
    return found


def _model(part: Part) -> Iterator[Piece]:
    computed = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in part.model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    for held in part.held:
        yield from _pieces(part, MODEL + held.name, held.name, "parameter", held.parameter)
    for name, buffer in part.buffers.items():
        yield from _pieces(part, MODEL + name, name, "computed" if name in computed else "buffer", buffer)


def _optimizer(part: Part, optimizer: torch.optim.Optimizer) -> Iterator[Piece]:
    """State that is shaped as its parameter is divided as that is."""
    for held in part.held:
        parameter = held.parameter
        divided = is_dtensor(parameter) or held.name in part.divisions
        for key, value in optimizer.state.get(parameter, {}).items():
            name = f"{OPTIMIZER}{held.name}.{key}"
            if not isinstance(value, Tensor):
                continue
            if value.shape == parameter.shape and is_dtensor(value) == is_dtensor(parameter):
                yield from _pieces(part, name, held.name, "optimizer", value)
            elif value.numel() > 1 and divided:
                raise CheckpointError(
                    f"the optimizer keeps {key!r} of shape {tuple(value.shape)} for {held.name}, of which every rank "
                    "has a piece; use an optimizer whose state has its parameters' shapes, or tp=1 and dp_shard=1"
                )
            else:
                yield Piece(name, tuple(value.shape), "optimizer", (0,) * value.dim(), value, value)


def _pieces(part: Part, name: str, owner: str, kind: str, tensor: Tensor) -> Iterator[Piece]:
    division = part.divisions.get(owner)
    shape = tuple(division.whole(tensor.shape) if division else tensor.shape)
    for box in boxes(tensor.detach(), division):
        yield Piece(name, shape, kind, tuple(box.offsets), box.values, tensor)
    if not math.prod(shape):
        yield Piece(name, shape, kind, (0,) * len(shape), torch.empty(shape, dtype=tensor.dtype), tensor)


def plain_values(part: Part, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What this rank's optimizer keeps besides tensors.

    Raises:
        CheckpointError: something that is no plain data.
    """
    found = {}
    for held in part.held:
        for key, value in optimizer.state.get(held.parameter, {}).items():
            if isinstance(value, Tensor):
                continue
            if not is_plain(value):
                raise CheckpointError(
                    f"the optimizer keeps {key!r} of type {type(value).__name__} for {held.name}; a checkpoint holds "
                    "tensors, numbers and text"
                )
            found[f"{OPTIMIZER}{held.name}.{key}"] = value
    return found


def schedule_of(scheduler: LRScheduler | None) -> dict[str, Any]:
    """A scheduler's state, as far as it is plain data."""
    state: dict[str, Any] = plain(scheduler.state_dict()) if scheduler is not None else {}
    return state


def index_of(
    step: int,
    plan: Plan,
    part: Part,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
    loss_scale: dict[str, Any] | None,
) -> Index:
    """What this rank knows of a checkpoint besides tensors."""
    return Index(
        step=step,
        plan=plan,
        groups=settings_of(optimizer),
        scheduler=schedule_of(scheduler),
        loss_scale=loss_scale,
        values=plain_values(part, optimizer) | {KIND: kind_of(optimizer)},
        model=configuration_of(part.model),
        files={},
        tensors={},
    )


# -- loading ----------------------------------------------------------------------------------------------------------


def open_newest(directory: Path) -> Checkpoint:
    """The newest checkpoint of a directory that is whole, or the one it is; all ranks call it and look at a part each.

    One that is damaged is passed over with a warning, for the one before.

    Raises:
        CheckpointError: there is none that is whole.
    """
    refused: CheckpointError | None = None
    for path in _agreed(lambda: candidates(directory)):
        error: CheckpointError | None = None
        found: Checkpoint | None = None
        try:
            found = Checkpoint.open(path)
            found.verify(dist.get_rank(), dist.get_world_size())
        except CheckpointError as raised:
            error = raised
        told: list[CheckpointError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, error)
        error = next((each for each in told if each is not None), None)
        if error is None:
            assert found is not None
            if refused is not None and dist.get_rank() == 0:
                warnings.warn(f"{refused}; going on from {path.name}", RuntimeWarning, stacklevel=2)
            return found
        refused = refused or error
    assert refused is not None
    raise refused


def _agreed(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank; and what it raises."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except CheckpointError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    made: T = box[0]
    return made


def load_model(checkpoint: Checkpoint, part: Part) -> None:
    """Take parameters and buffers from a checkpoint. A computed buffer has the shape that it was saved with: forwards
    put longer ones in place of what the constructor made.

    Raises:
        CheckpointError: it is of another model.
    """
    path = checkpoint.path
    for piece in _model(part):
        stored = checkpoint.index.tensors.get(piece.name)
        if stored is None and piece.kind == "computed" and checkpoint.index.plan is None:
            continue  # state dicts do not have it: the model's constructor has made it
        if stored is None:
            raise CheckpointError(f"{path}: has no {piece.name}; it is a checkpoint of another model")
        if stored.form.shape != piece.shape and piece.kind == "computed" and piece.values.shape == piece.shape:
            _replace(part.model, piece.source, checkpoint.stored(piece.name))
        elif stored.form.shape != piece.shape:
            raise CheckpointError(f"{path}: {piece.name} has shape {stored.form.shape}, the model's is {piece.shape}")
    with torch.no_grad():
        for piece in _model(part):
            if piece.name in checkpoint.index.tensors:
                _take(checkpoint, piece)


def _replace(model: nn.Module, buffer: Tensor, stored: StoredTensor) -> None:
    """Put room for what is stored in the place of a buffer, wherever the model has it."""
    room = torch.zeros(stored.shape, dtype=stored.dtype, device=buffer.device)
    for module in model.modules():
        for name, each in module._buffers.items():
            if each is buffer:
                module._buffers[name] = room


def load_optimizer(checkpoint: Checkpoint, part: Part, optimizer: torch.optim.Optimizer) -> None:
    """Take the optimizer's state and its groups' settings from a checkpoint.

    Raises:
        CheckpointError: it is of another optimizer.
    """
    index = checkpoint.index
    if index.plan is None:
        return  # weights that were brought from elsewhere: training begins with them
    kind = kind_of(optimizer)
    if (kept := index.values.get(KIND, kind)) != kind:
        raise CheckpointError(
            f"{checkpoint.path}: was saved with the optimizer {shown(kept)}, the workload's is {kind!r}; use the "
            "one it was saved with, or take only its weights: weft export, then weft import into another directory"
        )
    if len(index.groups) != len(optimizer.param_groups):
        raise CheckpointError(
            f"{checkpoint.path}: its optimizer has {len(index.groups)} parameter groups, "
            f"the workload's has {len(optimizer.param_groups)}"
        )
    keys: dict[str, list[str]] = {}
    for name in (*index.tensors, *index.values):
        if name.startswith(OPTIMIZER):
            owner, _, key = name.removeprefix(OPTIMIZER).rpartition(".")
            keys.setdefault(owner, []).append(key)
    _check_values(checkpoint, part, optimizer)
    restore_settings(optimizer, index.groups, checkpoint.path)
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    for held in part.held:
        optimizer.state.pop(held.parameter, None)
        state = {
            key: _state(checkpoint, part, held.name, held.parameter, key, group_of.get(held.parameter, {}))
            for key in keys.get(held.name, [])
        }
        if state:
            optimizer.state[held.parameter] = state


def _check_values(checkpoint: Checkpoint, part: Part, optimizer: torch.optim.Optimizer) -> None:
    """Look whether what the optimizer keeps besides tensors is no tensor's: neither another parameter's nor now.

    Raises:
        CheckpointError: it is.
    """
    tensors = {name.rpartition(".")[2] for name in checkpoint.index.tensors if name.startswith(OPTIMIZER)}
    for held in part.held:
        for key, value in optimizer.state.get(held.parameter, {}).items():
            tensors |= {key} if isinstance(value, Tensor) else set()
    for name, value in checkpoint.index.values.items():
        if name.startswith(OPTIMIZER) and name.rpartition(".")[2] in tensors and value is not None:
            raise CheckpointError(f"{checkpoint.path}: has {shown(value)} for {name}, which should be a tensor")


def _state(
    checkpoint: Checkpoint, part: Part, owner: str, parameter: nn.Parameter, key: str, group: Mapping[str, Any]
) -> Any:
    """One value of a parameter's state."""
    name = f"{OPTIMIZER}{owner}.{key}"
    if name in checkpoint.index.values:
        return checkpoint.index.values[name]
    stored = checkpoint.stored(name)
    division = part.divisions.get(owner)
    whole = tuple(division.whole(parameter.shape) if division else parameter.shape)
    if stored.shape == whole and not (key == "step" and not whole):
        value = torch.zeros_like(parameter, dtype=stored.dtype).detach()
        for piece in _pieces(part, name, owner, "optimizer", value):
            _take(checkpoint, piece)
        return value
    # As Optimizer.load_state_dict places it: a count of steps is on the device only for kernels that read it there.
    there = key != "step" or group.get("capturable") or group.get("fused")
    value = torch.zeros(stored.shape, dtype=stored.dtype, device=parameter.device if there else "cpu")
    _take(checkpoint, Piece(name, stored.shape, "optimizer", (0,) * len(stored.shape), value, value))
    return value


def _take(checkpoint: Checkpoint, piece: Piece) -> None:
    ends = zip(piece.offsets, piece.values.shape, strict=True)
    box: Box = tuple(slice(start, start + length) for start, length in ends)
    checkpoint.stored(piece.name).read_into(box, piece.values)


def is_plain(value: Any) -> bool:
    """Whether JSON keeps a setting as it is."""
    return (
        value is None
        or isinstance(value, bool | int | float | str)
        or (isinstance(value, tuple | list) and all(map(is_plain, value)))
    )


Signature = Sequence[tuple[str, tuple[int, ...], str, tuple[int, ...], tuple[int, ...], str]]


def signature_of(pieces: Sequence[Piece]) -> Signature:
    """What some pieces are, without their values."""
    return [(p.name, p.shape, p.kind, p.offsets, tuple(p.values.shape), NAMES[p.values.dtype]) for p in pieces]
