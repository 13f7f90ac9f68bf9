import time
from typing import Any

import pytest
import torch
from capture_models import CASES, Case
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import Dataset

from examples.code_lm import workload as example
from weft.capture import Profile, capture
from weft.capture.initial import build_fake, map_tensors
from weft.capture.profile import LOSS, NO_GROUP, Affine
from weft.capture.recorder import record
from weft.capture.units import find_units
from weft.errors import BatchError, InputError, ModelError
from weft.workload import Workload


class Samples(Dataset[Any]):
    """The samples of a case's batches."""

    def __init__(self, case: Case) -> None:
        self.batch = case.batch(8)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        return {key: value[i] for key, value in self.batch.items()}


def workload(case: Case, **settings: Any) -> Workload:
    defaults = dict(optimizer=lambda p: torch.optim.AdamW(p), batch_size=8)
    return Workload(**{**defaults, "model": case.model, "loss": case.loss, "data": Samples(case), **settings})


@pytest.fixture(scope="module")
def profile() -> Profile:
    return capture(example(layers=3, hidden=32, heads=4, context=16))


def test_costs_are_affine_in_the_samples(profile: Profile) -> None:
    """The line through two and four samples meets what eight cost."""
    settings = example(layers=3, hidden=32, heads=4, context=16)
    fake = build_fake(settings.model, 0)
    recording = record(fake.model, find_units(fake.model), settings.loss, settings.sample_batch(8))
    for call, recorded in zip(profile.calls, recording.calls, strict=True):
        cost = recording.costs[recorded.kind]
        for ops, raw in (
            (call.forward, (*recorded.glue.forward, *cost.forward)),
            (call.backward, (*cost.backward, *recorded.glue.backward)),
        ):
            real = [op for op in raw if op.kind != "view"]
            assert [op.name for op in ops] == [op.name for op in real], call.name
            assert [op.flops.at(8) for op in ops] == [op.flops for op in real], call.name
            assert [op.bytes.at(8) for op in ops] == [op.bytes for op in real], call.name
        assert [out.bytes.at(8) for out in call.outputs] == [leaf.bytes for leaf in recorded.tensors]


def test_calls_of_the_example(profile: Profile) -> None:
    names = [call.name for call in profile.calls]
    assert names == ["token", "position", "blocks.0", "blocks.1", "blocks.2", "norm", "head", LOSS]
    blocks = profile.calls[2:5]
    # The first block's glue adds the embeddings.
    assert blocks[0].kind != blocks[1].kind == blocks[2].kind
    assert blocks[0].forward[0].name == "aten.add"
    flops = sum(op.flops.per_sample for op in blocks[1].forward)
    assert flops == 16 * (2 * 12 * 32 * 32 + 4 * 16 * 32)
    assert sum(op.flops.fixed for op in blocks[1].forward) == 0
    assert blocks[1].parameters[0] == "blocks.1.norm_1.weight"
    assert profile.parameters["token.weight"].shape == (256, 32)
    assert profile.sample_bytes == 2 * 16 * 8
    assert profile.batch_size == 32


def test_saved_activations_are_kept_once(profile: Profile) -> None:
    """What a block returns is what the next one keeps: every call keeps its input."""
    hidden = 16 * 32 * 4
    statistics = 4 * 16 * 4
    block = profile.calls[3]
    inside = {saved.group: saved.bytes.per_sample for saved in block.saved}
    assert inside[NO_GROUP] == 4 * hidden + statistics  # input, both norms' results, input of the second norm
    attention, feed_forward = (g for g, group in enumerate(profile.tensor_groups) if group.unit == "blocks.1")
    assert inside[attention] == 4 * hidden + 4 * 16 * 4  # query, key, value, result; softmax statistics
    assert inside[feed_forward] == 2 * 4 * hidden
    assert profile.calls[5].saved[0].bytes == Affine(0, hidden + 2 * 16 * 4)


@pytest.mark.parametrize("name", ["example", "llama", "gpt2", "bert", "vit", "mixtral", "mlp", "skips"])
@pytest.mark.matrix
def test_saved_bytes_are_those_of_a_real_run(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.model()
    own: set[int] = set()
    map_tensors(model, lambda _, t: own.add(t.untyped_storage().data_ptr()) or t)  # type: ignore[func-returns-value]
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        result = case.loss(model, case.batch(4))
    real = sum(storage.nbytes() for storage in kept.values())
    del result
    profile = capture(workload(case))
    assert sum(saved.bytes.at(4) for call in profile.calls for saved in call.saved) == real


def test_divided_operations_are_marked(profile: Profile) -> None:
    for call in profile.calls[2:5]:
        groups = {g for g, group in enumerate(profile.tensor_groups) if group.unit == call.unit}
        for operations in (call.forward, call.backward):
            assert {op.group for op in operations} == {NO_GROUP, *groups}
            products = [op for op in operations if op.flops.at(1)]
            assert all(op.group in groups for op in products)
            assert all(op.group == NO_GROUP for op in operations if op.kind == "normalization")
    weight = profile.parameters["blocks.1.mlp.2.weight"]
    assert (weight.tensor_dim, profile.tensor_groups[weight.group].unit) == (1, "blocks.1")
    assert profile.parameters["blocks.1.mlp.2.bias"].group == NO_GROUP


@pytest.mark.parametrize("name", ["t5", "skips", "twice", "gemma2"])
def test_every_kind_of_graph(name: str) -> None:
    case = CASES[name]
    profile = capture(workload(case))
    assert profile.calls[-1].name == LOSS
    used = {n for call in profile.calls for n in (*call.parameters, *call.buffers)}
    trainable = {n for n, p in profile.parameters.items() if p.trainable}
    assert trainable <= used <= set(profile.parameters)
    assert all(0 <= s.call < i for i, call in enumerate(profile.calls) for s in call.inputs)
    names = [n for p in profile.parameters.values() for n in p.names]
    assert len(names) == len(set(names))


def test_optimizer_state_is_that_of_the_users_optimizer() -> None:
    def state(optimizer: Any) -> float:
        return capture(workload(CASES["mlp"], optimizer=optimizer)).optimizer_state_bytes

    assert state(lambda p: torch.optim.AdamW(p)) == 2
    assert state(lambda p: torch.optim.SGD(p, lr=0.1)) == 0
    assert state(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)) == 1
    with pytest.raises(InputError, match=r"Workload\.optimizer raised TypeError"):
        state(lambda: None)


def test_bad_batches() -> None:
    def fails(**settings: Any) -> str:
        with pytest.raises(BatchError) as error:
            capture(workload(CASES["mlp"], **settings))
        return str(error.value)

    assert "a batch of 2 samples has a tensor of shape (3, 2)" in fails(collate=lambda samples: torch.ones(3, 2))
    assert "has a tensor of shape ()" in fails(collate=lambda samples: torch.tensor(1.0))
    assert "must contain tensors, got a list" in fails(collate=lambda samples: [1, 2])
    assert "raised KeyError: 5" in fails(collate=lambda samples: {}[5])


def test_calls_that_depend_on_the_batch_size() -> None:
    def loss(model: Any, batch: Any) -> Any:
        x = model[0](batch["x"])
        return (x if len(x) == 2 else model[1](x)).sum()

    model = lambda: torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))  # noqa: E731
    with pytest.raises(ModelError, match="another order for 2 samples than for 4"):
        capture(workload(CASES["mlp"]._replace(model=model, loss=loss)))


def test_capture_is_quick() -> None:
    settings = example(layers=24)
    capture(settings)  # the first pays for torch's imports
    start = time.process_time()
    capture(settings)
    assert time.process_time() - start < 1.5
