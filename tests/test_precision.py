"""Lower precision: operations run in it, parameters and sums do not; a plan is within one device's own noise."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import workloads
from test_equality import name_of, plan_for
from torch import Tensor, nn

from weft.capture import capture
from weft.cluster import Cluster
from weft.cluster.presets import preset, processes
from weft.engines import parallelize
from weft.errors import InputError, PlanError
from weft.jobs.noise import rounding
from weft.jobs.verify import verify_here
from weft.plan import Plan
from weft.planner import estimate, make_plan, search
from weft.precision import in_precision
from weft.runtime.pool import Pool
from weft.runtime.scaling import BACKOFF, GROWTH, INITIAL, INTERVAL, LossScale
from weft.runtime.totals import squared_norm

PLANS = [{"pp": 2}, {"tp": 2}, {"dp_replicate": 2}, {"dp_shard": 2}, {"pp": 2, "dp_shard": 2}]


def lower(build: Any, precision: str, degrees: dict[str, int], **choices: Any) -> Plan:
    plan = plan_for(build(), degrees, microbatches=2, **choices)
    return dataclasses.replace(plan, precision=precision)


@pytest.mark.parametrize("degrees", PLANS, ids=name_of)
@pytest.mark.parametrize(("family", "precision"), [("llama", "bf16"), ("code_lm", "bf16"), ("code_lm", "fp16")])
@pytest.mark.matrix
def test_a_plan_is_within_the_noise_of_one_device(
    pool: Pool, family: str, precision: str, degrees: dict[str, int]
) -> None:
    build = workloads.FAMILIES[family]
    plan = lower(build, precision, degrees)
    result = pool.run(lambda: verify_here(build(), plan, steps=2, dtype=precision), ranks=plan.devices)[0]
    assert result.ok, (result.gradient_error, result.worst_gradient, result.parameter_error, result.tolerance)
    assert result.gradient_error > 1e-6  # it did run in the lower precision: rounding shows


def test_one_step_of_a_plan_is_a_few_roundings_from_one_device(pool: Pool) -> None:
    """Before trajectories part, nothing but the rounding of sums differs."""
    for degrees in ({"pp": 2}, {"dp_shard": 2}):
        plan = lower(workloads.llama, "bf16", degrees)
        result = pool.run(lambda: verify_here(workloads.llama(), plan, steps=1, dtype="bf16"), ranks=2)[0]  # noqa: B023
        assert result.gradient_error <= 2 * rounding("bf16")


def test_a_wrong_gradient_is_more_than_noise(pool: Pool) -> None:
    plan = lower(workloads.llama, "bf16", {"pp": 2})

    def job() -> Any:
        from weft.runtime import totals

        agree = totals.agree

        def wrong(sums: Any, held: Any, *args: Any, **options: Any) -> Any:
            held[0].parameter.grad.mul_(1.2)
            return agree(sums, held, *args, **options)

        totals.agree = wrong
        try:
            return verify_here(workloads.llama(), plan, steps=1, dtype="bf16")
        finally:
            totals.agree = agree

    result = pool.run(job, ranks=2)[0]
    assert not result.ok
    assert result.gradient_error > result.tolerance


def test_dtypes_of_what_runs(pool: Pool) -> None:
    plan = lower(workloads.mlp, "bf16", {"pp": 2, "dp_shard": 2})

    def job() -> Any:
        engine = parallelize(workloads.mlp(), plan)
        seen = set()
        for module in engine.model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda m, i, out: seen.add(out.dtype))
        loss = engine.step(next(engine.batches()))
        state = [t.dtype for s in engine.optimizer.state.values() for t in s.values()]
        return (
            seen,
            {h.parameter.dtype for h in engine.part.held},
            {h.parameter.grad.dtype for h in engine.part.held},
            {*state},
            loss.dtype,
        )

    for seen, parameters, gradients, state, loss in pool.run(job, ranks=4):
        assert seen == {torch.bfloat16}
        assert parameters == gradients == state == {torch.float32}
        assert loss == torch.float64


def test_other_dtypes_show_the_division_alone(pool: Pool) -> None:
    plan = lower(workloads.mlp, "bf16", {"dp_replicate": 2})
    found = pool.run(lambda: verify_here(workloads.mlp(), plan, steps=2, dtype="float64"), ranks=2)[0]
    assert found.ok
    assert found.gradient_error <= 1e-10
    with pytest.raises(InputError, match="dtype fp16 needs a plan in fp16, and this one is in bf16; plan with --prec"):
        verify_here(workloads.mlp(), plan, steps=1, dtype="fp16")


def test_a_loss_in_low_precision_is_weighed_in_float32() -> None:
    work = dataclasses.replace(workloads.mlp(), loss=lambda model, batch: model(batch[0]).mean())
    model = work.model()
    assert in_precision(work, "bf16").loss(model, (torch.ones(2, 12), None)).dtype == torch.float32
    pair = dataclasses.replace(work, loss=lambda model, batch: (model(batch[0]).sum(), 3))
    total, count = in_precision(pair, "fp16").loss(model, (torch.ones(2, 12), None))
    assert (total.dtype, count) == (torch.float32, 3)
    assert in_precision(work, "float32") is work


# -- float16 --------------------------------------------------------------------------------------------------------


def test_the_scale_grows_and_backs_off() -> None:
    scale = LossScale()
    scale.settle(True)
    assert (scale.value, scale.clean, scale.finite) == (INITIAL, 1, True)
    scale.settle(False)
    assert (scale.value, scale.clean, scale.finite) == (INITIAL * BACKOFF, 0, False)
    for _ in range(INTERVAL):
        scale.settle(True)
    assert (scale.value, scale.clean) == (INITIAL * BACKOFF * GROWTH, 0)
    other = LossScale()
    other.restore(scale.state())
    assert (other.value, other.clean) == (scale.value, scale.clean)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_found(bad: float) -> None:
    fine = torch.ones(3, 4)
    wrong = fine.clone()
    wrong[1, 2] = bad
    cpu = torch.device("cpu")
    assert float(squared_norm([fine, torch.empty(0), fine.double()], cpu)) == pytest.approx(24)
    assert not squared_norm([fine, wrong, wrong], cpu).isfinite()
    assert float(squared_norm([], cpu)) == 0
    assert squared_norm([torch.full((4,), 6e4, dtype=torch.float16)], cpu).isfinite()  # its square is none of float16


class Spike(workloads.Points):
    """One sample whose target is so far off that its gradient overflows once it is scaled."""

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i] + (1e4 if i == 3 else 0.0)


def spiked() -> Any:
    return dataclasses.replace(workloads.mlp(batch_size=8, samples=32), data=Spike(32, 12), shuffle=False)


@pytest.mark.parametrize("degrees", [{"pp": 2}, {"dp_replicate": 2}, {"dp_shard": 2}, {"pp": 2, "tp": 2}], ids=name_of)
def test_a_step_that_overflows_anywhere_is_left_out_everywhere(
    pool: Pool, degrees: dict[str, int], tmp_path: Path
) -> None:
    plan = lower(spiked, "fp16", degrees)

    def job() -> Any:
        engine = parallelize(spiked(), plan)
        told, finite, moved = [], [], []
        before = engine.state_dict()
        for _, batch in zip(range(3), engine.batches(), strict=False):
            engine.step(batch)
            after = engine.state_dict()
            moved.append(any(not torch.equal(before[n], after[n]) for n in after))
            before = after
            finite.append(engine.loss_scale.finite)
            told.append(engine.loss_scale.value)
        engine.save(tmp_path)
        again = parallelize(spiked(), plan)
        again.load(tmp_path)
        return told, finite, moved, again.loss_scale.state()

    every = pool.run(job, ranks=plan.devices)
    for told, finite, _, state in every:
        assert finite == [False, True, True]  # sample 3 is in the first batch
        assert told == [INITIAL * BACKOFF] * 3
        assert state == {"value": INITIAL * BACKOFF, "clean": 2}
    assert every[0][2] == finite  # parameters change in the steps that are taken, and only then


def test_small_gradients_survive_float16(pool: Pool) -> None:
    """A loss so small that its gradients vanish in float16 unless they are scaled."""

    def tiny() -> Any:
        small = lambda model, batch: F.mse_loss(model(batch[0]), batch[1]) * 1e-7  # noqa: E731
        return dataclasses.replace(workloads.mlp(), loss=small)

    plan = lower(tiny, "fp16", {"pp": 2})

    def job() -> Any:
        engine = parallelize(tiny(), plan)
        engine.step(next(engine.batches()))
        return engine.gradients()

    gradients = pool.run(job, ranks=2)[0]
    work = tiny()
    torch.manual_seed(work.seed)
    model = work.model()
    work.loss(model, parallel_batch(work)).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, rtol=2e-2, atol=1e-10), name


def parallel_batch(work: Any) -> Any:
    from weft.runtime.batches import Sampler

    return Sampler(work).global_batch(0)


# -- planning -------------------------------------------------------------------------------------------------------


def test_a_profile_in_bf16_keeps_less_and_computes_faster_where_the_device_does() -> None:
    plain, low = capture(workloads.code_lm()), capture(workloads.code_lm(), "bf16")
    assert (plain.precision, low.precision) == ("float32", "bf16")
    assert [c.name for c in plain.calls] == [c.name for c in low.calls]
    saved = [sum(s.bytes.at(64) for c in p.calls for s in c.saved) for p in (plain, low)]
    assert 0.5 < saved[1] / saved[0] < 0.75  # the residual stream and the normalisations stay float32
    dtypes = {op.dtype for c in low.calls for op in c.forward if op.kind == "matmul"}
    assert dtypes == {"bfloat16"}
    # The same modules can be divided, though autocast's copies stand before every weight.
    assert [g.styles for g in plain.tensor_groups] == [g.styles for g in low.tensor_groups]
    divided = [sum(op.group >= 0 and op.kind == "matmul" for c in p.calls for op in c.forward) for p in (plain, low)]
    assert divided[0] == divided[1] > 0
    assert low.tensor_groups[0].forward_bytes.at(8) == plain.tensor_groups[0].forward_bytes.at(8) / 2


def test_the_rate_is_that_of_the_dtype() -> None:
    device = preset("h100-sxm").device
    single, half = (device.seconds("matmul", 1e12, 0.0, dtype) - device.overhead_s for dtype in ("float32", "bfloat16"))
    assert single / half == pytest.approx(989.4 / 67)
    single, half = (device.seconds("attention", 1e12, 0.0, d) - device.overhead_s for d in ("float32", "bfloat16"))
    assert single / half == pytest.approx(989.4 / 67)
    cpu = processes(1, memory_bytes=2**30, cores=1.0).device
    assert cpu.seconds("matmul", 1e9, 0.0, "bfloat16") > cpu.seconds("matmul", 1e9, 0.0)


def test_plans_carry_the_precision_of_their_profile() -> None:
    profile, cluster = capture(workloads.mlp(), "bf16"), Cluster.local(2, "1GiB")
    assert search(profile, cluster).plan.precision == "bf16"
    assert search(profile, cluster, precision="bf16").plan.explain().splitlines()[0].endswith(", bf16")
    plan = make_plan(profile, cluster, pp=2)
    assert estimate(profile, cluster, plan).step_time_s > 0
    with pytest.raises(PlanError, match="the plan is in bf16 but the profile is of float32"):
        estimate(capture(workloads.mlp()), cluster, plan)
