"""weft in one's own training loop: run by every process of a launched job."""

from itertools import islice

import torch.distributed as dist
from code_lm import workload

import weft

work = workload(layers=2, hidden=64)
plan = weft.plan(work, weft.Cluster.local(devices=2))
engine = weft.parallelize(work, plan)
for step, batch in enumerate(islice(engine.batches(), 10)):
    loss = engine.step(batch)  # the mean over the global batch, the same in every process
    if dist.get_rank() == 0:
        print(f"step {step}  loss {loss:.4f}")
