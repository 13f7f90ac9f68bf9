import subprocess
import sys
from collections.abc import Callable

import numpy
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from examples.code_lm import CodeLM
from weft.capture.initial import assign, build_fake, map_tensors, materialize
from weft.errors import ModelError

SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=32)


class Odd(nn.Module):
    """Initialisers that write part of a tensor, draw from generators of their own, cast, alias, or look at values."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = nn.Parameter(torch.randn(5, 4))
        nn.init.trunc_normal_(self.drawn)
        self.orthogonal = nn.Parameter(nn.init.orthogonal_(torch.empty(5, 7)))
        self.table = nn.Embedding(6, 3, padding_idx=1)
        self.norm = nn.BatchNorm2d(4)
        self.sparse = nn.Linear(6, 6)
        nn.init.sparse_(self.sparse.weight, 0.5)
        self.frequencies = torch.polar(torch.ones(4), torch.arange(4.0))
        self.tables = [torch.arange(3), (torch.ones(2) * 3,)]
        generator = torch.Generator().manual_seed(5)
        self.own = nn.Parameter(torch.randn(3, generator=generator))
        self.own_again = nn.Parameter(torch.randn(20, generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.forked = nn.Parameter(torch.randn(4))
        self.after_fork = nn.Parameter(torch.randn(4))
        torch.manual_seed(1)
        self.reseeded = nn.Parameter(torch.randn(40))
        torch.manual_seed(1)
        self.reseeded_again = nn.Parameter(torch.randn(40))
        self.first = nn.Linear(4, 4)
        self.first.weight.data.mul_([x.item() for x in torch.linspace(0, 1, 4)][2])
        self.second = self.first
        self.mixed = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.mixed.weight.data = self.first.weight.data.t()
        self.transposed = nn.Parameter(torch.rand(4, 4).t(), requires_grad=False)
        self.permutation = nn.Parameter(torch.randperm(4) * 1.0)
        self.dropped = nn.Parameter(nn.functional.dropout(torch.ones(50)))
        self.array = nn.Parameter(torch.from_numpy(numpy.ones(3)))
        self.register_buffer("constant", torch.tensor([1, 2, 3]))
        self.constant[1] = 7
        self.computed = nn.Parameter(torch.expm1(torch.tensor(0.5)).unsqueeze(0))
        self.attention = nn.MultiheadAttention(8, 2)
        self.recurrent = nn.LSTM(3, 4, 2)
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))


class BatchNormed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def default_dtype() -> nn.Module:
    torch.set_default_dtype(torch.float64)
    return CodeLM(layers=1, hidden=16, heads=2, context=8)


FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "example": lambda: CodeLM(layers=2, hidden=16, heads=2, context=8),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32)
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**{**SMALL, "image_size": 8, "patch_size": 4})
    ),
    "batch norm": BatchNormed,
    "odd": Odd,
    "odd, cast": lambda: Odd().double(),
    "half": lambda: CodeLM(layers=1, hidden=16, heads=2, context=8).half(),
    "default dtype": default_dtype,
}


@pytest.fixture(autouse=True)
def _default_dtype() -> object:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_values_are_those_of_one_device(factory: Callable[[], nn.Module]) -> None:
    torch.manual_seed(3)
    expected = factory()
    torch.set_default_dtype(torch.float32)
    state = torch.get_rng_state()
    fake = build_fake(factory, 3)
    torch.set_default_dtype(torch.float32)
    for _ in range(2):  # a tape can be replayed again
        tensors = materialize(fake, dict.fromkeys(fake.names))
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator was disturbed"
    assign(fake.model, tensors)
    found: dict[str, Tensor] = {}
    map_tensors(fake.model, lambda name, tensor: found.setdefault(name, tensor))

    def check(name: str, tensor: Tensor) -> Tensor:
        mine = found.pop(name)
        assert not isinstance(mine, FakeTensor), name
        assert (mine.dtype, mine.shape, mine.stride()) == (tensor.dtype, tensor.shape, tensor.stride()), name
        assert (type(mine), mine.requires_grad) == (type(tensor), tensor.requires_grad), name
        assert torch.equal(mine, tensor), name
        return tensor

    map_tensors(expected, check)
    assert not found


def test_one_tensor_alone_is_the_same() -> None:
    factory = FACTORIES["odd"]
    torch.manual_seed(3)
    expected = factory()
    fake = build_fake(factory, 3)
    for name in ("reseeded_again", "own_again", "after_fork", "mixed.weight", "frequencies", "tables.1.0", "constant"):
        value = expected
        for part in name.split("."):
            value = value[int(part)] if isinstance(value, (list, tuple)) else getattr(value, part)
        assert torch.equal(materialize(fake, {name: None})[name], value), name


def test_ties_are_one_tensor_under_every_name() -> None:
    fake = build_fake(FACTORIES["gpt2"], 0)
    assert fake.names["transformer.wte.weight"] == ("transformer.wte.weight", "lm_head.weight")
    assert fake.first("lm_head.weight") == "transformer.wte.weight"
    tensors = materialize(fake, {"lm_head.weight": None, "transformer.wte.weight": None})
    assert tensors["lm_head.weight"] is tensors["transformer.wte.weight"]
    assign(fake.model, {"lm_head.weight": tensors["lm_head.weight"]})
    assert fake.model.lm_head.weight is fake.model.transformer.wte.weight
    assert isinstance(fake.model.lm_head.weight, nn.Parameter)
    assert fake.model.transformer.wpe.weight.device.type == "meta"


def test_parts_own_their_memory() -> None:
    fake = build_fake(FACTORIES["example"], 0)
    part = materialize(fake, {"head.weight": lambda full: full.chunk(4)[1]})["head.weight"]
    whole = materialize(fake, {"head.weight": None})["head.weight"]
    assert torch.equal(part, whole[64:128])
    assert part.untyped_storage().nbytes() == part.nbytes


MEMORY = """
import resource, sys, torch
from torch import nn
from weft.capture.initial import build_fake, materialize
SIZE = 1 << 22  # 16 MiB a weight
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIZE // 1024, 1024, bias=False) for _ in range(12))
        for layer in self.layers:
            nn.init.normal_(layer.weight)
parts, cast = int(sys.argv[1]), sys.argv[2] == "cast"
fake = build_fake(lambda: Model().double() if cast else Model(), 0)
warm = build_fake(lambda: nn.Linear(2, 2), 0)
materialize(warm, {"weight": None})
data = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
weight = SIZE * (8 if cast else 4)
limit = data + 12 * weight // 4 + 2 * weight
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
kept = materialize(fake, {name: lambda full: full.chunk(parts)[0] for name in fake.names})
print(len(kept))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts tensors on Linux only")
@pytest.mark.parametrize("cast", ["", "cast"])
@pytest.mark.long
def test_memory_is_for_about_one_weight_at_a_time(cast: str) -> None:
    def run(parts: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", MEMORY, str(parts), cast]
        # Freed memory goes back to the system at once, as the runtime sees to under a limit.
        environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    done = run(4)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "12"
    if not cast:
        assert run(1).returncode != 0, "the limit does not bind"


def test_errors_name_the_remedy() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.randn(3)[0].item()

    with pytest.raises(ModelError, match=r"depends on random numbers \(.*test_initial\.py:\d+\)"):
        build_fake(Looks, 0)
    with pytest.raises(ModelError, match=r"must return a torch\.nn\.Module, got int"):
        build_fake(lambda: 3, 0)  # type: ignore[arg-type,return-value]
    with pytest.raises(ModelError, match=r"raised ZeroDivisionError: .*zero \(.*test_initial\.py:\d+\)"):
        build_fake(lambda: nn.Linear(1, 1 // 0), 0)
