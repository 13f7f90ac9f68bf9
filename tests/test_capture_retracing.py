"""Blocks that know their own number are run along the first one's operations; those that do something else are told
apart, whatever it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture_models import CASES, squares
from test_capture_recorder import recorded
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from weft.capture import capture
from weft.capture.recording import Recording
from weft.precision import in_precision
from weft.workload import Workload

BLOCKS = 6
Behaviour = Callable[["Block", Tensor, "Held"], Any]


class Held:
    """An object that blocks leave something in."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.counts: list[int] = []


class Block(nn.Module):
    """A block that knows its number, and does what it is told."""

    def __init__(self, index: int, behaviour: Behaviour) -> None:
        super().__init__()
        self.index, self.behaviour = index, behaviour
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    @property
    def odd(self) -> bool:
        return bool(self.index % 2)

    def forward(self, x: Tensor, held: Held) -> Any:
        return self.behaviour(self, x, held)


class Model(nn.Module):
    """Blocks between layers, so that all of them are given the like."""

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Block(i, behaviour) for i in range(BLOCKS))
        self.held = Held()

    def forward(self, x: Tensor) -> Tensor:
        x, self.held.seen = self.first(x), []
        for block in self.blocks:
            y = block(x, self.held)
            x = y[0] if isinstance(y, tuple) else y
        self.held.counts.append(len(self.held.seen))
        return self.last(x)


def kinds(behaviour: Behaviour, precision: str = "float32") -> tuple[list[int], Recording]:
    """The kinds of the blocks' calls, from 0, and the recording."""
    workload = Workload(model=Model, loss=squares, data=[0], optimizer=torch.optim.SGD, batch_size=1)
    loss = in_precision(workload, precision).loss
    recording = recorded(CASES["mlp"]._replace(model=lambda: Model(behaviour), loss=loss))
    found = [call.kind for call in recording.calls if call.name.startswith("blocks.")]
    assert len(found) == BLOCKS
    return [kind - found[0] for kind in found], recording


def plain(block: Block, x: Tensor, held: Held) -> Tensor:
    return block.b(block.a(x).relu())


def test_blocks_that_know_their_number_are_not_recorded_again() -> None:
    modes = []

    def watched(block: Block, x: Tensor, held: Held) -> Tensor:
        modes.append(type(_get_current_dispatch_mode()).__name__)
        return plain(block, x, held)

    assert kinds(watched)[0] == [0] * BLOCKS
    assert modes == ["Trace"] + ["Retrace"] * (BLOCKS - 1)


def test_in_a_lower_precision_blocks_are_run_once_each() -> None:
    modes = []

    def watched(block: Block, x: Tensor, held: Held) -> Tensor:
        modes.append(type(_get_current_dispatch_mode()).__name__)
        return plain(block, x, held)

    samples = [{"x": torch.ones(8), "y": torch.ones(8)}] * 4
    model = functools.partial(Model, watched)
    workload = Workload(model=model, loss=squares, data=samples, optimizer=torch.optim.SGD, batch_size=4)
    capture(workload, "bf16")
    assert modes.count("Retrace") == BLOCKS - 1


def scaled(block: Block, x: Tensor, held: Held) -> Tensor:
    return plain(block, x, held) / (block.index + 1)


def noted(block: Block, x: Tensor, held: Held) -> Tensor:
    held.seen.insert(block.index, block.index)
    return plain(block, x, held)


def in_constants(block: Block, x: Tensor, held: Held) -> Tensor:
    return plain(block, x, held) * torch.tensor([float(block.index)] * 8)


@pytest.mark.parametrize("behaviour", [scaled, noted, in_constants], ids=lambda f: f.__name__)
def test_numbers_that_cost_nothing_are_no_difference(behaviour: Behaviour) -> None:
    assert kinds(behaviour)[0] == [0] * BLOCKS


def another_operation(block: Block, x: Tensor, held: Held) -> Tensor:
    return block.b(block.a(x).sigmoid() if block.odd else block.a(x).relu())


def one_more(block: Block, x: Tensor, held: Held) -> Tensor:
    return plain(block, x, held).relu() if block.odd else plain(block, x, held)


def one_fewer(block: Block, x: Tensor, held: Held) -> Tensor:
    return plain(block, x, held) if block.odd else plain(block, x, held).relu()


def another_operand(block: Block, x: Tensor, held: Held) -> Tensor:
    y = plain(block, x, held)
    return y + (y if block.odd else x)


def another_order(block: Block, x: Tensor, held: Held) -> Tensor:
    return block.a(block.b(x).relu()) if block.odd else plain(block, x, held)


def another_shape(block: Block, x: Tensor, held: Held) -> Tensor:
    return (plain(block, x, held).view(-1, 4 if block.odd else 2) * 2).view(x.shape)


def no_gradient(block: Block, x: Tensor, held: Held) -> Tensor:
    with torch.set_grad_enabled(not block.odd):
        y = block.a(x).relu()
    return block.b(y)


def another_form(block: Block, x: Tensor, held: Held) -> Any:
    y = plain(block, x, held)
    return (y,) if block.odd else y


def another_result(block: Block, x: Tensor, held: Held) -> Any:
    y = block.a(x)
    z = block.b(y)
    return (y, z) if block.odd else (z, y)


def one_without_use(block: Block, x: Tensor, held: Held) -> Tensor:
    y = plain(block, x, held)
    if not block.odd:
        block.a(x)
    return y


@pytest.mark.parametrize(
    "behaviour",
    [
        another_operation,
        one_more,
        one_fewer,
        another_operand,
        another_order,
        another_shape,
        no_gradient,
        another_form,
        another_result,
        one_without_use,
    ],
    ids=lambda f: f.__name__,
)
def test_blocks_that_differ_by_their_number_are_told_apart(behaviour: Behaviour) -> None:
    assert kinds(behaviour)[0] == [0, 1] * (BLOCKS // 2)


def test_a_block_that_went_astray_leaves_no_trace_of_it() -> None:
    counts: list[int] = []

    def after_a_note(block: Block, x: Tensor, held: Held) -> Tensor:
        held.seen, held.counts = [*held.seen, block.index], counts
        return one_more(block, x, held)

    assert kinds(after_a_note)[0] == [0, 1] * (BLOCKS // 2)
    assert counts == [BLOCKS]


def in_full_precision(block: Block, x: Tensor, held: Held) -> Tensor:
    with torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu") and not block.odd):
        return plain(block, x.float(), held).to(x.dtype)


def test_blocks_that_differ_in_a_lower_precision_only() -> None:
    assert kinds(in_full_precision)[0] == [0] * BLOCKS
    assert kinds(in_full_precision, "bf16")[0] == [0, 1] * (BLOCKS // 2)


def test_what_was_cast_before_a_block_went_astray_is_cast_again() -> None:
    found, recording = kinds(one_more, "bf16")
    costs = [recording.costs[call.kind] for call in recording.calls if call.name in ("blocks.0", "blocks.1")]
    casts = [[op.name for op in cost.forward].count("aten._to_copy") for cost in costs]
    assert found == [0, 1] * (BLOCKS // 2)
    assert casts[0] == casts[1] > 1


def test_a_tensor_left_behind_by_a_block_that_was_not_recorded() -> None:
    """It is left in an object and read by code between units: then it counts as an output of every block."""

    def leaves(block: Block, x: Tensor, held: Held) -> Tensor:
        held.kept = plain(block, x, held)
        return held.kept.relu()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["x"]).sum() + model.held.kept.sum()

    recording = recorded(CASES["mlp"]._replace(model=lambda: Model(leaves), loss=loss))
    assert [len(call.effects) for call in recording.calls if call.name.startswith("blocks.")] == [1] * BLOCKS
