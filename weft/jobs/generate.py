"""Generate: text after prompts, by a target's model that is divided by a plan."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from weft.capture.inference import Tokens, capture_inference
from weft.cluster import Cluster
from weft.engines import parallelize
from weft.errors import InputError
from weft.inference.sampling import Sampling
from weft.plan import Plan
from weft.planner import choose_inference
from weft.runtime import memory
from weft.runtime.launch import launch
from weft.runtime.worker import join
from weft.serving.growth import Growth
from weft.serving.refusal import RefusedError
from weft.serving.tokenizer import Tokenizer, tokenizer_of
from weft.target import Target


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to generate; the same on every rank.

    Attributes:
        plan: how the model is divided.
        prompts: token ids of each.
        max_new_tokens: after each.
        sampling: how tokens are chosen.
        stops: tokens that end a text.
        checkpoint: folder of weights that training saved; None: the target's own.
        tokenizer: directory to read the tokenizer from; None: the target's own.
        streams: print the text of the only prompt on stdout as it comes.
        memory_bytes: limit of each device, or of one after the other; empty: none.
    """

    plan: Plan
    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: frozenset[int] = frozenset()
    checkpoint: str | None = None
    tokenizer: Path | None = None
    streams: bool = False
    memory_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What came after each prompt: token ids, its stop token included, and their text."""

    tokens: list[list[int]]
    texts: list[str]
    plan: Plan

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "plan": self.plan.to_json()}


def run(target: Target, order: Order) -> Generated:
    """Generate on local devices.

    Raises:
        InputError: what was asked for cannot be.
        WorkerError: a process died.
    """
    found = launch(generate_here, target, order, devices=order.plan.devices, memory=order.memory_bytes)[0]
    assert isinstance(found, Generated)
    return found


def generate_here(target: Target, order: Order) -> Generated:
    """Generate inside a launched job; every rank calls it and gets the result."""
    join()
    with memory.uncounted():  # the libraries it brings are no memory of the plan
        workload = target.load()
    tokenizer = tokenizer_of(target, order.tokenizer)
    engine = parallelize(workload, order.plan, purpose="inference")
    if order.checkpoint is not None:
        engine.load(order.checkpoint)
    stream = Stream(tokenizer, order.stops) if order.streams and dist.get_rank() == 0 else None
    found = engine.generate(
        order.prompts,
        max_new_tokens=order.max_new_tokens,
        eos_token_id=sorted(order.stops),
        on_tokens=stream,
        **asdict(order.sampling),
    )
    if stream is not None:
        stream.close()
    longest = found.sequences.shape[1] - max(found.lengths)
    rows = [row[longest : longest + n] for row, n in zip(found.sequences.tolist(), found.lengths, strict=True)]
    texts = [tokenizer.decode([token for token in row if token not in order.stops]) for row in rows]
    return Generated(tokens=rows, texts=texts, plan=order.plan)


class Stream:
    """Prints the text of one sequence as its tokens come."""

    def __init__(self, tokenizer: Tokenizer, stops: frozenset[int]) -> None:
        self._growth, self._stops = Growth(tokenizer), stops
        self._over = False

    def __call__(self, tokens: dict[int, int]) -> None:
        for token in tokens.values():
            self._over |= token in self._stops
            if not self._over:
                sys.stdout.write(self._growth.add(token))
                sys.stdout.flush()

    def close(self) -> None:
        """Print what was held back, and end the line."""
        sys.stdout.write(self._growth.finish() + "\n")
        sys.stdout.flush()


def prompts_of(tokenizer: Tokenizer, texts: Sequence[str], tokens: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Prompts as token ids: those given as text, then those given as numbers with commas between.

    Raises:
        InputError: there is none, the target has no tokenizer, or a number is none.
    """
    found = []
    for text in texts:
        try:
            found.append(tuple(tokenizer.encode(text)))
        except RefusedError as error:
            raise InputError(
                "this target has no tokenizer; give the prompt as --prompt-tokens 1,2,3, a function tokenizer() beside "
                "the workload, or --tokenizer DIR"
            ) from error
    for text in tokens:
        try:
            found.append(tuple(int(part) for part in text.split(",")))
        except ValueError as error:
            raise InputError(f"--prompt-tokens {text}: write token ids with commas between, as in 1,2,3") from error
    if not found:
        raise InputError("there is no prompt; give one or several --prompt TEXT")
    if not all(found):
        raise InputError("a prompt is empty; give each at least one token")
    return tuple(found)


def planned(target: Target, cluster: Cluster, *, prompt: int, new_tokens: int, sequences: int, **fixed: Any) -> Plan:
    """A plan to generate by, for sequences of so many tokens.

    Raises:
        InputError: the model does not generate, or has fewer positions.
    """
    tokens = Tokens(prompt=prompt, new_tokens=new_tokens)
    what = capture_inference(target.load(), fixed.get("precision", "float32"), tokens=tokens, batch_size=sequences)
    return choose_inference(what, cluster, **fixed).plan
