"""Plain: JSON and TOML files that anybody may have written, read into numbers, text, lists and tables, or refused.

Nothing is run. Memory is bounded by the file's size; of what has none (a pipe, a device) no more than PIPE_BYTES is
read. What is refused is told with ``shown``, which stays short whatever it is given.
"""

from __future__ import annotations

import json
import reprlib
import stat
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

PIPE_BYTES = 2**24
DEEPEST = 40
"""Levels of lists and tables in one another. Files of ours have ten at most, a model's configuration perhaps more."""

LARGEST = 2**63 - 1
"""Of whole numbers: what a tensor library counts with."""


class UnreadableError(ValueError):
    """A file that cannot be read, or is not what it should be. The message says why, without the path."""


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UnreadableError: it cannot be read, is not JSON, names a key twice, or goes too deep.
    """
    return parse_json(_content(path))


def parse_json(content: bytes) -> Any:
    """What some JSON says.

    Raises:
        UnreadableError: it is not JSON, names a key twice, or goes too deep.
    """
    return _parsed(content, "JSON", lambda text: json.loads(text, object_pairs_hook=_once))


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        UnreadableError: it cannot be read, is not TOML, or goes too deep.
    """
    found: dict[str, Any] = _parsed(_content(path), "TOML", tomllib.loads)
    return found


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether a value is a whole number, and one that can be counted with."""
    return type(value) is int and least <= value <= LARGEST


def shown(value: Any) -> str:
    """A value for a message, in a few words."""
    return _SHOWN.repr(value)


def printable(text: str) -> str:
    """Text for people, of files that may say anything: what would steer a terminal, or is no character, is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _Shown(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write numbers of thousands of digits."""
        return str(x) if x.bit_length() <= 128 else f"a number of {x.bit_length()} bits"


_SHOWN = _Shown()
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother, _SHOWN.maxlist, _SHOWN.maxtuple, _SHOWN.maxdict = 2, 60, 60, 6, 6, 6


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            regular = stat.S_ISREG(path.stat().st_mode)
            return file.read() if regular else file.read(PIPE_BYTES)
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a name with a zero byte
        raise UnreadableError(f"cannot be read: {error}") from error


def _parsed(content: bytes, kind: str, parse: Callable[[str], Any]) -> Any:
    try:
        found = parse(content.decode())
    except UnreadableError:
        raise
    except ValueError as error:  # broken, not UTF-8, or a number of thousands of digits
        raise UnreadableError(f"is not {kind}: {error}") from error
    except RecursionError as error:
        raise UnreadableError(f"is not {kind} of ours: it goes more than {DEEPEST} levels deep") from error
    _check_depth(found)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all there: of two that are equal, JSON keeps the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise UnreadableError(f"key {shown(counts.most_common(1)[0][0])} is there twice")
    return found


def _check_depth(value: Any) -> None:
    """Without calls in one another, which would end at Python's own limit."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        if not level:
            return
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    raise UnreadableError(f"goes more than {DEEPEST} levels deep, which nothing of ours does")
