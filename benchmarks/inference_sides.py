"""The two sides of ``inference.py``, in the processes of a job."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import weft
from weft.capture import capture
from weft.cluster import Cluster
from weft.planner.search import make_plan

VOCABULARY = 1024


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured: a Llama, prompts and tokens after them."""

    layers: int = 8
    hidden: int = 256
    heads: int = 8
    sequences: int = 8
    prompt: int = 1024
    tokens: int = 32
    samples: int = 16
    batches: int = 6
    rounds: int = 7


class Prompts:
    """Random tokens."""

    def __init__(self, samples: int, length: int) -> None:
        self.ids = torch.randint(VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index]}


def workload(sizes: Sizes) -> weft.Workload:
    """The Llama, whose prediction is the next token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=sizes.layers,
        hidden_size=sizes.hidden,
        intermediate_size=3 * sizes.hidden,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=sizes.prompt + sizes.tokens,
    )
    return weft.Workload(
        model=lambda: LlamaForCausalLM(copy.deepcopy(config)),
        loss=lambda model, batch: model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss,
        data=Prompts(sizes.samples, sizes.prompt),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=sizes.samples,
        predict=lambda model, batch: model(input_ids=batch["input_ids"], logits_to_keep=1).logits[:, -1].argmax(-1),
    )


def plan_of(sizes: Sizes, cluster: Cluster | None = None, **degrees: int) -> weft.Plan:
    """The plan of these degrees; for a measured cluster, with the groups that weft chooses for it."""
    work = workload(sizes)
    if cluster is not None:
        return weft.plan(work, cluster, purpose="inference", **degrees)
    devices = degrees.get("pp", 1) * degrees.get("dp_replicate", 1)
    return make_plan(capture(work), Cluster.local(devices), **degrees)


def whole_model(work: weft.Workload) -> Any:
    """On one device, as it is without weft."""
    torch.manual_seed(work.seed)
    return work.model().eval()


# -- what one writes without a plan -----------------------------------------------------------------------------------


class Placed:
    """A Llama's layers on two processes, one after the other, as device_map places them: each its own, with its cache;
    activations go forward, tokens back."""

    def __init__(self, work: weft.Workload, rank: int) -> None:
        model = whole_model(work)
        self.rank, self.config, self.inner, self.head = rank, model.config, model.model, model.lm_head
        half = len(self.inner.layers) // 2
        self.inner.layers = self.inner.layers[half:] if rank else self.inner.layers[:half]
        for index, layer in enumerate(self.inner.layers):
            layer.self_attn.layer_idx = index
        self.inner.config.num_hidden_layers = len(self.inner.layers)
        if rank == 0:
            self.inner.norm = nn.Identity()

    def generate(self, ids: Tensor, tokens: int) -> Tensor:
        """So many tokens after each prompt."""
        with torch.inference_mode():
            return self._generate(ids, tokens)

    def _generate(self, ids: Tensor, tokens: int) -> Tensor:
        from transformers import DynamicCache

        cache, found = DynamicCache(config=self.inner.config), [ids]
        for _ in range(tokens):
            shape = (*ids.shape, self.config.hidden_size)
            if self.rank == 0:
                hidden = self.inner(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
                dist.send(hidden.contiguous(), 1)
                ids = torch.empty(len(ids), 1, dtype=torch.long)
                dist.recv(ids, 1)
            else:
                hidden = torch.empty(shape)
                dist.recv(hidden, 0)
                last = self.inner(inputs_embeds=hidden, past_key_values=cache, use_cache=True).last_hidden_state
                ids = self.head(last[:, -1:]).argmax(-1)
                dist.send(ids, 0)
            found.append(ids)
        return torch.cat(found, dim=1)


# -- the sides, in turns ----------------------------------------------------------------------------------------------


def in_turns(sides: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side by round on the slowest process. What they give must be equal for names that begin alike, up
    to a comma."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):  # the first warms up
        given: dict[str, Tensor] = {}
        for name in sorted(sides, reverse=bool(number % 2)):
            dist.barrier()
            began = time.perf_counter()
            found = sides[name]()
            took = torch.tensor(time.perf_counter() - began)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            if number:
                seconds[name].append(float(took))
            if not torch.equal(given.setdefault(name.partition(",")[2], found), found):
                raise SystemExit("the sides do not give the same tokens")
    return seconds


def decoding(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Of generations of many tokens and of one, the seconds of all tokens but the first."""
    return {
        side: [many - one for many, one in zip(seconds[f"{side},many"], seconds[f"{side},one"], strict=True)]
        for side in ("weft", "without")
    }


def pipeline(sizes: Sizes, plan: weft.Plan) -> dict[str, list[float]]:
    """Decoding on two stages, in a process of the job."""
    work = workload(sizes)
    engine = weft.parallelize(work, plan, purpose="inference")
    placed, ids = Placed(work, dist.get_rank()), work.sample_batch(sizes.sequences)["input_ids"]

    def generate(tokens: int) -> Tensor:
        return engine.generate(ids, max_new_tokens=tokens, eos_token_id=()).sequences

    return decoding(
        in_turns(
            {
                "weft,many": lambda: generate(sizes.tokens),
                "weft,one": lambda: generate(1),
                "without,many": lambda: placed.generate(ids, sizes.tokens),
                "without,one": lambda: placed.generate(ids, 1),
            },
            sizes.rounds,
        )
    )


def replicas(sizes: Sizes, plan: weft.Plan) -> dict[str, list[float]]:
    """Predictions of several batches on two replicas; without, the first process does all of them. Rank 0 has the
    results; the other one says what they should be."""
    work = workload(sizes)
    engine = weft.parallelize(work, plan, purpose="inference")
    model, batches = whole_model(work), [range(sizes.samples)] * sizes.batches
    expected = torch.cat([engine.predict(work.batch_of(batch)) for batch in batches])

    def together() -> Tensor:
        found = list(engine.predictions(batches))
        return torch.cat(found) if found else expected

    def alone() -> Tensor:
        assert work.predict is not None
        if dist.get_rank() > 0:
            return expected
        with torch.inference_mode():
            return torch.cat([work.predict(model, work.batch_of(batch)) for batch in batches])

    return in_turns({"weft": together, "without": alone}, sizes.rounds)


def single(sizes: Sizes, plan: weft.Plan) -> dict[str, list[float]]:
    """Generation in one process."""
    work = workload(sizes)
    engine = weft.parallelize(work, plan, purpose="inference")
    model, ids = whole_model(work), work.sample_batch(sizes.sequences)["input_ids"]
    settings = {"max_new_tokens": sizes.tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return in_turns(
        {
            "weft": lambda: engine.generate(ids, max_new_tokens=sizes.tokens, eos_token_id=()).sequences,
            "without": lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **settings),
        },
        sizes.rounds,
    )
