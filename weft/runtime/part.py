"""Part: what one rank holds of the model.

Built without ever holding more than the plan says: the model is made on fake tensors, divided and sharded as ``meta``
tensors, and only then is every piece this rank keeps drawn (``capture.initial``), one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from weft.capture.initial import FakeModel, assign, materialize
from weft.capture.recorder import Recording
from weft.plan import Plan
from weft.runtime.data import Alone, DataParallel, Replicated, Sharded, shard
from weft.runtime.division import Division
from weft.runtime.dtensor import cuts, is_dtensor, local
from weft.runtime.grid import Grid
from weft.runtime.pieces import boxes
from weft.runtime.tensor import Divided, divide
from weft.runtime.totals import Held, holds_first
from weft.runtime.whole import Whole
from weft.workload import Stored


@dataclass(frozen=True)
class Ownership:
    """Which tensors of the model each stage holds, by first name: parameters, buffers and plain attributes.

    A stage holds what its calls read and what the glue that leads to them reads. What nothing reads is on stage 0, so
    that it is kept and saved. Buffers and attributes outside units (rotary tables) are on every stage: the glue runs
    wherever its inputs are.
    """

    stages: tuple[frozenset[str], ...]
    outside_units: frozenset[str]
    """Parameters that the glue or another unit reads on some stage: they cannot be gathered with a unit."""

    @classmethod
    def find(cls, fake: FakeModel, recording: Recording, stage_of: tuple[int, ...], pp: int) -> Ownership:
        """Ownership under a plan's stages."""
        parameters = {name for name, _ in fake.model.named_parameters()}
        holds: list[set[str]] = [set() for _ in range(pp)]
        for call, stage in zip(recording.calls, stage_of, strict=True):
            holds[stage] |= {*call.reads, *call.glue_reads}
            for later in holds[stage:]:  # looked at on every stage that gets this far
                later.update(call.seen_reads)
        inside = tuple(f"{call.unit}." for call in recording.calls if call.unit)
        outside_units = {name for name in fake.names if not name.startswith(inside)} - parameters
        for held in holds:
            held |= outside_units
        holds[0] |= set(fake.names) - set().union(*holds)
        outside = {name for call in recording.calls for name in call.glue_reads}
        outside |= {name for call in recording.calls for name in call.reads if not name.startswith(f"{call.unit}.")}
        return cls(tuple(map(frozenset, holds)), frozenset(outside))

    def by_name(self) -> dict[str, tuple[int, ...]]:
        """The stages that hold each tensor."""
        held = {name: list[int]() for name in sorted(frozenset().union(*self.stages))}
        for stage, names in enumerate(self.stages):
            for name in names:
                held[name].append(stage)
        return {name: tuple(stages) for name, stages in held.items()}


@dataclass(frozen=True)
class Part:
    """One rank's part of the model, ready to run.

    Attributes:
        model: the user's model; what is absent is fake.
        held: parameters this rank holds, in the model's order.
        divisions: of those tensor parallelism divides, by name.
        buffer_names: buffers this rank holds.
        stages: that hold a tensor, by first name, of all the model's.
        data_parallel: how its gradients meet those of other replicas.
        mode: of the fake tensors.
        whole: if parameters are gathered, the root of what is gathered: the loss is entered through it.
    """

    model: nn.Module
    held: list[Held]
    divisions: Mapping[str, Division]
    buffer_names: frozenset[str]
    stages: Mapping[str, tuple[int, ...]]
    data_parallel: DataParallel
    mode: FakeTensorMode
    whole: Whole | None

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Buffers this rank holds, in the model's order, as they are now: a forward may put others in their place."""
        return {name: buffer for name, buffer in self.model.named_buffers() if name in self.buffer_names}


def build(
    fake: FakeModel, units: list[str], recording: Recording, stage_of: tuple[int, ...], plan: Plan, grid: Grid
) -> Part:
    """Make this rank's part of a model that exists on fake tensors. ``fake.model`` is used up."""
    model, stage = fake.model, grid.stage
    ownership = Ownership.find(fake, recording, stage_of, plan.pp)
    mine = ownership.stages[stage]
    assign(model, {})  # every tensor is meta now
    divided = divide(model, plan.tensor, grid.group("tp")) if plan.tp > 1 else Divided()
    parameters = dict(model.named_parameters())
    absent = {p for name, p in parameters.items() if name not in mine}
    unsharded = {p for p in parameters.values() if p.dim() == 0 or not p.numel()}  # fully_shard takes none
    fsdp, whole = [], None
    if plan.dp_shard > 1:
        present = [model.get_submodule(unit) for unit in gathered_units(model, units, mine, ownership.outside_units)]
        whole = Whole(model)
        fsdp = shard(whole, present, absent | unsharded, grid, plan)
    assign(model, draw(fake, model, mine, divided.divisions, grid))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    make_absent_fake(model, mine, mode, grid.device)
    held = hold(model, ownership, divided, plan, grid)
    data_parallel: DataParallel = Alone()
    if fsdp:
        conditional = {name for call in recording.calls if call.looks for name in call.reads}
        aside = [h.parameter for h in held if h.name in conditional and h.parameter.requires_grad]
        data_parallel = Sharded(fsdp, grid, plan.zero, aside)
    elif plan.dp_replicate > 1:
        data_parallel = Replicated([h.parameter for h in held], grid)
    return Part(model, held, divided.divisions, mine, ownership.by_name(), data_parallel, mode, whole)


def gathered_units(model: nn.Module, units: list[str], mine: frozenset[str], outside: frozenset[str]) -> list[str]:
    """Units of this stage whose parameters are gathered when the unit runs.

    A unit that shares a parameter with another, or one of whose parameters glue reads, is gathered with the whole
    model.
    """
    uses: dict[nn.Parameter, set[str]] = {}
    for unit in units:
        for parameter in model.get_submodule(unit).parameters():
            uses.setdefault(parameter, set()).add(unit)
    names = {parameter: name for name, parameter in model.named_parameters()}
    chosen = []
    for unit in units:
        parameters = list(model.get_submodule(unit).parameters())
        here = parameters and all(names[p] in mine for p in parameters)
        alone = all(len(uses[p]) == 1 and names[p] not in outside for p in parameters)
        if here and alone:
            chosen.append(unit)
    return chosen


def draw(
    fake: FakeModel, model: nn.Module, mine: frozenset[str], divisions: Mapping[str, Division], grid: Grid
) -> dict[str, Tensor]:
    """Draw the initial values of what this rank holds, each cut to this rank's piece as soon as it is known, or read
    that piece where they are stored."""
    targets: dict[str, Tensor] = dict(model.named_parameters())
    cuts = {name: cut_of(targets.get(name), divisions.get(name)) for name in mine - fake.stored.keys()}
    values = materialize(fake, cuts, device=grid.device)
    for name in values.keys() & targets.keys():
        values[name] = as_held(values[name], targets[name])
    targets |= dict(model.named_buffers())
    for name in mine & fake.stored.keys():
        values[name] = read(fake.stored[name], targets[name], divisions.get(name), grid.device)
    return values


def as_held(values: Tensor, target: Tensor) -> Tensor:
    """This rank's values of a parameter, as fully_shard holds them if it shards the parameter."""
    if not is_dtensor(target):
        return values
    from torch.distributed.tensor import DTensor  # fully_shard has imported it

    mesh, placements, shape = target.device_mesh, target.placements, target.shape
    return DTensor.from_local(values, mesh, placements, run_check=False, shape=shape, stride=target.stride())


def read(stored: Stored, target: Tensor, division: Division | None, device: torch.device) -> Tensor:
    """What this rank holds of a tensor that is stored, and nothing else of it, box by box.

    Args:
        stored: the whole tensor.
        target: this rank's, without values.
        division: how tensor parallelism divides it.
        device: where to put it.
    """
    held = as_held(torch.empty(local(target).shape, dtype=target.dtype, device=device), target)
    for box in boxes(held, division):
        ends = zip(box.offsets, box.values.shape, strict=True)
        box.values.copy_(stored.read(tuple(slice(start, start + length) for start, length in ends)))
    return held


def cut_of(target: Tensor | None, division: Division | None) -> Callable[[Tensor], Tensor] | None:
    """How a full tensor is cut to this rank's piece; None if all of it is kept.

    Tensor parallelism cuts first, fully_shard cuts its piece again, in chunks as ``torch.chunk`` makes them.
    """
    if division is None and not is_dtensor(target):
        return None

    def cut(full: Tensor) -> Tensor:
        if division is not None:
            full = division.cut(full)
        if is_dtensor(target):
            mesh = target.device_mesh
            for i, dim in cuts(target).items():
                chunks = torch.chunk(full, mesh.size(i), dim=dim)
                index = mesh.get_local_rank(i)
                full = chunks[index] if index < len(chunks) else full.narrow(dim, 0, 0)
        return full.contiguous()

    return cut


def make_absent_fake(model: nn.Module, mine: frozenset[str], mode: FakeTensorMode, device: torch.device) -> None:
    """Turn every parameter and buffer that lives elsewhere into a fake tensor: glue that touches one gives fake
    tensors."""

    def fake_of(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    here = {tensor for name, tensor in chain(model.named_parameters(), model.named_buffers()) if name in mine}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter not in here:
                module._parameters[name] = nn.Parameter(fake_of(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer not in here:
                module._buffers[name] = fake_of(buffer)


def hold(model: nn.Module, ownership: Ownership, divided: Divided, plan: Plan, grid: Grid) -> list[Held]:
    """The parameters this rank holds, with the groups that keep copies equal. All ranks make the same groups.

    Args:
        model, ownership, divided, plan, grid: of this job.
    """
    names = [name for name, _ in model.named_parameters()]
    stages = {name: tuple(s for s in range(plan.pp) if name in ownership.stages[s]) for name in names}
    shared = sorted({where for where in stages.values() if len(where) > 1})
    groups = {where: grid.across_stages(where) for where in shared}
    sharded = plan.dp_shard > 1
    replicas = [grid.group(d) for d in ("dp_replicate", "dp_shard") if sharded and grid.degree(d) > 1]
    return [
        Held(
            name,
            parameter,
            (
                *([tied] if (tied := groups.get(stages[name])) else []),
                *(replicas if parameter.dim() == 0 else []),
                *([grid.group("tp")] if name in divided.partial else []),
            ),
            holds_first(parameter, divided.divisions.get(name), grid, first_stage=stages[name][0] == grid.stage),
        )
        for name, parameter in model.named_parameters()
        if grid.stage in stages[name]
    ]
