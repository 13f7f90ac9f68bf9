"""The baseline: ``torch.distributed.pipelining.pipeline()`` on the same workloads, in two stages.

It is given every chance a user would: the model is wrapped so that it returns tensors only, the split is before the
middle block of its longest list of blocks, and the model is in ``eval`` mode, since stages that draw random numbers of
their own could not be held against one device. Two faults that have nothing to do with what it can divide are worked
round: it loses the arguments of modules that run under ``no_grad`` (as rotary embeddings of ``transformers`` do), and
Gloo sends no tensors that lie in pieces. It counts where loss and gradients are those of one device.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._export.passes import replace_set_grad_with_hop_pass
from torch.distributed.pipelining import ScheduleGPipe, SplitPoint, pipeline
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from zoo_job import MICROBATCHES, TOLERANCES, Case, limited, line

import weft
from weft.jobs.verify import relative_error


class CannotPipelineError(Exception):
    """``pipeline()`` does not take this workload; the message says why."""


class Probe:
    """Stands for the model in a call of the loss, and notes how the loss calls it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: list[tuple[dict[str, Any], Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.model(*args, **kwargs)
        self.calls.append((_by_name(self.model, args, kwargs), out))
        return out

    def __getattr__(self, name: str) -> Any:
        raise CannotPipelineError(f"the loss uses {name} of the model, not its forward")

    __getitem__ = __getattr__


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, as ``pipeline()`` hands them to stages that are not the first."""
    names = list(inspect.signature(model.forward).parameters)
    return dict(zip(names, args, strict=False)) | kwargs


class Tensors(nn.Module):
    """The model with the constants of its call, returning the tensors among its outputs that have gradients."""

    def __init__(self, model: nn.Module, constants: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.constants = model, constants

    def forward(self, **kwargs: Tensor) -> tuple[Tensor, ...] | Tensor:
        """The model's own arguments."""
        found = [leaf for leaf in tree_flatten(self.model(**kwargs, **self.constants))[0] if _trains(leaf)]
        return tuple(found) if len(found) > 1 else found[0]


def _trains(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def middle(model: nn.Module) -> str:
    """Name of the middle block of the longest list of blocks.

    Raises:
        CannotPipelineError: there is no list.
    """
    lists = [(len(m), name) for name, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    length, name = max(lists, key=lambda each: each[0], default=(0, ""))
    if length < 2:
        raise CannotPipelineError("there is no list of blocks to split")
    return f"{name}.{length // 2}" if name else str(length // 2)


@dataclass
class Reference:
    """One device's step, microbatch by microbatch: what the pipeline is held against, and what it is fed.

    Attributes:
        model: with its gradients.
        loss: of the whole batch.
        calls: per microbatch the arguments of the model's one call and what it returned.
        scales: what each microbatch's loss counts.
    """

    model: nn.Module
    loss: float
    calls: list[tuple[dict[str, Any], Any]]
    scales: list[float]


def model_of(workload: weft.Workload) -> nn.Module:
    """The model, from the workload's seed."""
    torch.manual_seed(workload.seed)
    return workload.model().eval()


def loss_of(workload: weft.Workload, model: Any, microbatch: int) -> tuple[Tensor, float]:
    """A microbatch's loss and its weight; what the loss draws depends on the microbatch alone."""
    rows = torch.arange(workload.batch_size).chunk(MICROBATCHES)[microbatch]
    piece = tree_map(lambda leaf: leaf[rows], workload.sample_batch(workload.batch_size))
    torch.manual_seed(microbatch)
    value = workload.loss(model, piece)
    return (value[0], float(value[1])) if isinstance(value, tuple) else (value * len(rows), float(len(rows)))


def one_device(workload: weft.Workload) -> Reference:
    """Run it.

    Raises:
        CannotPipelineError: the loss does not call the model's forward, once.
    """
    model = model_of(workload)
    calls, sums, weights = [], [], []
    for microbatch in range(MICROBATCHES):
        probe = Probe(model)
        value, weight = loss_of(workload, probe, microbatch)
        if len(probe.calls) != 1:
            raise CannotPipelineError(f"the loss calls the model {len(probe.calls)} times, a pipeline runs it once")
        calls.append(probe.calls[0])
        sums.append(value)
        weights.append(weight)
    mean = torch.stack(sums).sum() / sum(weights)
    mean.backward()
    return Reference(model, float(mean.detach()), calls, [1 / sum(weights)] * MICROBATCHES)


def run(case: Case, seconds: int) -> str:
    """One step of the baseline, in both processes.

    Returns:
        on rank 0 why it does not count, "" where it does; nothing elsewhere.
    """
    with limited(seconds):
        workload, _ = case.build()
        reference = one_device(workload)
        first = reference.calls[0][0]
        names = [name for name, value in first.items() if isinstance(value, Tensor)]
        constants = {name: value for name, value in first.items() if name not in names}
        with mock.patch.object(replace_set_grad_with_hop_pass, "replace_set_grad_with_hop_pass", with_gradients):
            pipe = pipeline(
                Tensors(model_of(workload), constants),
                mb_args=(),
                mb_kwargs={name: first[name] for name in names},
                split_spec={f"model.{middle(reference.model)}": SplitPoint.BEGINNING},
            )
        send_contiguous(pipe)
        stage = pipe.build_stage(dist.get_rank(), torch.device("cpu"))

        def loss(out: Any, target: Tensor) -> Tensor:
            microbatch = int(target[0])
            leaves, spec = tree_flatten(reference.calls[microbatch][1])
            found = iter(out if isinstance(out, tuple | list) else (out,))
            rebuilt = tree_unflatten([next(found) if _trains(leaf) else leaf for leaf in leaves], spec)
            value, _ = loss_of(workload, lambda *args, **kwargs: rebuilt, microbatch)
            return value * reference.scales[microbatch]

        schedule = ScheduleGPipe(stage, MICROBATCHES, loss_fn=loss, scale_grads=False)
        losses: list[Tensor] = []
        taken = inspect.signature(stage.submod.forward).parameters
        mine = {name: torch.cat([call[0][name] for call in reference.calls]) for name in names if name in taken}
        try:
            if dist.get_rank() == 0:
                schedule.step(**mine)
            else:
                schedule.step(target=torch.arange(MICROBATCHES).unsqueeze(1), losses=losses, **mine)
        except Exception as error:  # it wraps what went wrong in a description of the stage's inputs
            raise CannotPipelineError(line(root_of(error))) from error
        gradients = {n.removeprefix("model."): p.grad for n, p in stage.submod.named_parameters() if p.grad is not None}
        everyone: list[Any] = [None, None]
        dist.all_gather_object(everyone, (gradients, sum(map(float, losses))))
        return _compare(reference, everyone) if dist.get_rank() == 0 else ""


def send_contiguous(pipe: Any) -> None:
    """Have stages exchange tensors that lie in one piece: Gloo takes no others, and that alone should fail no model."""
    for stage in pipe.split_gm.children():
        graph = stage.graph
        end = graph.output_node()
        for node in [node for node in end.all_input_nodes if isinstance(node.meta.get("val"), Tensor)]:
            with graph.inserting_before(end):
                piece = graph.call_method("contiguous", (node,))
            piece.meta["val"] = node.meta["val"].contiguous()
            end.replace_input_with(node, piece)
        for node in graph.find_nodes(op="placeholder"):
            if isinstance(node.meta.get("val"), Tensor):
                node.meta["val"] = node.meta["val"].contiguous()
        stage.recompile()


def with_gradients(module: torch.fx.GraphModule, signature: Any) -> tuple[torch.fx.GraphModule, Any]:
    """In place of torch's pass that outlines what runs under ``no_grad``: run it like all else.

    It computes what has no gradient anyway, as tables of positions; where it does not, the comparison finds it.
    """
    for part in module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled):
                part.graph.erase_node(node)
            part.recompile()
    return module, signature


def root_of(error: BaseException) -> BaseException:
    """What an exception came from, that says something."""
    while error.__cause__ is not None and str(error.__cause__):
        error = error.__cause__
    return error


def _compare(reference: Reference, everyone: list[Any]) -> str:
    """Why the pipeline's step is not the single device's, "" where it is."""
    expected = {name: p.grad for name, p in reference.model.named_parameters() if p.grad is not None}
    loss = everyone[-1][1]
    if not abs(loss - reference.loss) <= TOLERANCES["float32"] * abs(reference.loss):
        return f"loss {loss:.6g} instead of {reference.loss:.6g}"
    firsts = {id(p): name for name, p in reference.model.named_parameters()}
    first_of = {name: firsts[id(p)] for name, p in reference.model.named_parameters(remove_duplicate=False)}
    gradients: dict[str, Tensor] = {}
    summed: dict[str, Tensor] = {}
    for name, gradient in (item for found, _ in everyone for item in found.items()):
        first = first_of.get(name, name)
        gradients[first] = gradient
        summed[first] = summed[first] + gradient if first in summed else gradient
    error, where = relative_error(gradients, expected)
    if error > TOLERANCES["float32"] >= relative_error(summed, expected)[0]:
        return f"gradient of {where}, which both stages hold, is not summed over them"
    if error == float("inf"):
        return f"gradient of {where} is {'missing' if where in expected else 'not one of the single device'}"
    return "" if error <= TOLERANCES["float32"] else f"gradient of {where} differs by {error:.1e} of its norm"
