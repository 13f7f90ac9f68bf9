"""Where results go: text to people, or one JSON object to programs."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, RenderableType


@contextlib.contextmanager
def output(as_json: bool) -> Iterator[Callable[[RenderableType, dict[str, Any]], None]]:
    """Yields a function that shows a result to people, or writes it as JSON.

    For JSON, whatever else this process and those it starts print goes to stderr, the user's own code included.
    """
    if not as_json:
        people = sys.stdout.isatty()
        console = Console(width=None if people else 160, highlight=False, markup=False, soft_wrap=not people)

        def show(text: RenderableType, _: dict[str, Any]) -> None:
            if text:
                console.print(text)

        yield show
        return
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        with open(real, "w", closefd=False) as stdout, contextlib.redirect_stdout(sys.stderr):

            def write(_: RenderableType, data: dict[str, Any]) -> None:
                stdout.write(json.dumps(data) + "\n")
                stdout.flush()  # a server goes on after it has said where it is

            yield write
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)
