"""Recomputation: gradients do not change, memory does, and nothing happens twice."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import workloads
from test_equality import name_of, plan_for
from torch import Tensor, nn

import weft
from weft.capture import capture
from weft.capture.initial import build_fake
from weft.capture.recomputation import is_costly, keeps_selected
from weft.capture.recorder import record
from weft.capture.units import find_units
from weft.cluster import Cluster
from weft.engines import parallelize
from weft.errors import PlanError
from weft.jobs.verify import verify_here
from weft.plan import Plan
from weft.planner import estimate, make_plan
from weft.runtime import memory
from weft.runtime.pool import Pool
from weft.runtime.recompute import Recompute, recomputing

PLANS = [{"pp": 2}, {"tp": 2}, {"dp_replicate": 2}, {"dp_shard": 2}, {"pp": 2, "tp": 2, "dp_shard": 2}]
MODES = ("selective", "full")


def dropping() -> weft.Workload:
    return workloads.gpt2(dropout=0.2)


def recomputed(build: Any, degrees: dict[str, int], mode: str, **choices: Any) -> Plan:
    return plan_for(build(), degrees, **{"microbatches": 2, "recompute": mode, **choices})


@pytest.mark.parametrize("degrees", PLANS, ids=name_of)
@pytest.mark.parametrize(
    ("build", "mode"),
    [(workloads.llama, "selective"), (dropping, "full"), (workloads.code_lm, "full")],
    ids=["llama-selective", "dropout-full", "code_lm-full"],
)
@pytest.mark.matrix
def test_gradients_are_unchanged(pool: Pool, build: Any, mode: str, degrees: dict[str, int]) -> None:
    plan = recomputed(build, degrees, mode)
    assert plan.recompute
    assert set(plan.recompute.values()) == {mode}
    found = pool.run(lambda: verify_here(build(), plan, steps=2, dtype="float64"), ranks=plan.devices)[0]
    assert found.ok, (found.gradient_error, found.worst_gradient)


def test_gradients_are_unchanged_under_autocast(pool: Pool) -> None:
    """Bit for bit: the second run is the first one again."""
    plan = dataclasses.replace(recomputed(dropping, {"pp": 2}, "full"), precision="bf16")

    def job() -> list[Any]:
        found = []
        for recompute in ({}, plan.recompute, dict.fromkeys(plan.recompute, "selective")):
            engine = parallelize(dropping(), dataclasses.replace(plan, recompute=recompute))
            engine.step(next(engine.batches()))
            found.append(engine.gradients())
        return found

    none, full, selective = pool.run(job, ranks=2)[0]
    assert none
    for name, gradient in none.items():
        assert torch.equal(gradient, full[name]), name
        assert torch.equal(gradient, selective[name]), name


class Counting(nn.Module):
    """A block with a buffer that says how often it ran, normalisation with running statistics, and a buffer that it
    changes and then reads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.norm = nn.BatchNorm1d(12)
        self.register_buffer("runs", torch.zeros((), dtype=torch.long))
        self.register_buffer("direction", torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        with torch.no_grad():  # a step of power iteration, as spectral normalisation does it
            self.direction.copy_(F.normalize(self.linear.weight @ self.direction, dim=0))
        return x + torch.tanh(self.norm(self.linear(x))) * self.direction.clone()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Counting() for _ in range(3))
        self.head = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def counting() -> weft.Workload:
    return dataclasses.replace(workloads.mlp(), model=Net)


@pytest.mark.parametrize("mode", MODES)
def test_buffers_change_once_and_are_read_as_they_were(pool: Pool, mode: str) -> None:
    plan = recomputed(counting, {"pp": 2}, mode)

    def job() -> list[Any]:
        found = []
        for recompute in ({}, plan.recompute):
            engine = parallelize(counting(), dataclasses.replace(plan, recompute=recompute))
            for _, batch in zip(range(2), engine.batches(), strict=False):
                engine.step(batch)
            found.append((engine.state_dict(), engine.gradients()))
        return found

    (state, gradients), (again, gradients_again) = pool.run(job, ranks=2)[0]
    assert int(state["blocks.0.runs"]) == 4  # two steps of two microbatches
    assert not torch.equal(state["blocks.0.norm.running_mean"], torch.zeros(12))
    for name, value in {**state, **{f"grad {n}": g for n, g in gradients.items()}}.items():
        assert torch.equal(value, {**again, **{f"grad {n}": g for n, g in gradients_again.items()}}[name]), name


class Seen(nn.Module):
    """Notes whether its forward is a recomputation, and fills a list that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen: list[tuple[bool, int]] = []

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        self.seen.append((recomputing(), len(cache)))
        cache.append(self.linear(x))
        return torch.tanh(torch.stack(cache).sum(0))


def test_a_forward_knows_that_it_is_a_second_one_and_is_given_what_the_first_was() -> None:
    unit, cache = Seen(), []
    again = Recompute(unit, "full")
    x = torch.randn(2, 4, requires_grad=True)
    y = again(unit.forward, (x,), {"cache": cache}, cost=None)
    y = again(unit.forward, (y, cache), {}, cost=None)
    assert len(cache) == 2
    y.sum().backward()
    assert unit.seen == [(False, 0), (False, 1), (True, 1), (True, 0)]
    assert len(cache) == 2
    assert not recomputing()
    with torch.no_grad():
        again(unit.forward, (x, []), {}, cost=None)
    assert unit.seen[-1] == (False, 0)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu_(self.first(x)))


def in_place() -> weft.Workload:
    def model() -> nn.Module:
        return nn.Sequential(*(InPlace() for _ in range(3)), nn.Linear(12, 1))

    return dataclasses.replace(workloads.mlp(), model=model)


def test_results_that_are_written_to_are_not_kept(pool: Pool) -> None:
    """Selective recomputation would go on from the changed values; such a unit is recomputed in full."""
    fake = build_fake(in_place().model, 0)
    units = find_units(fake.model, None)
    recording = record(fake.model, units, in_place().loss, in_place().sample_batch(2), backward=False)
    assert not keeps_selected(recording.costs[recording.calls[0].kind].forward)
    plan = recomputed(in_place, {"pp": 2}, "selective")
    found = pool.run(lambda: verify_here(in_place(), plan, steps=2, dtype="float64"), ranks=2)[0]
    assert found.ok


def test_what_is_costly() -> None:
    aten = torch.ops.aten
    assert all(map(is_costly, (aten.addmm.default, aten.bmm.default, aten.convolution.default)))
    assert is_costly(aten._scaled_dot_product_flash_attention_for_cpu.default)
    assert not any(map(is_costly, (aten.add.Tensor, aten.native_layer_norm.default, aten.gelu.default, aten.mm.out)))


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are the Linux kernel's")
@pytest.mark.long
def test_the_peak_is_the_predicted_one_in_every_mode() -> None:
    cluster = Cluster.local(1, "900MiB")
    profile = capture(activations())
    plans = [make_plan(profile, cluster, recompute=mode) for mode in ("none", *MODES)]
    predicted = [max(estimate(profile, cluster, plan).peak_memory_bytes) for plan in plans]
    assert predicted[0] > 1.2 * predicted[1] > 1.2 * 1.2 * predicted[2]

    def job(plan: Plan) -> int:
        used = memory.of(torch.device("cpu"))
        engine = parallelize(activations(), plan)
        engine.step(next(engine.batches()))
        return used.peak()

    with Pool(1, device="cpu", memory="900MiB", timeout_s=120) as limited:
        measured = [limited.run(job, plan)[0] for plan in plans]
    for expected, peak in zip(predicted, measured, strict=True):
        assert 0.75 * expected <= peak <= 1.05 * expected
    for mode in (1, 2):  # what a mode frees
        assert measured[0] - measured[mode] == pytest.approx(predicted[0] - predicted[mode], rel=0.12)


def activations() -> weft.Workload:
    """More activations than parameters: 400 MiB if all are kept."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("code_lm", workloads.EXAMPLES / "code_lm.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.workload(layers=6, hidden=256, context=128, batch_size=32)


def test_a_profile_says_what_is_kept_and_done_again() -> None:
    profile = capture(workloads.code_lm())
    block = next(call for call in profile.calls if call.name == "blocks.1")
    samples, width = 8, 16 * 32 * 4  # bytes of a sample's hidden states
    saved = {None: block.saved, **{mode: way.saved for mode, way in block.recompute.items()}}
    size = {mode: sum(s.bytes.at(samples) for s in kept) for mode, kept in saved.items()}
    assert size["full"] == samples * width  # the block's input alone
    assert size["full"] < size["selective"] < size[None]
    names = {mode: [op.name for op in way.again] for mode, way in block.recompute.items()}
    assert names["full"] == [op.name for op in block.forward]
    assert not {"aten.addmm", "aten.mm"} & set(names["selective"])
    assert "aten.gelu" in names["selective"]
    assert profile.calls[-1].recompute == {}


def test_a_plan_that_recomputes_something_else(pool: Pool) -> None:
    plan = dataclasses.replace(plan_for(workloads.mlp(), {"pp": 1}), recompute={"nothing": "full"})

    def job() -> str:
        with pytest.raises(PlanError) as caught:
            parallelize(workloads.mlp(), plan)
        return str(caught.value)

    assert "'nothing', which is no unit of this model" in pool.run(job, ranks=1)[0]
