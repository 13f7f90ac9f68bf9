"""Blame: telling where in the user's code something went wrong."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

from weft.errors import ModelError, WeftError

LIBRARIES = (os.path.dirname(torch.__file__), os.path.dirname(__file__), "<")


class FakeRunError(ModelError):
    """The user's code could not be run on fake tensors; it may run on real ones."""


class LeftBehindError(ModelError):
    """Somebody reads a tensor that a unit made and did not return."""


def told(unit: str, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run the user's code on fake tensors; whatever it raises is told once, with its place.

    Args:
        unit: the unit it belongs to, "" for code between units.

    Raises:
        FakeRunError: it raised.
    """
    try:
        return run(*args, **kwargs)
    except WeftError:
        raise
    except Exception as error:  # the user's code: whatever it raises is told once
        who = f"unit {unit!r}" if unit else "the model"
        message = f"{who} raised {type(error).__name__} on fake tensors: {first_line(error)} ({place_of(error)})"
        raise FakeRunError(message) from error


def place_of(error: BaseException) -> str:
    """File and line of the user's code that an error comes from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not is_library(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "inside torch"


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).splitlines()), "")


def where() -> str:
    """File and line of the innermost running code that is neither torch's nor this package's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and is_library(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def is_library(filename: str) -> bool:
    """Whether a file is torch's or this package's."""
    return filename.startswith(LIBRARIES)
