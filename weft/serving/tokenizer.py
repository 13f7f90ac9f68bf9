"""Text to tokens and back, whatever a target brings for it.

A directory has the tokenizer and the chat template of ``transformers``. A target file may have a function ``tokenizer``
beside its ``workload``, which returns an object with

    encode(text) -> list of token ids
    decode(ids) -> text                       of any ids, also of half a character
    eos_token_id                              if there is one: a whole number, or None
    apply_chat_template(messages) -> ids      if it can chat; messages are dicts of "role" and "content"

or one of ``transformers``' tokenizers. Where there is none, prompts are lists of token ids, and text is ids with spaces
between.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from weft.errors import TargetError
from weft.serving.refusal import RefusedError
from weft.target import Target

Messages = Sequence[dict[str, str]]


class Tokenizer(Protocol):
    """What serving reads and writes text by.

    Attributes:
        ends: tokens after which a text is over.
    """

    ends: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises RefusedError."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""

    def chat(self, messages: Messages) -> list[int]:
        """Token ids of a conversation, up to where the assistant begins. Raises RefusedError."""


class Numbers:
    """No tokenizer: text is token ids with spaces between."""

    ends: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        """Raises RefusedError: a prompt is to be a list of ids."""
        raise RefusedError(400, "this model has no tokenizer; send the prompt as a list of token ids", param="prompt")

    def decode(self, ids: Sequence[int]) -> str:
        """``1 2 3``."""
        return " ".join(map(str, ids))

    def chat(self, messages: Messages) -> list[int]:
        """Raises RefusedError."""
        raise RefusedError(400, "this model has no tokenizer; send token ids to /v1/completions", param="messages")


class Own:
    """An object of the target's."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        end = getattr(tokenizer, "eos_token_id", None)
        self.ends = frozenset(() if end is None else (int(end),))
        self._chat: Callable[[list[dict[str, str]]], Sequence[int]] | None = getattr(
            tokenizer, "apply_chat_template", None
        )

    def encode(self, text: str) -> list[int]:
        """As the target does it."""
        return [int(id) for id in self._tokenizer.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """As the target does it."""
        return str(self._tokenizer.decode(list(ids)))

    def chat(self, messages: Messages) -> list[int]:
        """As the target does it."""
        if self._chat is None:
            raise _no_chat()
        return [int(id) for id in self._chat(list(messages))]


class HuggingFace:
    """A tokenizer of ``transformers``.

    Args:
        tokenizer: it.
        ends: tokens that end a text besides its own.
    """

    def __init__(self, tokenizer: Any, ends: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        own = tokenizer.eos_token_id
        self.ends = ends | (frozenset() if own is None else {int(own)})

    def encode(self, text: str) -> list[int]:
        """With the special tokens that begin a text."""
        return list(self._tokenizer.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def chat(self, messages: Messages) -> list[int]:
        """By the model's template."""
        from jinja2 import TemplateError

        if self._tokenizer.chat_template is None:
            raise _no_chat()
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:  # templates refuse orders of roles that their model does not know
            raise RefusedError(400, f"the model's chat template refuses this: {error}", param="messages") from None
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def tokenizer_of(target: Target, directory: Path | None = None) -> Tokenizer:
    """The tokenizer of a target, or of a directory that was named for it.

    Raises:
        TargetError: it cannot be read.
    """
    own = Path(target.file)
    if directory is None and own.is_dir():
        directory = own
    if directory is not None:
        return _of_directory(directory)
    made = target.beside("tokenizer")
    if made is None:
        return Numbers()
    for name in ("encode", "decode"):
        if not callable(getattr(made, name, None)):
            raise TargetError(f"{target}: tokenizer() returned {type(made).__name__}, which has no {name}()")
    return HuggingFace(made) if _is_transformers(made) else Own(made)


def _of_directory(directory: Path) -> Tokenizer:
    """A tokenizer that was saved by ``transformers``; nothing is fetched."""
    from transformers import AutoTokenizer

    if not (directory / "tokenizer_config.json").exists() and not (directory / "tokenizer.json").exists():
        raise TargetError(
            f"{directory}: no tokenizer.json or tokenizer_config.json there; name another with --tokenizer"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise TargetError(f"{directory}: its tokenizer cannot be read: {error}") from error
    settings = directory / "generation_config.json"
    ends = json.loads(settings.read_text()).get("eos_token_id") if settings.exists() else None
    return HuggingFace(tokenizer, frozenset(ends if isinstance(ends, list) else () if ends is None else (ends,)))


def _is_transformers(made: Any) -> bool:
    """Whether an object is one of ``transformers``' tokenizers, without importing it for others."""
    return any(base.__module__.startswith("transformers.") for base in type(made).__mro__)


def _no_chat() -> RefusedError:
    return RefusedError(
        400, "this model has no chat template; use /v1/completions", param="messages", code="no_chat_template"
    )
