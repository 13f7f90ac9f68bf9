"""Room: how long the buffers of a cache are that grows in place; what plans count with, too."""

from __future__ import annotations

GROWTH, SPARE = 1.5, 32


def length_for(tokens: int) -> int:
    """Tokens that a buffer has room for which was full, or not there, and has to hold so many."""
    return int(GROWTH * tokens) + SPARE
