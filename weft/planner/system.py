"""System: how the program that runs a plan keeps numbers and moves them.

The planner plans for weft's own runtime (WEFT). Other programs that people have measured do some things differently;
told how, the same formulas predict them (``benchmarks/published.py``), which is how they are tested where no machine of
that size is at hand.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class System:
    """Conventions of a training program. Bytes are per element of a trainable parameter; None: as the parameter itself.

    Attributes:
        gradient_bytes: of gradients as they are kept from microbatch to microbatch.
        reduce_bytes: of gradients as they travel between replicas.
        gather_bytes: of parameters as they travel between shards.
        state_bytes: of optimizer state, master weights included; None: as the optimizer was seen to keep.
        step_bytes: that an optimizer step reads and writes; None: as it was seen to.
        accumulate_bytes: that adding a microbatch's gradients to those kept reads and writes; None: two reads, a write.
        standing_gradients: gradients have buffers that live from step to step; None: where whole copies meet.
        context_shards: ranks of ``cp`` shard parameters where no replicas do; they are copies where replicas are.
        shards_beside: sharded parameters that are gathered for a whole step stand beside their shards.
        hides_reduce, hides_gather: averaging gradients, and gathering parameters, hide behind computation.
        hides_tensor: share of the exchange inside layers that hides behind computation.
        blocking: a stage that sends to another waits until the tensor is there.
        scatters: ranks of a tensor-parallel group send a part each to the next stage, which gathers them.
        keeps_gathered: under sequence parallelism, what projections gather is kept for the backward: half of what is
            not divided otherwise (of a norm's input and output the latter).
        parallel_loss: under tensor parallelism the loss is computed on shares of the logits.
        fused: neighbouring operations on elements are one kernel, which reads what enters and writes what leaves.
        bucket_bytes: gradients that are reduced at once, where whole copies meet.
        buckets_shards: so are those that are sharded; else they are by unit.
        dispatch_s: seconds in which the process that drives an accelerator dispatches one operation.
        step_s: seconds of a step that nothing else accounts for.
        forwards: nothing but forwards is computed (``eager``).
    """

    gradient_bytes: float | None = None
    reduce_bytes: float | None = None
    gather_bytes: float | None = None
    state_bytes: float | None = None
    step_bytes: float | None = None
    accumulate_bytes: float | None = None
    standing_gradients: bool | None = None
    context_shards: bool = True
    shards_beside: bool = True
    hides_reduce: bool = True
    hides_gather: bool = True
    hides_tensor: float = 0.0
    blocking: bool = False
    scatters: bool = False
    keeps_gathered: bool = False
    parallel_loss: bool = False
    fused: bool = False
    bucket_bytes: float = 25 * 2**20
    buckets_shards: bool = False
    dispatch_s: float = 1e-5
    step_s: float = 0.0
    forwards: bool = False


WEFT = System()
"""weft's own runtime."""

INFERENCE = System(forwards=True)
"""The same where nothing is trained."""
