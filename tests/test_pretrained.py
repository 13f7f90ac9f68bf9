"""Directories of pretrained weights: every rank reads what it holds, and holds what from_pretrained would give it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor

import weft
from weft.capture import capture
from weft.errors import InputError, ModelError
from weft.inference.pretrained import pretrained
from weft.inference.weights import Entry
from weft.jobs.predict import plan_for
from weft.jobs.reference import SingleDevice, in_dtype
from weft.planner import search
from weft.runtime.pool import Pool
from weft.target import Target

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 96}
LLAMA = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, dtype="bfloat16")).bfloat16(),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=96, n_positions=64)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=96, decoder_start_token_id=0)
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**LLAMA | {"num_hidden_layers": 2}, num_local_experts=4, num_experts_per_tok=2)
    ),
}
PLANS: dict[str, list[dict[str, int]]] = {
    "llama": [{"pp": 2}, {"tp": 2}, {"dp_shard": 2}],
    "gpt2": [{"pp": 2, "tp": 2}],
    "t5": [{"pp": 2}],
    "mixtral": [{"dp_shard": 2, "tp": 2}, {"pp": 2, "tp": 2}],
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a family's directory, once."""

    def make(family: str) -> Path:
        path = tmp_path_factory.getbasetemp() / family
        if not path.is_dir():
            torch.manual_seed(3)
            MODELS[family]().save_pretrained(path, max_shard_size="40KB")
        return path

    return make


def trainable(directory: Path) -> weft.Workload:
    return replace(
        pretrained(directory, batch_size=8),
        loss=lambda model, batch: model(**batch, use_cache=False).logits.float().square().mean(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )


def read_on_each(directory: str, plan: weft.Plan) -> tuple[dict[str, Tensor], int, int]:
    """The whole model from what the ranks read, and on each the bytes it read and holds."""
    count = 0
    original = Entry.read

    def read(self: Entry, box: Any) -> Tensor:
        nonlocal count
        found = original(self, box)
        count += found.nbytes
        return found

    Entry.read = read  # type: ignore[method-assign]
    try:
        engine = weft.parallelize(trainable(Path(directory)), plan)
    finally:
        Entry.read = original  # type: ignore[method-assign]
    held = [h.parameter for h in engine.part.held]
    local = [p.to_local() if isinstance(p, torch.distributed.tensor.DTensor) else p for p in held]
    return engine.state_dict(), count, sum(p.nbytes for p in local)


@pytest.mark.parametrize(("family", "degrees"), [(family, plan) for family, plans in PLANS.items() for plan in plans])
@pytest.mark.matrix
def test_every_rank_reads_what_it_holds(
    pool: Pool, directory: Callable[[str], Path], family: str, degrees: dict[str, int]
) -> None:
    path = directory(family)
    assert len(list(path.glob("*.safetensors"))) > 2
    devices = torch.tensor([*degrees.values()]).prod().item()
    plan = search(capture(trainable(path)), weft.Cluster.local(devices=devices), **degrees).plan
    found = pool.run(read_on_each, str(path), plan, ranks=devices)
    auto = tf.AutoModelForSeq2SeqLM if family == "t5" else tf.AutoModelForCausalLM
    expected = auto.from_pretrained(path)
    state = found[0][0]
    for name, parameter in expected.named_parameters():
        assert state[name].dtype == parameter.dtype
        assert torch.equal(state[name], parameter), name
    whole = sum(p.nbytes for p in expected.parameters())
    for _, read, held in found:
        assert read == held
        assert held < 0.9 * whole


def generate(directory: str, plan: weft.Plan, prompts: list[list[int]]) -> tuple[list[list[int]], Tensor]:
    engine = weft.parallelize(pretrained(directory, batch_size=2), plan, purpose="inference")
    tokens = engine.generate(prompts, max_new_tokens=12).sequences.tolist()
    return tokens, engine.predict({"input_ids": torch.tensor(prompts)})


def test_it_generates_and_predicts_with_them(pool: Pool, directory: Callable[[str], Path]) -> None:
    path = directory("gpt2")
    prompts = [[5, 9, 2], [7, 1, 3]]
    model = tf.AutoModelForCausalLM.from_pretrained(path)
    plan = plan_for(pretrained(path, batch_size=2), weft.Cluster.local(devices=2), {"pp": 2})
    tokens, logits = pool.run(generate, str(path), plan, prompts, ranks=2)[0]
    with torch.no_grad():
        expected = model.generate(
            torch.tensor(prompts), max_new_tokens=12, do_sample=False, attention_mask=torch.ones(2, 3), pad_token_id=0
        )
        assert tokens == expected.tolist()
        assert torch.allclose(logits, model(torch.tensor(prompts)).logits, atol=1e-5)


def test_one_device_has_these_weights_too(directory: Callable[[str], Path]) -> None:
    workload = trainable(directory("gpt2"))
    plan = search(capture(workload), weft.Cluster.local(devices=1)).plan
    state = SingleDevice(in_dtype(workload, torch.float64), torch.device("cpu"), plan=plan).state()
    for name, parameter in tf.GPT2LMHeadModel.from_pretrained(directory("gpt2")).named_parameters():
        assert torch.equal(state[name], parameter.double())


def test_a_directory_is_a_target(directory: Callable[[str], Path]) -> None:
    workload = Target.parse(str(directory("llama")), {"dtype": "float32", "batch_size": "2"}).load()
    assert workload.batch_size == 2
    assert {p.dtype for p in workload.model().parameters()} == {torch.float32}
    assert {p.dtype for p in pretrained(directory("llama")).model().parameters()} == {torch.bfloat16}


def test_a_directory_may_have_a_tokenizer(directory: Callable[[str], Path], tmp_path: Path) -> None:
    target = Target.parse(str(tmp_path))
    (tmp_path / "config.json").write_text((directory("llama") / "config.json").read_text())
    assert target.beside("tokenizer") is None
    words = tokenizers.models.WordLevel({"weft": 0, "warp": 1}, unk_token="weft")
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words)).save_pretrained(tmp_path)
    tokenizer = target.beside("tokenizer")
    assert tokenizer is not None
    assert tokenizer.encode("warp") == [1]
    assert target.beside("model") is None


def test_a_base_models_files_have_no_prefix(directory: Callable[[str], Path], tmp_path: Path) -> None:
    tf.GPT2Model.from_pretrained(directory("gpt2")).save_pretrained(tmp_path)
    workload = pretrained(tmp_path)
    assert workload.weights is not None
    assert "transformer.h.0.ln_1.weight" in workload.weights(workload.model())


def test_what_does_not_fit_is_refused(directory: Callable[[str], Path], tmp_path: Path) -> None:
    def said(text: str, kind: type[Exception] = ModelError, **options: Any) -> None:
        with pytest.raises(kind, match=text):
            pretrained(tmp_path, **options)

    said("has no config.json; give a directory", InputError)
    path = directory("gpt2")
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    said("model.safetensors is missing; the weights must be there as safetensors")
    said("dtype=float12 is unknown; choose from float32", InputError, dtype="float12")
    tensors: dict[str, Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    save_file({"extra": torch.ones(1)} | tensors, tmp_path / "model.safetensors")
    said("has what the model has not: extra; give a directory")
    some = dict(tensors)
    del some["transformer.ln_f.bias"]
    save_file(some, tmp_path / "model.safetensors")
    said(r"it lacks transformer\.ln_f\.bias; give a directory")
    save_file(tensors | {"transformer.ln_f.bias": torch.ones(3)}, tmp_path / "model.safetensors")
    said(r"transformer\.ln_f\.bias has shape \(3,\) in its files and \(32,\) by its config\.json")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-7])
    said("its last 7 bytes are missing")
    for broken in (b"", b"broken", b"not safetensors at all", content[:20]):
        (tmp_path / "model.safetensors").write_bytes(broken)
        said("cannot be read as safetensors")
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    said("its weights are quantized")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such"}))
    said("transformers cannot read it", InputError)
