"""Quantities as people write and read them: sizes, times, counts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from weft.errors import ClusterError
from weft.plain import LARGEST, shown

UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000 ** (i + 1) for i, prefix in enumerate("KMGTP")},
    **{f"{prefix}iB": 1024 ** (i + 1) for i, prefix in enumerate("KMGTP")},
}


Sizes = str | int | Sequence[int] | None
"""One size for all devices, one for each, or no limit."""


def parse_size(text: str | int) -> int:
    """Bytes of ``"2GiB"``, ``"512 MB"``, ``"1.5GiB"`` or a plain number of bytes.

    Raises:
        ClusterError: not a size, or not positive.
    """
    hint = "write a number and a unit, as in 512MiB, 2GiB or 80GB"
    if isinstance(text, int):
        size: float = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
        if match is None:
            raise ClusterError(f"{shown(text)} is not a size; {hint}")
        number, unit = match.groups()
        factor = {name.lower(): factor for name, factor in UNITS.items()}.get(unit.lower() or "b")
        if factor is None:
            raise ClusterError(f"{shown(text)} is not a size: unit {shown(unit)} is unknown; {hint}")
        size = float(number) * factor
    if not 1 <= size <= LARGEST:
        raise ClusterError(f"a size must be from one byte to {LARGEST}, got {shown(text)}; {hint}")
    return int(size)


def parse_sizes(sizes: Sizes) -> tuple[int, ...]:
    """Bytes of one size, of several, also with commas between them (``"2GiB,1GiB"``), or of none.

    Raises:
        ClusterError: one of them is not a size.
    """
    if sizes is None:
        return ()
    if isinstance(sizes, int):
        return (parse_size(sizes),)
    return tuple(map(parse_size, sizes.split(",") if isinstance(sizes, str) else sizes))


def each_of(sizes: Sequence[int], devices: int) -> Sequence[int | None]:
    """The size of every device, where one is meant for all of them, and none is no limit.

    Raises:
        ClusterError: several, but not one for each device.
    """
    if len(sizes) not in (0, 1, devices):
        raise ClusterError(f"{len(sizes)} sizes of memory for {devices} devices; give one for all, or one for each")
    return sizes if len(sizes) == devices else [sizes[0] if sizes else None] * devices


def format_bytes(size: float) -> str:
    """``1.5 GiB``: three digits at most, binary units."""
    units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while abs(size) >= 1000 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} B" if units[0] == "B" else f"{_digits(size)} {units[0]}"


def format_seconds(seconds: float) -> str:
    """``340 us``, ``12.3 ms``, ``1.25 s``, ``4 min 10 s``, ``3 h 5 min``."""
    if seconds >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60} min"
    if seconds >= 100:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= size:
            return f"{_digits(seconds / size)} {unit}"
    return "0 s" if seconds == 0 else f"{_digits(seconds * 1e9)} ns"


def format_count(count: float, unit: str = "") -> str:
    """``12.6 M``, ``405 G``: three digits, decimal prefixes, before a unit if one is given (``"flop/s"``)."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    while abs(count) >= 1000 and len(prefixes) > 1:
        count /= 1000
        prefixes.pop(0)
    number = f"{count:.0f}" if not prefixes[0] and count == int(count) else _digits(count)
    return f"{number} {prefixes[0]}{unit}".rstrip()


def _digits(value: float) -> str:
    """Three significant digits without an exponent."""
    decimals = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{decimals}f}"
