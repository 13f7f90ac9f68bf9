import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture_models import CASES, Case, squares
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from weft.capture.initial import build_fake
from weft.capture.profile import LOSS, Source
from weft.capture.recorder import Recording, record
from weft.capture.units import find_units
from weft.errors import LossError, ModelError


def recorded(case: Case, samples: int = 2, **options: Any) -> Recording:
    fake = build_fake(case.model, 0)
    return record(fake.model, find_units(fake.model), case.loss, case.batch(samples), **options)


class Real:
    """What a real run of a loss does, unit call by unit call."""

    def __init__(self, case: Case, samples: int) -> None:
        torch.manual_seed(0)
        self.model = case.model()
        self.names: list[str] = []
        self.outputs: list[list[Tensor]] = []
        count: dict[str, int] = {}
        for unit in find_units(self.model):
            module = self.model.get_submodule(unit)

            def hook(module: nn.Module, inputs: Any, output: Any, unit: str = unit) -> None:
                count[unit] = count.get(unit, 0) + 1
                self.names.append(unit if count[unit] == 1 else f"{unit}@{count[unit]}")
                self.outputs.append([x for x in tree_leaves(output) if isinstance(x, Tensor)])

            module.register_forward_hook(hook)
        self.loss = case.loss(self.model, case.batch(samples))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_calls_and_outputs_are_those_of_a_real_run(case: Case) -> None:
    recording, real = recorded(case), Real(case, 2)
    assert [call.name for call in recording.calls] == [*real.names, LOSS]
    for call, outputs in zip(recording.calls, real.outputs, strict=False):
        assert [leaf.shape for leaf in call.tensors] == [tuple(t.shape) for t in outputs], call.name
        assert [leaf.dtype for leaf in call.tensors] == [t.dtype for t in outputs], call.name
        assert [leaf.requires_grad for leaf in call.tensors] == [t.requires_grad for t in outputs], call.name
        assert [leaf.stride for leaf in call.tensors] == [t.stride() for t in outputs], call.name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sources_are_what_gradients_flow_through(case: Case) -> None:
    """An output that a call reads gets a gradient from that call and no other: compare with autograd."""
    recording = recorded(case)
    torch.manual_seed(0)
    model = case.model()
    reached: dict[int, set[Source]] = {}
    numbers: dict[int, int] = {}
    made: list[list[Tensor]] = []
    given: list[list[Tensor]] = []
    for unit in find_units(model):
        module = model.get_submodule(unit)
        original = module.forward

        def forward(*args: Any, original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            given.append([x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad])
            number = len(made)
            made.append([])
            # What is passed through is made anew, so that every output has a node of its own.
            output = tree_map_only(Tensor, lambda t: t * 1 if t.requires_grad else t, original(*args, **kwargs))
            made[number] = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
            return output

        module.forward = forward
    result = case.loss(model, case.batch(2))
    given.append([result[0] if isinstance(result, tuple) else result])
    for number, output in enumerate(made):
        numbers.update((id(t.grad_fn), number) for t in output if t.grad_fn is not None)
    for number, tensors in enumerate(given):
        found: set[Source] = set()
        seen: set[Any] = set()
        stack = [t.grad_fn for t in tensors if t.grad_fn is not None]
        while stack:
            node = stack.pop()
            if node in seen or node is None:
                continue
            seen.add(node)
            if (maker := numbers.get(id(node))) is not None and maker < number:
                leaf = next(i for i, t in enumerate(made[maker]) if t.grad_fn is node)
                found.add(Source(maker, leaf))
                continue
            stack.extend(parent for parent, _ in node.next_functions)
        reached[number] = found
    for number, call in enumerate(recording.calls):
        differentiable = {s for s in call.sources if recording.calls[s.call].tensors[s.leaf].requires_grad}
        assert differentiable == reached[number], call.name


@pytest.mark.parametrize("name", ["example", "llama", "bert", "vit", "skips", "t5"])
def test_flops_are_those_of_a_real_run(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.model()
    with FlopCounterMode(display=False) as counter:
        result = case.loss(model, case.batch(2))
        forward = counter.get_total_flops()
        (result[0] if isinstance(result, tuple) else result).backward()
    recording = recorded(case)
    # The counter knows no formula for the CPU's attention.
    products = ("matmul", "convolution")
    costs = [c for call in recording.calls for c in (recording.costs[call.kind], call.glue)]
    assert sum(op.flops for c in costs for op in c.forward if op.kind in products) == forward
    both = sum(op.flops for c in costs for ops in (c.forward, c.backward) for op in ops if op.kind in products)
    assert both == counter.get_total_flops()


def test_flops_of_grouped_products() -> None:
    ops = [op for cost in recorded(CASES["mixtral"]).costs for op in cost.forward if op.name == "aten._grouped_mm"]
    rows = 2 * 12 * 2  # every token goes to two experts
    assert [op.flops for op in ops] == [2 * rows * 16 * 48, 2 * rows * 24 * 16]


def test_repeated_blocks_are_recorded_once() -> None:
    recording = recorded(CASES["example"])
    kinds = [call.kind for call in recording.calls]
    assert kinds == [0, 1, 2, 2, 2, 3, 4, 5]


def test_blocks_that_differ_by_a_setting_are_told_apart() -> None:
    """The layers of this model alternate between sliding and full attention."""
    kinds = [call.kind for call in recorded(CASES["gemma2"]).calls if ".layers." in call.name]
    assert kinds[0] == kinds[2] != kinds[1]


def test_a_tensor_given_twice_is_another_call_than_two_tensors() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) + self.b(y)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y, z = self.first(x), self.other(x)
            y = self.blocks[0](y, y)
            y = self.blocks[1](y, z)
            return self.last(self.blocks[2](y, z))

    recording = recorded(CASES["mlp"]._replace(model=Model))
    assert [call.kind for call in recording.calls[2:5]] == [1, 2, 2]
    assert Source(1, 0) in recording.with_gradient


def test_a_number_that_steers_the_code_is_noticed() -> None:
    class Block(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.index, self.linear = index, nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            return x.exp() if self.index % 2 else x

    case = CASES["mlp"]._replace(model=lambda: nn.Sequential(*(Block(i) for i in range(6))))
    # The first differs from the third in that its input needs no gradient.
    assert [call.kind for call in recorded(case).calls] == [0, 1, 2, 1, 2, 1, 3]


def test_skip_connections_are_followed() -> None:
    calls = {call.name: call for call in recorded(CASES["skips"]).calls}
    assert calls["up.1"].sources == (Source(0, 0), Source(2, 0))
    assert calls["head"].sources == (Source(3, 0),)


def test_a_module_called_twice_and_what_the_glue_reads() -> None:
    calls = recorded(CASES["twice"]).calls
    assert [call.name for call in calls] == ["a", "b", "a@2", LOSS]
    assert [call.glue_reads for call in calls] == [(), ("gate",), ("shift",), ()]
    assert calls[2].sources == (Source(1, 0),)
    assert calls[2].reads == ("a.weight", "a.bias")


def test_tied_weights_go_by_their_first_name() -> None:
    head = next(call for call in recorded(CASES["gpt2"]).calls if call.name == "lm_head")
    assert head.reads == ("transformer.wte.weight",)


def test_provenance_follows_views_writes_in_place_and_out() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.d = (nn.Linear(8, 4) for _ in range(3))
            self.c = nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                buffer = x.new_zeros(x.shape[0], 12)
                torch._foreach_copy_([buffer[:, :4]], [self.a(x)])
                torch.mul(self.b(x), 2, out=buffer[:, 4:8])
                view = buffer.view(-1, 3, 4).unbind(1)[2]
            left, right = self.c(view).split(4, 1)
            return self.d(torch.cat([right, left], 1).add_(1))

    case = CASES["mlp"]._replace(model=Model)
    calls = recorded(case).calls
    assert calls[2].sources == (Source(0, 0), Source(1, 0))
    assert calls[3].sources == (Source(2, 0),)


def test_values_of_the_batch_may_be_looked_at() -> None:
    def loss(model: nn.Module, batch: Any) -> Any:
        assert bool((batch["y"] < 2).all())
        y = model(batch["x"])
        chosen = y[batch["y"] == 1]
        return chosen.square().sum(), len(chosen)

    calls = recorded(CASES["mlp"]._replace(loss=loss), 4).calls
    index = next(op for op in calls[-1].glue.forward if op.name == "aten.index")
    assert index.outputs[0].size == (2, 4)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: m(b["x"]), r"must return a scalar or \(sum, count\), got a tensor of shape \(2, 4\)"),
        (lambda m, b: (m(b["x"]).sum(), "two"), r"got a tuple of a tensor of shape \(\) and torch.float32, a str"),
        (lambda m, b: None, "got a NoneType"),
        (lambda m, b: b["x"].sum(), "does not depend on any trainable parameter"),
    ],
)
def test_losses_that_are_none(loss: Any, message: str) -> None:
    with pytest.raises(LossError, match=message):
        recorded(CASES["mlp"]._replace(loss=loss))


def test_errors_name_unit_and_place() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.undefined(x) if x.sum() != 0 else x

    class Leaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            before, self.last = self.last, self.linear(x)
            return self.last if before is None else self.last + before

    def fails(model: Callable[[], nn.Module], loss: Any = squares) -> str:
        with pytest.raises(ModelError) as error:
            recorded(CASES["mlp"]._replace(model=model, loss=loss))
        return str(error.value)

    here = r"test_capture_recorder.py:"
    message = fails(lambda: nn.Sequential(nn.Linear(8, 8), Breaks()))
    assert "unit '1' looks at a value" in message
    assert here in message

    def glue(model: nn.Module, batch: Any) -> Any:
        y = model(model(batch["x"]))
        return y.sum() if y.max() > 0 and y.undefined else y.mean()

    message = fails(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), glue)
    assert "looks at a value of '1@2'" in message
    assert here in message
    message = fails(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(9, 8)))
    assert message.startswith("unit '1' raised RuntimeError on fake tensors: ")

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = Leaks()
            self.c = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    message = fails(Shared)
    assert "reads a tensor that the call 'a' made but did not return" in message


class InPlace(nn.Module):
    """Begins with a write to what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.relu_())


def test_a_unit_may_write_to_what_nobody_else_reads() -> None:
    calls = recorded(CASES["mlp"]._replace(model=lambda: nn.Sequential(nn.Linear(8, 8), InPlace(), InPlace()))).calls
    assert [call.sources for call in calls] == [(), (Source(0, 0),), (Source(1, 0),), (Source(2, 0),)]


@pytest.mark.parametrize("reader", ["code between units reads", "unit 'd' is given"])
def test_a_unit_may_not_write_to_what_others_read(reader: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(8, 8), InPlace(), InPlace(), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            y = self.c(x)  # replayed: it is like b
            return y + self.d(x) if reader.startswith("unit") else x + y

    with pytest.raises(ModelError, match=rf"{reader} a tensor that the call 'c' changed in place \(.*recorder\.py:\d+"):
        recorded(CASES["mlp"]._replace(model=Model))


def test_the_model_is_left_as_it_was() -> None:
    for name in ("skips", "llama"):
        case = CASES[name]
        fake = build_fake(case.model, 0)
        before = {(name, key): value for name, m in fake.model.named_modules() for key, value in vars(m).items()}
        with pytest.raises(ModelError):
            record(fake.model, find_units(fake.model), lambda m, b: m(b).undefined, case.batch(2))
        record(fake.model, find_units(fake.model), case.loss, case.batch(2))
        after = {(name, key): value for name, m in fake.model.named_modules() for key, value in vars(m).items()}
        assert before.keys() == after.keys()
        assert all(before[key] is after[key] for key in before)
        assert all(p.grad is None for p in fake.model.parameters())


def test_gradients_that_an_autograd_function_leaves_are_taken_away() -> None:
    """What a reversible layer does: it computes its gradients itself. Left there, the next ones would be added."""

    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, linear: nn.Module) -> Tensor:
            ctx.x, ctx.linear = x.detach(), linear
            return linear(x)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
            with torch.enable_grad():
                x = ctx.x.requires_grad_()
                torch.autograd.backward(ctx.linear(x), gradients[0])
            return x.grad, None

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gain = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return Reversed.apply(x * self.gain, self.linear)

    case = CASES["mlp"]._replace(model=lambda: nn.Sequential(nn.Linear(8, 8), Block(), nn.Linear(8, 4)))
    fake = build_fake(case.model, 0)
    both = [record(fake, find_units(fake.model), case.loss, case.batch(samples)) for samples in (2, 4)]
    names = [[op.name for op in recording.costs[1].backward] for recording in both]
    assert names[0] == names[1]
    assert "aten.add_" not in names[0]
    assert all(p.grad is None for p in fake.model.parameters())


@pytest.mark.parametrize("backward", [False, True])
def test_a_recording_is_all_that_stays(backward: bool) -> None:
    # tanh keeps its result for its backward: a cycle through autograd's graph, which Python's collector cannot see
    fake = build_fake(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), 0)
    recording = record(fake, find_units(fake.model), CASES["mlp"].loss, CASES["mlp"].batch(2), backward=backward)
    model = weakref.ref(fake.model)
    del fake
    gc.collect()
    assert model() is None
    assert recording.calls


def test_recording_does_not_grow_with_depth() -> None:
    def operations(layers: int) -> int:
        case = CASES["mlp"]._replace(model=lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))))
        return sum(len(cost.forward) for cost in recorded(case).costs)

    assert operations(30) == operations(3)


def test_forward_alone() -> None:
    recording = recorded(CASES["twice"], backward=False)
    assert not any(cost.backward for cost in recording.costs)
