"""A Llama of Hugging Face, from its own library and as it is, learns the Python standard library's source byte by byte.

python examples/hf_llama.py
weft serve examples/hf_llama.py --devices 2
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from code_lm import StandardLibrary
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import weft


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["x"], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["y"].flatten())


def workload(
    layers: int = 4, hidden: int = 128, heads: int = 4, context: int = 128, batch_size: int = 16, lr: float = 2e-3
) -> weft.Workload:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=context,
    )
    return weft.Workload(
        model=lambda: LlamaForCausalLM(config),
        loss=loss,
        data=StandardLibrary(context),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr),
        batch_size=batch_size,
        max_grad_norm=1.0,
    )


class Bytes:
    """A token is a byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def tokenizer() -> Bytes:
    """What `weft serve` reads and writes text by."""
    return Bytes()


def train(degrees: dict[str, int], devices: int, steps: int) -> list[float]:
    """Run by every process of a job: the loss of every step."""
    work = workload()
    plan = weft.plan(work, weft.Cluster.local(devices=devices), **degrees)
    if dist.get_rank() == 0:
        print(plan.explain(), flush=True)
    engine = weft.parallelize(work, plan)
    return [float(engine.step(batch)) for _, batch in zip(range(steps), engine.batches(), strict=False)]


if __name__ == "__main__":
    alone = weft.launch(train, {}, 1, 30, devices=1)[0]
    hybrid = weft.launch(train, {"pp": 2, "tp": 2}, 4, 30, devices=4)[0]
    print(f"{'step':>4}{'one device':>14}{'pp=2 tp=2':>14}")
    for step in range(4, 30, 5):
        print(f"{step + 1:>4}{alone[step]:>14.5f}{hybrid[step]:>14.5f}")
