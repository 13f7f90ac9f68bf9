"""Sampling: the next token of every sequence, from its logits.

As ``transformers`` has it: logits are divided by the temperature, then the ``top_k`` most probable tokens are kept,
then of these the fewest whose probabilities add up to ``top_p`` (Holtzman et al. 2020, nucleus sampling). The random
number of a token depends on the seed, the sequence and the token's place in it alone, so that it does not matter where
a sequence is generated and with which others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; the names are transformers'.

    Attributes:
        do_sample: draw tokens; otherwise the most probable one is taken.
        temperature: above 0; lower is less random.
        top_k: how many of the most probable tokens are drawn from; 0: all.
        top_p: share of the probability that is drawn from, above 0 up to 1.
        seed: of the random numbers.

    Raises:
        InputError: a value out of its range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"temperature must be above 0, got {self.temperature}; use do_sample=False for no chance")
        if self.top_k < 0:
            raise InputError(f"top_k must be at least 1, or 0 for all tokens, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")


GREEDY = Sampling()


def choose(logits_RV: Tensor, settings: Sequence[Sampling], rows: Sequence[int], places: Sequence[int]) -> Tensor:
    """The next token of each sequence, (R) int64.

    Args:
        logits_RV: of R sequences over V tokens.
        settings: of each sequence.
        rows: number of each sequence, which its random numbers depend on.
        places: how many tokens were generated before, of each sequence.
    """
    tokens = logits_RV.argmax(dim=-1)
    for index, sampling in enumerate(settings):
        if sampling.do_sample:
            tokens[index] = draw(logits_RV[index], sampling, uniform(sampling.seed, rows[index], places[index]))
    return tokens


def draw(logits_V: Tensor, sampling: Sampling, number: float) -> Tensor:
    """The token whose stretch of the cumulative probability a number between 0 and 1 falls into, the most probable
    tokens first."""
    scores, order = (logits_V.double() / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k:
        scores, order = scores[: sampling.top_k], order[: sampling.top_k]
    probabilities = scores.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    if sampling.top_p < 1:
        # Those before which less than top_p has been added up.
        kept = int(((cumulative - probabilities) < sampling.top_p).sum())
        cumulative = cumulative[:kept]
    place = int(torch.searchsorted(cumulative, number * cumulative[-1], right=True))
    return order[min(place, len(cumulative) - 1)]


def uniform(seed: int, row: int, place: int) -> float:
    """A number from 0 up to 1, the same wherever it is asked for."""
    digest = hashlib.blake2b(repr((seed, row, place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
