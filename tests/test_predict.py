"""Predictions under a plan are those of one device."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_equality import plan_for
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import weft
from weft.adapters import adapt, making, running
from weft.capture.initial import seeded
from weft.runtime.pool import Pool

KINDS: dict[str, tuple[dict[str, int], int]] = {  # degrees, microbatches
    "pp=2": ({"pp": 2}, 2),
    "pp=3": ({"pp": 3}, 4),
    "tp=2": ({"tp": 2}, 1),
    "dp_shard=2": ({"dp_shard": 2}, 1),
    "dp=2 x pp=2": ({"dp_replicate": 2, "pp": 2}, 2),
    "pp=2 x tp=2": ({"pp": 2, "tp": 2}, 2),
}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return {"logits": model(input_ids=batch["input_ids"]).logits, "first": (batch["input_ids"][:, 0],)}


def pictures(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    result = model(batch["images"])
    return getattr(result, "logits", result)


def noise(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(batch["images"], torch.full((len(batch["images"]),), 300)).sample


def translation(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    labels = batch["labels"][:, :7].contiguous()
    return model(input_ids=batch["input_ids"], decoder_input_ids=labels, use_cache=False).logits


PREDICT: dict[str, Any] = {
    "code_lm": lambda model, batch: model(batch["x"]) if isinstance(batch, dict) else model(batch[0]),
    "mlp": lambda model, batch: model(batch[0]),
    "encoder_decoder": translation,
    "vision_transformer": pictures,
    "batchnorm_cnn": pictures,
    "unet": noise,
    "lstm": lambda model, batch: model(batch["input_ids"]),
    "keras": lambda model, batch: model(batch["x"]),
}


def workload_of(family: str) -> weft.Workload:
    return dataclasses.replace(FAMILIES[family](), predict=PREDICT.get(family, logits))


def alone(family: str, samples: int) -> Any:
    """On one device, without weft."""
    workload = workload_of(family)
    with seeded(workload.seed), making():
        model = adapt(workload.model()).eval()
    with torch.no_grad(), running(torch.device("cpu")):
        return PREDICT.get(family, logits)(model, workload.sample_batch(samples))


def predict(family: str, plan: weft.Plan, samples: int, purpose: Any = "inference") -> Any:
    workload = workload_of(family)
    return weft.parallelize(workload, plan, purpose=purpose).predict(workload.sample_batch(samples))


def assert_close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert len(tree_leaves(found)) == len(tree_leaves(expected))
    for mine, theirs in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert mine.shape == theirs.shape
        scale = max(1.0, float(theirs.double().abs().max()))
        assert float((mine.double() - theirs.double()).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("kind", ["pp=2", "tp=2", "dp=2 x pp=2"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.matrix
def test_predictions_of_every_family_are_one_devices(pool: Pool, family: str, kind: str):
    degrees, microbatches = KINDS[kind]
    plan = plan_for(workload_of(family), degrees, microbatches=microbatches)
    expected = alone(family, 8)
    for found in pool.run(predict, family, plan, 8, ranks=plan.devices):
        assert_close(found, expected)


@pytest.mark.parametrize("samples", [8, 5, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.matrix
def test_batches_of_any_size_are_put_together_in_order(pool: Pool, kind: str, samples: int):
    degrees, microbatches = KINDS[kind]
    plan = plan_for(workload_of("decoder"), degrees, microbatches=microbatches)
    expected = alone("decoder", samples)
    for found in pool.run(predict, "decoder", plan, samples, ranks=plan.devices):
        assert_close(found, expected)
        assert found["first"][0].tolist() == expected["first"][0].tolist()


def while_training(plan: weft.Plan, directory: str) -> tuple[Any, Any, Any]:
    """Before a step; after two; and by an engine for inference that loads what was saved."""
    workload = workload_of("tied_decoder")
    engine = weft.parallelize(workload, plan)
    batch = workload.sample_batch(8)
    before = engine.predict(batch)
    for _, each in zip(range(2), engine.batches(), strict=False):
        engine.step(each)
    after = engine.predict(batch)
    engine.save(directory)
    other = weft.parallelize(workload, plan, purpose="inference")
    other.load(directory)
    return before, after, other.predict(batch)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_an_engine_that_trains_predicts_too(pool: Pool, tmp_path: Path, recompute: str):
    degrees, microbatches = KINDS["pp=2"]
    plan = plan_for(workload_of("tied_decoder"), degrees, microbatches=microbatches, recompute=recompute)
    expected = alone("tied_decoder", 8)
    for before, after, loaded in pool.run(while_training, plan, str(tmp_path), ranks=2):
        assert_close(before, expected)
        assert_close(loaded, after, 0.0)
        assert float((after["logits"] - before["logits"]).abs().max()) > 1e-3


def refused(predict: Any) -> str:
    workload = dataclasses.replace(FAMILIES["mlp"](), predict=predict)
    try:
        engine = weft.parallelize(workload, plan_for(workload, {}), purpose="inference")
        engine.predict(workload.sample_batch(8))
    except weft.WeftError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("predict", "what"),
    [
        (None, "does not say what to predict"),
        (lambda model, batch: model(batch[0]).sum(), "needs the samples in dimension 0"),
        (lambda model, batch: 3, "returned no tensor"),
    ],
)
def test_what_cannot_be_put_together_is_refused(pool: Pool, predict: Any, what: str):
    assert what in pool.run(refused, predict, ranks=1)[0]


def test_a_workload_for_inference_alone_does_not_train(pool: Pool):
    given = FAMILIES["mlp"]()
    workload = weft.Workload(
        model=given.model, data=given.data, batch_size=8, predict=lambda model, batch: model(batch[0])
    )

    def job() -> tuple[Any, str]:
        plan = plan_for(given, {})
        found = weft.parallelize(workload, plan, purpose="inference").predict(workload.sample_batch(8))
        try:
            weft.parallelize(workload, plan)
        except weft.InputError as error:
            return found, str(error)
        return found, ""

    found, error = pool.run(job, ranks=1)[0]
    assert_close(found, alone("mlp", 8))
    assert "no loss" in error
