"""One request, from its body to the pieces of its text."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from weft.inference import sampling
from weft.serving.decoder import Request
from weft.serving.growth import Growth
from weft.serving.protocol import ChatBody, CompletionBody, Sampling, Usage
from weft.serving.refusal import RefusedError
from weft.serving.scheduler import STARTING, End, Facts, Scheduler, Ticket
from weft.serving.tokenizer import Tokenizer

GREEDY_BELOW = 1e-4
"""A temperature below this takes the most likely token: logits divided by much less are no numbers any more."""

LONG_CHARACTERS = 10_000
"""Longer texts are turned to tokens in a thread, so that streams under way do not wait for it."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a token adds to a text, the tokens so far, and why it is the last if it is."""

    text: str
    tokens: int
    end: End | None = None


async def request_of(body: CompletionBody | ChatBody, scheduler: Scheduler, tokenizer: Tokenizer) -> Request:
    """What a body asks for.

    Raises:
        RefusedError: it cannot be answered.
    """
    facts = scheduler.facts
    if facts is None:
        raise RefusedError(503, STARTING, code="not_ready", retry_s=1)
    prompt = await _prompt(body, tokenizer)
    if not prompt:
        raise RefusedError(400, "the prompt is empty; send at least one token", param=_field(body))
    _known(prompt, facts, _field(body))
    ends = tokenizer.ends if not body.ignore_eos else frozenset[int]()
    temperature = 1.0 if body.temperature is None else body.temperature
    sampled = temperature >= GREEDY_BELOW
    return Request(
        id=scheduler.number(),
        prompt=tuple(prompt),
        max_new_tokens=_room(body, len(prompt), facts),
        sampling=sampling.Sampling(
            do_sample=sampled,
            temperature=temperature if sampled else 1.0,
            top_k=min(body.top_k or 0, facts.vocabulary),
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=secrets.randbits(63) if body.seed is None else body.seed % 2**63,
        ),
        stop_token_ids=ends | _known(body.stop_token_ids or (), facts, "stop_token_ids"),
    )


async def _prompt(body: CompletionBody | ChatBody, tokenizer: Tokenizer) -> list[int]:
    """Token ids of the prompt."""
    if isinstance(body, ChatBody):
        messages = [message.plain() for message in body.messages]
        long = sum(len(message["content"]) for message in messages) > LONG_CHARACTERS
        return await asyncio.to_thread(tokenizer.chat, messages) if long else tokenizer.chat(messages)
    prompt = body.prompt
    if isinstance(prompt, list) and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if not isinstance(prompt, str):
        return [id for id in prompt if isinstance(id, int)]
    if len(prompt) > LONG_CHARACTERS:
        return await asyncio.to_thread(tokenizer.encode, prompt)
    return tokenizer.encode(prompt)


def _field(body: CompletionBody | ChatBody) -> str:
    """The field that has the prompt."""
    return "messages" if isinstance(body, ChatBody) else "prompt"


def _known(ids: Sequence[int], facts: Facts, param: str) -> frozenset[int]:
    """Token ids, checked. Raises RefusedError."""
    if ids and max(ids) >= facts.vocabulary:
        raise RefusedError(400, f"token id {max(ids)} is outside the vocabulary of {facts.vocabulary}", param=param)
    return frozenset(ids)


def _room(body: CompletionBody | ChatBody, prompt: int, facts: Facts) -> int:
    """New tokens at most. Raises RefusedError: there is not as much room."""
    most = min(facts.max_length, facts.capacity_tokens)
    asked = body.max_tokens
    if isinstance(body, ChatBody):
        if None not in (body.max_tokens, body.max_completion_tokens):
            raise RefusedError(400, "max_tokens and max_completion_tokens are the same; send one", param="max_tokens")
        asked = body.max_completion_tokens or body.max_tokens or max(1, most - prompt)
    asked = asked or 16
    if prompt + asked > most:
        what = _field(body)
        raise RefusedError(
            400,
            f"this model has room for {most} tokens, and {prompt + asked} were asked for ({prompt} in the {what}, "
            f"{asked} in the completion); shorten the {what} or the completion",
            code="context_length_exceeded",
            param=what,
        )
    return asked


def stops_of(body: Sampling) -> list[str]:
    """Stop strings."""
    return [body.stop] if isinstance(body.stop, str) else body.stop or []


async def pieces(ticket: Ticket, tokenizer: Tokenizer, stops: list[str]) -> AsyncIterator[Piece]:
    """The text of a request as it grows: a piece for every token, and a last one.

    Raises:
        RefusedError: it could not be finished.
    """
    growth, tokens = Growth(tokenizer, stops), 0
    async for token in ticket:
        tokens += 1
        if token in ticket.request.stop_token_ids:
            continue  # it is the last, and no text
        text = growth.add(token)
        if growth.stopped:
            yield Piece(text=text, tokens=tokens, end="stop")
            return
        yield Piece(text=text, tokens=tokens)
    text = growth.finish()
    yield Piece(text=text, tokens=tokens, end="stop" if growth.stopped else ticket.end)


def usage_of(request: Request, tokens: int) -> Usage:
    """Counts of tokens, ``tokens`` of them generated."""
    prompt = len(request.prompt)
    return Usage(prompt_tokens=prompt, completion_tokens=tokens, total_tokens=prompt + tokens)
