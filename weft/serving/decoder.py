"""What serving asks of a model: one more token for every request that takes part, and requests that come and go."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from weft.inference.sampling import GREEDY, Sampling


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate.

    Attributes:
        id: tells it from all others of the server's life.
        prompt: token ids, at least one.
        max_new_tokens: at least 1.
        sampling: how its tokens are chosen; the same request with the same seed gets the same ones, in any company.
        stop_token_ids: tokens that end it; the one that does is returned by ``Decoder.step`` too.
    """

    id: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_token_ids: frozenset[int] = frozenset()

    @property
    def positions(self) -> int:
        """Slots of the cache it takes at its longest."""
        return len(self.prompt) + self.max_new_tokens

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"prompt": list(self.prompt), "stop_token_ids": sorted(self.stop_token_ids)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Request:
        """What ``to_json`` gave."""
        made = {
            "prompt": tuple(data["prompt"]),
            "sampling": Sampling(**data["sampling"]),
            "stop_token_ids": frozenset(data["stop_token_ids"]),
        }
        return cls(**{**data, **made})


class Decoder(Protocol):
    """A model with a cache for each request that takes part.

    In a distributed job every rank calls ``join``, ``leave`` and ``step`` with the same arguments in the same order,
    and ``step`` returns the same on every rank. A decoder ends no request by itself: its user lets requests leave.

    Attributes:
        vocabulary: token ids are below this.
        max_length: positions the model can have, prompt and new tokens together.
        capacity_tokens: slots of the cache; the ``positions`` of all requests that take part are at most this.
    """

    vocabulary: int
    max_length: int
    capacity_tokens: int

    def join(self, requests: Sequence[Request]) -> None:
        """These take part from the next step on."""

    def leave(self, ids: Collection[int]) -> None:
        """These take part no longer; their cache is let go."""

    def step(self) -> dict[int, int]:
        """One more token for every request that takes part, by id: the first one of those who joined, the next one of
        the others."""
