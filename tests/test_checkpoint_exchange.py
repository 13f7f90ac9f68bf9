"""Weights out of checkpoints as other programs read them, and into them; and what the commands tell."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
import workloads
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from workloads import Tokens, causal_lm

import weft
from weft.capture import capture
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.exchange import export
from weft.cli import run
from weft.cluster import Cluster
from weft.errors import CheckpointError, ModelError
from weft.jobs import bring
from weft.planner import make_plan
from weft.runtime.configuration import configuration_of
from weft.runtime.pool import Pool

MODELS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "llama": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64)),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=96,
            num_local_experts=4,
        )
    ),
}


def workload_of(name: str) -> weft.Workload:
    return weft.Workload(
        model=MODELS[name],
        loss=causal_lm,
        data=Tokens(32, 8, 96),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        batch_size=8,
    )


def trained(pool: Pool, name: str, directory: Path, **degrees: int) -> dict[str, Tensor]:
    """One step, saved; the weights."""
    devices = 1
    for degree in degrees.values():
        devices *= degree
    plan = make_plan(capture(workload_of(name)), Cluster.local(devices), **degrees)

    def job() -> dict[str, Tensor]:
        engine = weft.parallelize(workload_of(name), plan)
        engine.step(next(engine.batches()))
        engine.save(directory)
        return engine.state_dict()

    found: dict[str, Tensor] = pool.run(job, ranks=devices)[0]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_what_is_exported_and_back(pool: Pool, tmp_path: Path, name: str) -> None:
    state = trained(pool, name, tmp_path / "saved", pp=2, tp=2)
    checkpoint = Checkpoint.open(tmp_path / "saved" / "step-00000001")
    done = export(checkpoint, tmp_path / "out", shard_bytes=20_000)
    assert len(done.files) > 1
    model = type(MODELS[name]()).from_pretrained(tmp_path / "out")
    for parameter, tensor in model.named_parameters():
        assert torch.equal(tensor, state[parameter]), parameter

    path = bring.run(workload_of(name), tmp_path / "out", tmp_path / "back")
    plan = make_plan(capture(workload_of(name)), Cluster.local(2), dp_shard=2)

    def job() -> tuple[dict[str, Tensor], float]:
        engine = weft.parallelize(workload_of(name), plan)
        engine.load(path.parent)
        return engine.state_dict(), float(engine.step(next(engine.batches())))

    brought, loss = pool.run(job, ranks=2)[0]
    for parameter, tensor in state.items():
        assert torch.equal(brought[parameter], tensor), parameter
    assert math.isfinite(loss)


def test_labels_go_out_and_back(tmp_path: Path) -> None:
    """What a config names by number is there again: JSON's keys are text."""

    def model() -> tf.PreTrainedModel:
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        return tf.BertForSequenceClassification(tf.BertConfig(vocab_size=50, num_labels=5, **sizes))

    made = model()
    made.save_pretrained(tmp_path / "made")
    workload = weft.Workload(model=model, data=[torch.zeros(3, dtype=torch.long)] * 4, batch_size=2)
    for begin, end in (("made", "out"), ("out", "again")):
        path = bring.run(workload, tmp_path / begin, tmp_path / f"of {begin}")
        export(Checkpoint.open(path), tmp_path / end)
        found = tf.BertForSequenceClassification.from_pretrained(tmp_path / end)
        assert found.config.id2label == made.config.id2label
        tensors = found.state_dict()
        for name, tensor in made.state_dict().items():
            assert torch.equal(tensors[name], tensor), name


def test_a_config_that_is_no_json_goes_out_as_far_as_it_is() -> None:
    model = MODELS["gpt2"]()
    model.config.mine = {"kept": 1, "function": print}
    described = configuration_of(model)
    assert described is not None
    assert described["mine"] == {"kept": 1, "function": None}
    assert described["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}


class Rates(nn.Module):
    """Looks at numbers that it computes, as models with stochastic depth do."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]
        self.layers = nn.ModuleList(nn.Linear(12, 12 if rate < 0.1 else 1) for rate in self.rates)

    def forward(self, x: Tensor) -> Tensor:
        for rate, layer in zip(self.rates, self.layers, strict=True):
            x = layer(x) * (1 - rate)
        return x


def test_weights_come_in_for_a_model_that_computes_numbers(tmp_path: Path) -> None:
    model = Rates()
    save_model(model, tmp_path / "made.safetensors")
    workload = dataclasses.replace(workloads.mlp(), model=Rates)
    found = Checkpoint.open(bring.run(workload, tmp_path / "made.safetensors", tmp_path / "back"))
    found.verify()
    for name, tensor in model.state_dict().items():
        whole = tuple(slice(0, length) for length in tensor.shape)
        assert torch.equal(found.stored(f"model.{name}").read(whole), tensor), name


def test_any_model_goes_out_as_one_file_and_back(pool: Pool, tmp_path: Path) -> None:
    plan = make_plan(capture(workloads.norms()), Cluster.local(2), dp_replicate=2)

    def job() -> dict[str, Tensor]:
        engine = weft.parallelize(workloads.norms(), plan)
        engine.step(next(engine.batches()))
        engine.save(tmp_path / "saved")
        return engine.state_dict()

    state = pool.run(job, ranks=2)[0]
    checkpoint = Checkpoint.open(tmp_path / "saved" / "step-00000001")
    assert export(checkpoint, tmp_path / "model.safetensors").files == ("model.safetensors",)
    found = load_file(tmp_path / "model.safetensors")
    model = workloads.norms().model()
    assert set(found) == set(model.state_dict())
    for name, tensor in found.items():
        assert torch.equal(tensor, state[name]), name
    with pytest.raises(CheckpointError, match="is there already"):
        export(checkpoint, tmp_path / "model.safetensors")

    save_model(model, tmp_path / "other.safetensors")
    path = bring.run(workloads.norms(), tmp_path / "other.safetensors", tmp_path / "back")
    brought = Checkpoint.open(path)
    brought.verify()
    assert (brought.index.step, brought.index.plan) == (0, None)
    with pytest.raises(ModelError, match=r"has \S+, which the model has not"):
        bring.run(workloads.mlp(), tmp_path / "other.safetensors", tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds checkpoints already"):
        bring.run(workloads.norms(), tmp_path / "other.safetensors", tmp_path / "back")


def test_the_commands(
    pool: Pool, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(pool, "llama", tmp_path / "saved", pp=2)
    capfd.readouterr()
    monkeypatch.chdir(tmp_path)
    assert run(["checkpoint", "show", "saved", "--tensors"]) == 0
    said = capfd.readouterr().out
    assert "pp=2" in said
    assert "whole" in said
    assert "optimizer.lm_head.weight.exp_avg" in said
    assert run(["export", "saved", "out"]) == 0
    assert run(["export", "saved", "out"]) == 2
    assert "is there already" in capfd.readouterr().err
    (tmp_path / "saved" / "step-00000001" / "rank-00000.safetensors").write_bytes(b"no")
    assert run(["checkpoint", "show", "saved", "--json"]) == 0
    (row,) = json.loads(capfd.readouterr().out)["checkpoints"]
    assert "is 2 bytes long" in row["state"]
    assert run(["export", "saved", "again"]) == 2
    assert not (tmp_path / "again").exists()
    assert run(["checkpoint", "show", "nowhere"]) == 2
    assert "holds no complete checkpoint" in capfd.readouterr().err
