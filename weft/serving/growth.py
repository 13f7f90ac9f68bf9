"""Text that grows token by token, and where stop strings end it.

A token may be half a character, and what a token adds to the text may depend on the one before it (a space, say). So
the last few tokens are decoded again with each new one, and what ends in a replacement character waits for more. Text
that may be the beginning of a stop string waits too.
"""

from __future__ import annotations

from collections.abc import Sequence

from weft.serving.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"

HALF_TOKENS = 8
"""Tokens without a whole character after which what is there is told as it is: no character is longer."""


class Growth:
    """The text of one completion.

    Args:
        tokenizer: of the model.
        stops: strings before which the text ends; none is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer, self._stops = tokenizer, stops
        self._told: list[int] = []
        self._new: list[int] = []
        self._held = ""

    def add(self, token: int) -> str:
        """One more token; what can be told now. Once it is ``stopped`` there is no more."""
        self._new.append(token)
        text = self._fresh()
        if text.endswith(REPLACEMENT) and len(self._new) < HALF_TOKENS:
            return ""
        self._told, self._new = self._new, []
        return self._tell(text)

    def finish(self) -> str:
        """What was held back, at the end."""
        text = self._tell(self._fresh() if self._new else "")
        held, self._held, self._new = self._held, "", []
        return text + held

    def _fresh(self) -> str:
        """The text of the tokens that are not told yet, as it follows those before."""
        before = self._tokenizer.decode(self._told) if self._told else ""
        both = self._tokenizer.decode(self._told + self._new)
        return both[len(before) :].encode("utf-8", "replace").decode()

    def _tell(self, text: str) -> str:
        """Text, up to a stop string or what may become one."""
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
