"""Keras models: the face of modules, the single device's weights, and every plan equal to one device."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import keras_models  # sets the backend before keras is imported
import pytest
import torch

import keras  # isort: skip
from weft.adapters import adapt
from weft.capture import capture
from weft.capture.initial import assign, build_fake, materialize
from weft.capture.units import find_units
from weft.cluster import Cluster
from weft.errors import InputError, ModelError
from weft.jobs.reference import InsteadOfFloat32
from weft.jobs.verify import verify_here
from weft.planner import make_plan
from weft.runtime.pool import Pool

PLANS: list[dict[str, int]] = [
    {"pp": 2},
    {"pp": 3},
    {"dp_shard": 2},
    {"dp_replicate": 2},
    {"pp": 2, "dp_replicate": 2},
    {"pp": 2, "dp_shard": 2},
]


@pytest.mark.parametrize("degrees", PLANS, ids=lambda degrees: "-".join(f"{n}{d}" for n, d in degrees.items()))
@pytest.mark.parametrize("family", keras_models.FAMILIES)
@pytest.mark.matrix
def test_equals_one_device(pool: Pool, family: str, degrees: dict[str, int]):
    devices = math.prod(degrees.values())
    profile = capture(keras_models.workload(family))
    plan = make_plan(profile, Cluster.local(devices=devices), microbatches=2, **degrees)

    def job() -> Any:
        return verify_here(keras_models.workload(family), plan, steps=3, dtype="float64")

    result = pool.run(job, ranks=devices)[0]
    assert result.loss_error <= 1e-10
    assert result.gradient_error <= 1e-10, result.worst_gradient
    assert result.parameter_error <= 1e-10, result.worst_parameter
    if "pp" in degrees:
        assert max(result.parameter_bytes) < 0.9 * sum(result.parameter_bytes)


def test_layers_are_units():
    units = {family: find_units(build_fake(make, 0).model) for family, make in keras_models.FAMILIES.items()}
    assert units["sequential"] == ["layer.dense", "layer.dense_1", "layer.dense_2", "layer.dense_3"]
    assert units["functional"] == [
        "layer.dense",
        "layer.shared",
        "layer.layer_normalization",
        "layer.dense_2",
        "layer.dense_1",
    ]
    assert units["subclassed"] == ["head", *(f"layer.block{n}" for n in ("", "_1", "_2", "_3"))]
    assert units["masked"] == ["words", "attention", "dense", "memory", "head"]


@pytest.mark.parametrize("family", keras_models.FAMILIES)
def test_weights_are_those_of_keras_own_seed(family: str):
    state = torch.random.get_rng_state()
    keras.utils.set_random_seed(7)
    own = keras_models.FAMILIES[family]()
    torch.random.set_rng_state(state)
    theirs = [v.value.detach() for v in own.weights]

    fake = build_fake(keras_models.FAMILIES[family], 7)
    assign(fake.model, materialize(fake, dict.fromkeys(fake.names)))

    ours = [v.value.detach() for v in fake.model.weights]
    assert len(ours) >= 8
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_an_adapted_model_is_the_same_keras_model():
    model = keras_models.functional()
    x = torch.randn(4, 16)
    before = model(x)
    parameters = {id(p) for p in model.parameters()}

    assert adapt(adapt(model)) is model

    assert torch.equal(model(x), before)
    assert {id(p) for p in model.parameters()} == parameters
    assert len(model.weights) == len(parameters) == len(list(model.named_parameters(remove_duplicate=False)))
    model.get_submodule("layer.shared").torch_kernel.data.zero_()
    assert not torch.equal(model(x), before)


def test_moving_averages_are_buffers_and_frozen_layers_parameters():
    model = adapt(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()]))
    names = {name.rpartition("_")[2]: name for name, _ in model.named_buffers()}
    assert set(names) == {"mean", "variance"}
    before = model.get_buffer(names["mean"]).clone()
    model(torch.randn(8, 4), training=True)
    assert not torch.equal(model.get_buffer(names["mean"]), before)

    frozen = adapt(keras_models.subclassed())
    assert [n for n, p in frozen.named_parameters() if not p.requires_grad] == [
        f"layer.{frozen.blocks[1].name}.up.torch_kernel",
        f"layer.{frozen.blocks[1].name}.up.torch_bias",
    ]


@pytest.mark.parametrize(("shape", "axis"), [((4,), -1), ((3, 5, 2), -1), ((3, 5, 2), 1)])
def test_batch_normalization_is_keras_own(shape: tuple[int, ...], axis: int):
    x = torch.randn(8, *shape, dtype=torch.float64)
    norms = [keras.layers.BatchNormalization(axis, momentum=0.9, dtype="float64") for _ in range(2)]
    for norm in norms:
        norm.build(x.shape)
    adapt(norms[1])
    results = []
    for norm in norms:
        given = x.clone().requires_grad_()
        with InsteadOfFloat32(torch.float64):  # Keras computes in float32 here, whatever it is asked for
            out = norm(given, training=True)
        out.square().mul(x).sum().backward()
        results.append([out, given.grad, *(v.value for v in norm.weights)])
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_keras_layers_inside_a_torch_module_and_torch_modules_inside_keras():
    torch.manual_seed(0)
    inner = keras.Sequential([keras.Input((4,)), keras.layers.TorchModuleWrapper(torch.nn.Linear(4, 4))])
    model = adapt(torch.nn.Sequential(torch.nn.Linear(4, 4), inner))
    names = [name.split(".")[-1] for name, _ in model.named_parameters()]
    assert names == ["weight", "bias", "weight", "bias"]
    with torch.no_grad():
        inner.weights[0].value.zero_()
    assert not model[1].layers[0].module.weight.any()


def test_a_model_without_weights():
    with pytest.raises(ModelError, match=r"the Keras layer 'blocks.*' has no weights yet; let the factory call"):
        build_fake(keras_models.Blocks, 0)


def test_another_backend(monkeypatch: pytest.MonkeyPatch):
    other = ModuleType("keras")
    other.Layer = type("Layer", (), {})
    other.config = SimpleNamespace(backend=lambda: "jax")
    monkeypatch.setitem(sys.modules, "keras", other)
    with pytest.raises(
        InputError, match=r"on the jax backend.*set os\.environ\['KERAS_BACKEND'\] = 'torch' in the file"
    ):
        build_fake(other.Layer, 0)
