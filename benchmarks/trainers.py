"""The example's training step by hand, under every plan of the benchmark: what one would write without weft.

Plain PyTorch, each ``build_*`` for one plan, in every process of an initialised job. Returned is a step: it takes the
global batch, trains once on it and gives the global mean loss.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from weft import Plan, Workload

Batch = dict[str, Tensor]
Step = Callable[[Batch], float]


def build(workload: Workload, plan: Plan, device: torch.device) -> Step:
    """The step of one plan, for the process that calls it."""
    torch.manual_seed(workload.seed)
    model = workload.model().to(device)
    if plan.pp > 1:
        return build_pipeline(workload, model, plan, device)
    if plan.dp_replicate > 1:
        return build_replicated(workload, model, plan, device)
    return build_sharded(workload, model, plan, device)


def build_replicated(workload: Workload, model: nn.Module, plan: Plan, device: torch.device) -> Step:
    """Data parallelism: a whole copy each, gradients averaged bucket by bucket behind the backward."""
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = workload.optimizer(replica.parameters())

    def step(batch: Batch) -> float:
        value = workload.loss(replica, part(batch, dist.get_rank(), plan.dp_replicate, device))
        value.backward()
        clip_(replica.parameters(), workload.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return mean(value)

    return step


def build_sharded(workload: Workload, model: nn.Module, plan: Plan, device: torch.device) -> Step:
    """Tensor parallelism within, ``fully_shard`` around it; either may be absent."""
    mesh = init_device_mesh(device.type, (plan.dp_shard, plan.tp), mesh_dim_names=("dp_shard", "tp"))
    if plan.tp > 1 and plan.dp_shard > 1:
        mesh._flatten("both")  # one all-reduce, not two, for the gradients' norm
    if plan.tp > 1:
        for block in model.blocks:
            styles = {
                # one all-reduce of the input's gradient for the three projections together
                "attention": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate()),
                **{f"attention.{name}": ColwiseParallel() for name in ("query", "key", "value")},
                "attention.out": RowwiseParallel(),
                "mlp.0": ColwiseParallel(),
                "mlp.2": RowwiseParallel(),
            }
            parallelize_module(block, mesh["tp"], styles)
    if plan.dp_shard > 1:
        for block in model.blocks:
            fully_shard(block, mesh=mesh["dp_shard"])
        fully_shard(model, mesh=mesh["dp_shard"])
    optimizer = workload.optimizer({"params": group} for group in by_mesh(model.parameters()).values())
    shard = mesh["dp_shard"].get_local_rank()

    def step(batch: Batch) -> float:
        value = workload.loss(model, part(batch, shard, plan.dp_shard, device))
        value.backward()
        clip_(model.parameters(), workload.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return mean(value)

    return step


class Half(nn.Module):
    """One of the two stages of the example: its first ``cut`` blocks and what leads to them, or the rest."""

    def __init__(self, model: nn.Module, cut: int, first: bool) -> None:
        super().__init__()
        self.first = first
        if first:
            self.token, self.position, self.blocks = model.token, model.position, model.blocks[:cut]
        else:
            self.blocks, self.norm, self.head = model.blocks[cut:], model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        return x if self.first else self.head(self.norm(x))


def build_pipeline(workload: Workload, model: nn.Module, plan: Plan, device: torch.device) -> Step:
    """Two stages under 1F1B."""
    rank, last = dist.get_rank(), plan.pp - 1
    assert plan.pp == 2
    cut = sum(call.startswith("blocks.") for call in plan.stages[0])
    half = Half(model, cut, first=rank == 0)
    optimizer = workload.optimizer(half.parameters())
    stage = PipelineStage(half, rank, plan.pp, device)
    schedule = Schedule1F1B(stage, plan.microbatches, loss_fn=cross_entropy)

    def step(batch: Batch) -> float:
        value = torch.zeros((), device=device)
        if rank == 0:
            schedule.step(batch["x"].to(device), return_outputs=False)
        else:
            losses: list[Tensor] = []
            schedule.step(target=batch["y"].to(device), losses=losses, return_outputs=False)
            value = torch.stack(losses).detach().mean()
        clip_(half.parameters(), workload.max_grad_norm, dist.group.WORLD)
        optimizer.step()
        optimizer.zero_grad()
        dist.broadcast(value, last)
        return value.item()

    return step


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The example's loss, given its model's output, (batch, time, 256), and what should have been, (batch, time)."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def part(batch: Batch, index: int, parts: int, device: torch.device) -> Batch:
    """One replica's samples of the global batch."""
    return {name: tensor.chunk(parts)[index].to(device) for name, tensor in batch.items()}


def mean(value: Tensor) -> float:
    """Mean over all processes; tensor-parallel peers have equal values, so they do not disturb it."""
    value = value.detach().clone()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def by_mesh(parameters: Iterable[nn.Parameter]) -> dict[DeviceMesh | None, list[nn.Parameter]]:
    """Parameters that can meet in one operation: those of one mesh, and those of none."""
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        groups[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return groups


def clip_(parameters: Iterable[nn.Parameter], limit: float | None, stages: dist.ProcessGroup | None = None) -> None:
    """Clip gradients to their global L2 norm, over every mesh and, where given, every pipeline stage."""
    if limit is None:
        return
    groups = [[p for p in group if p.grad is not None] for group in by_mesh(parameters).values()]
    norms = [nn.utils.get_total_norm([p.grad for p in group]) for group in groups]
    squares = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).square().sum()
    if stages is not None:
        dist.all_reduce(squares, group=stages)
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, limit, squares.sqrt())
