"""Agreement: before the first step all ranks compare what they were given, so that a difference is an error, not a
deadlock.

    on_plan      versions, and the plan, before any process group is made by it
    on_model     parameters and buffers, and the calls of the recording, before the model is divided
    on_batch     the first batch: its structure everywhere, its shapes among ranks of one replica

What is compared is a hash of each kind of facts, in one all-gather of a few numbers. Only where hashes differ do the
first two ranks that differ tell their facts, so that the error, which is the same on every rank, says what differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

import weft
from weft.capture.recording import Recording
from weft.errors import DisagreementError
from weft.plan import Plan
from weft.runtime.batches import Batch
from weft.runtime.grid import current_device
from weft.runtime.logbook import Logbook
from weft.runtime.recordings import describe, is_words

Facts = Mapping[str, str]
"""Names of what there is, to what it is, in words."""


def on_plan(plan: Plan, logbook: Logbook) -> None:
    """Compare versions and plans; all ranks call it.

    Raises:
        DisagreementError: they differ.
    """
    versions = {"torch": torch.__version__, "weft": weft.__version__}
    _compare({"installation": versions, "plan": {k: json.dumps(v) for k, v in plan.to_json().items()}}, logbook)


def on_model(model: nn.Module, recording: Recording, logbook: Logbook) -> None:
    """Compare models, on fake tensors, and how they are called; all ranks call it.

    Raises:
        DisagreementError: they differ.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    held = {name: _form(tensor) + ("" if tensor.requires_grad else ", not trained") for name, tensor in tensors}
    calls = {
        f"call {number} of a unit": f"{call.name} -> {', '.join(_form(leaf) for leaf in call.tensors)}"
        for number, call in enumerate(recording.calls, 1)
    }
    _compare({"model": held, "forward": calls}, logbook)


def on_batch(batch: Batch, replica: int, logbook: Logbook) -> None:
    """Compare batches of one step; all ranks call it, each with its replica's part.

    Shapes may differ between replicas: these may have unequal shares, and pad their samples to other lengths.

    Raises:
        DisagreementError: they differ.
    """
    structure, shapes = {"samples in all": str(batch.total)}, dict[str, str]()
    for m, microbatch in enumerate(batch.microbatches):
        for path, leaf in tree_flatten_with_path(microbatch, is_leaf=is_words)[0]:
            name = f"batch{keystr(path)}"
            tensor = isinstance(leaf, Tensor)
            structure[name] = f"{leaf.dtype} of {leaf.ndim} dimensions" if tensor else type(leaf).__name__
            shapes[f"{name} of microbatch {m}"] = _form(leaf) if tensor else str(describe(leaf))
    _compare({"batch": structure, "part of the batch": shapes}, logbook, {"part of the batch": replica})


def _compare(facts: Mapping[str, Facts], logbook: Logbook, parts: Mapping[str, int] = MappingProxyType({})) -> None:
    """Compare facts of some kinds: among all ranks, or those in the same of several parts of the job."""
    logbook.note(f"comparing {' and '.join(facts)} with the other ranks", waiting=True)
    every = _gathered([(parts.get(kind, 0), _hash(facts[kind])) for kind in facts])
    logbook.note("")
    for kind, rows in zip(facts, every, strict=True):
        first: dict[int, tuple[int, int]] = {}
        for rank, (part, found) in enumerate(rows):
            one, expected = first.setdefault(part, (rank, found))
            if found != expected:
                _tell(kind, facts[kind], one, rank)


def _tell(kind: str, facts: Facts, one: int, other: int) -> None:
    """Raise what differs between two ranks; all ranks call it."""
    told: list[list[Any]] = []
    for rank in (one, other):
        told.append([dict(facts)])
        dist.broadcast_object_list(told[-1], src=rank)
    (mine,), (theirs,) = told
    for name in [*mine, *(name for name in theirs if name not in mine)]:
        if mine.get(name) == theirs.get(name):
            continue
        if name not in mine or name not in theirs:
            has, lacks = (other, one) if name not in mine else (one, other)
            differs = f"rank {has} has {name} ({(theirs | mine)[name]}), rank {lacks} has not"
        else:
            differs = f"{name} is {theirs[name]} on rank {other} and {mine[name]} on rank {one}"
        raise DisagreementError(
            f"rank {other}'s {kind} differs from rank {one}'s: {differs}; start all ranks with the same code, plan "
            "and data"
        )
    raise DisagreementError(f"rank {other}'s {kind} differs from rank {one}'s in its order; start all with the same")


def _form(tensor: Any) -> str:
    """Shape and dtype of a tensor or its leaf."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _hash(facts: Facts) -> int:
    """63 bits of a hash that is the same in every process."""
    digest = hashlib.sha256(json.dumps(list(facts.items())).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _gathered(numbers: Sequence[tuple[int, int]]) -> list[list[list[int]]]:
    """Every rank's pairs of numbers: for each of the pairs, one for each rank."""
    mine = torch.tensor(numbers, device=current_device())
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    found: list[list[list[int]]] = torch.stack(every, 1).tolist()
    return found
