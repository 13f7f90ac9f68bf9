"""How far plans for inference do what was predicted: tokens/s and time to first token of eight plans of a Llama,
measured on processes of this machine against the estimates of a cluster measured just before.

python benchmarks/inference_plans.py            # about ten minutes on two cores
python benchmarks/inference_plans.py --small    # a minute
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import weft
from weft.capture import capture_inference
from weft.capture.inference import Tokens
from weft.cluster import Cluster, measure
from weft.planner import choose_inference

ROUNDS = 4


class Case(NamedTuple):
    """A plan to measure: what it fixes, and sequences, tokens of a prompt and new ones."""

    fixed: dict[str, int]
    batch: int
    prompt: int
    new: int


CASES = (
    Case({"dp_replicate": 2}, 8, 64, 32),
    Case({"pp": 2, "microbatches": 1}, 8, 64, 32),
    Case({"pp": 2, "microbatches": 2}, 8, 64, 32),
    Case({"tp": 2}, 8, 64, 32),
    Case({"dp_replicate": 2}, 32, 128, 32),
    Case({"pp": 2, "microbatches": 4}, 32, 128, 32),
    Case({"pp": 2, "microbatches": 1}, 1, 256, 32),
    Case({"tp": 2}, 32, 128, 16),
)


def workload(layers: int, hidden: int, batch: int) -> weft.Workload:
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    sample = {"input_ids": torch.zeros(8, dtype=torch.long)}
    return weft.Workload(model=lambda: LlamaForCausalLM(config), data=[sample], batch_size=batch)


def measured(layers: int, hidden: int, case: Case, plan: weft.Plan, rounds: int) -> tuple[float, float]:
    """Run by every process: seconds to the first token of this rank's sequences, and of the batch; medians."""
    engine = weft.parallelize(workload(layers, hidden, case.batch), plan, purpose="inference")
    ids = torch.randint(3, 1000, (case.batch, case.prompt), generator=torch.Generator().manual_seed(0))
    firsts, totals = [], []
    for _ in range(rounds + 1):
        seen: dict[int, float] = {}

        def told(tokens: dict[int, int], began: float, seen: dict[int, float] = seen) -> None:
            for sequence in tokens:
                seen.setdefault(sequence, time.perf_counter() - began)

        if dist.is_initialized():
            dist.barrier()
        began = time.perf_counter()
        engine.generate(ids, max_new_tokens=case.new, eos_token_id=[], on_tokens=lambda t, b=began: told(t, b))
        totals.append(time.perf_counter() - began)
        firsts.append(max(seen.values(), default=0.0))
    return median(firsts[1:]), median(totals[1:])


def machine() -> Cluster:
    """Run by every process: what it computes on."""
    return measure()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two plans of a tiny model")
    small = parser.parse_args().small
    layers, hidden = (2, 64) if small else (8, 256)
    cluster = weft.launch(machine, devices=2)[0]
    print(f"{'plan':<28}{'first token':>24}{'':>6}{'tokens/s':>22}\n{'':<28}{'predicted  measured':>24}", end="")
    print(f"{'':>6}{'predicted  measured':>22}")
    for case in CASES[:2] if small else CASES:
        tokens = Tokens(prompt=case.prompt, new_tokens=case.new)
        costs = capture_inference(workload(layers, hidden, case.batch), tokens=tokens)
        choice = choose_inference(costs, cluster, **case.fixed)
        found = weft.launch(measured, layers, hidden, case, choice.plan, 1 if small else ROUNDS, devices=2)
        first, total = (max(each) for each in zip(*found, strict=True))
        estimate, rate = choice.estimate, case.batch * case.new / total
        name = f"{choice.plan.describe()} x{choice.plan.microbatches}, {case.batch} of {case.prompt}"
        print(
            f"{name:<28}{1e3 * estimate.first_token_s:>10.1f} ms{1e3 * first:>8.1f} ms"
            f"{estimate.first_token_s / first - 1:>+7.0%}{estimate.tokens_per_s:>11.0f}{rate:>11.0f}"
            f"{estimate.tokens_per_s / rate - 1:>+7.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
