"""Routes: which tensors go from which stage to which, a function of a recording and a plan.

A stage needs an output of an earlier stage when a call placed on it, or the glue that leads to the call, reads it; the
recording says so for every call. Stages are consecutive stretches of the calls, so every route goes from a lower to a
higher stage and may skip stages between.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from weft.capture.profile import LOSS, Source
from weft.capture.recorder import Cost, Recording, TensorLeaf
from weft.capture.trace import RawOp
from weft.errors import PlanError
from weft.plan import Plan
from weft.schedule import Edge


@dataclass(frozen=True)
class Routes:
    """What every stage runs, and what travels between stages.

    Attributes:
        stage_of: stage of every call by its number, the loss included.
        tensors: ``(source stage, target stage)`` to the outputs that travel, in a fixed order.
        gradients: likewise, those that get a gradient: what the loss does not depend on gets none, as on one device.
        leaves: the recorded leaf of every output that travels.
        numbers: the number of every call by unit and occurrence, from 1.
        random: numbers of the calls that draw random numbers.
        glue_random: whether glue or the loss draws any.
    """

    stage_of: tuple[int, ...]
    tensors: dict[tuple[int, int], tuple[Source, ...]]
    gradients: dict[tuple[int, int], tuple[Source, ...]]
    leaves: dict[Source, TensorLeaf]
    numbers: dict[tuple[str, int], int]
    random: frozenset[int]
    glue_random: bool

    @classmethod
    def find(cls, recording: Recording, plan: Plan, *, leaves_out: bool = False) -> Routes:
        """The routes of a plan.

        ``leaves_out``: what is recorded may make fewer calls than the plan lists (an encoder alone, say).

        Raises:
            PlanError: the plan's stages are not consecutive stretches of the model's calls.
        """
        stage_of = (*_stages(recording, plan, leaves_out), plan.pp - 1)
        wanted: dict[tuple[int, int], set[Source]] = {}
        for call, stage in zip(recording.calls, stage_of, strict=True):
            for target in range(stage, plan.pp):
                for source in call.seen:
                    if stage_of[source.call] != target:
                        wanted.setdefault((stage_of[source.call], target), set()).add(source)
        for call, target in zip(recording.calls, stage_of, strict=True):
            for source in call.sources:
                if stage_of[source.call] != target:
                    wanted.setdefault((stage_of[source.call], target), set()).add(source)
        tensors = {pair: tuple(sorted(sources)) for pair, sources in sorted(wanted.items())}
        sent = {source for sources in tensors.values() for source in sources}
        leaves = {
            source: replace(
                recording.calls[source.call].tensors[source.leaf], requires_grad=source in recording.with_gradient
            )
            for source in sent
        }
        numbers = {(call.unit, call.occurrence): number for number, call in enumerate(recording.calls)}
        random = frozenset(n for n, call in enumerate(recording.calls) if draws(recording.costs[call.kind]))
        glue_random = any(draws(call.glue) for call in recording.calls)
        live = _live(recording)
        used = {(stage_of[n], source) for n in live for source in recording.calls[n].sources}
        gradients = {
            (s, t): tuple(x for x in tensors[s, t] if leaves[x].requires_grad and (t, x) in used) for s, t in tensors
        }
        return cls(stage_of, tensors, gradients, leaves, numbers, random, glue_random)

    def is_done(self, stage: int, last: int) -> bool:
        """Whether a stage has no call after this one, nor the loss."""
        return last >= 0 and all(s != stage for s in self.stage_of[last + 1 :])

    def edges(self) -> list[Edge]:
        """Which stages send to which, for the schedule."""
        return [Edge(source, target, bool(self.with_gradient(source, target))) for source, target in self.tensors]

    def received_by(self, stage: int) -> dict[int, tuple[Source, ...]]:
        """What a stage receives, by the stage it comes from."""
        return {s: tensors for (s, t), tensors in self.tensors.items() if t == stage}

    def sent_by(self, stage: int) -> dict[int, tuple[Source, ...]]:
        """What a stage sends, by the stage it goes to."""
        return {t: tensors for (s, t), tensors in self.tensors.items() if s == stage}

    def with_gradient(self, source: int, target: int) -> tuple[Source, ...]:
        """What goes from one stage to another and has a gradient coming back."""
        return self.gradients.get((source, target), ())


def _live(recording: Recording) -> set[int]:
    """Numbers of the calls that the loss depends on, and of the loss."""
    live = {len(recording.calls) - 1}
    for number in range(len(recording.calls) - 1, -1, -1):
        if number in live:
            live |= {source.call for source in recording.calls[number].sources}
    return live


def _stages(recording: Recording, plan: Plan, leaves_out: bool) -> list[int]:
    """The stage of every call. A plan lists all calls there can be; some may be left out of a recording."""
    names = [call.name for call in recording.calls if call.name != LOSS]
    placed = {name: s for s, stage in enumerate(plan.stages) for name in stage}
    stages = [placed.get(name, -1) for name in names]
    order = {name: i for i, name in enumerate(placed)}
    places = [order.get(name, -1) for name in names]
    if -1 in stages or places != sorted(places) or (not (leaves_out or recording.varies) and len(names) < len(placed)):
        inverted = (n for n, p in zip(names, placed, strict=False) if n != p)
        wrong = next((n for n, s in zip(names, stages, strict=True) if s < 0), None) or next(inverted, None)
        detail = f"the plan has {wrong!r} out of place" if wrong else f"{len(placed)} are in the plan"
        raise PlanError(
            f"the plan's stages do not list this model's {len(names)} calls in the order of the forward: {detail}; "
            "make the plan again for this model with `weft plan`"
        )
    return stages


def draws(cost: Cost) -> bool:
    """Whether any of these operations draws random numbers (attention may: dropout is an argument of it)."""
    return any(torch.Tag.nondeterministic_seeded in op.func.tags and not without_dropout(op) for op in cost.forward)


def without_dropout(op: RawOp) -> bool:
    """Whether this is an attention kernel that was called without dropout."""
    names = [argument.name for argument in op.func._schema.arguments]
    if op.kind != "attention" or "dropout_p" not in names:
        return False
    place = names.index("dropout_p")
    return not (op.args[place] if place < len(op.args) else op.kwargs.get("dropout_p", 0.0))
