"""The table of a server under load, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from weft.quantity import format_seconds
from weft.report.tables import new_table

if TYPE_CHECKING:
    from weft.jobs.bench import Bench  # what it imports is there with the extra `serve` only


def table(found: Bench) -> RenderableType:
    """One row per load."""
    asked = found.asked
    title = f"{found.model} on {found.devices} devices; {asked.prompt_tokens} tokens each, {asked.new_tokens} new ones"
    made = new_table(title)
    made.add_column("load")
    for name in (
        "\nrequests",
        "\nfailed",
        "\ntokens/s",
        "\nper device",
        "first token\nmean",
        "\np50",
        "\np99",
        "token\nmean",
        "\np50",
        "\np99",
    ):
        made.add_column(name, justify="right", no_wrap=True)
    for load in found.loads:
        times = [load.first_token, load.per_token]
        made.add_row(
            f"{load.clients} clients" if load.clients is not None else f"{load.rate:g} requests/s",
            str(load.requests),
            str(load.failed),
            f"{load.tokens_per_s:.1f}",
            f"{load.tokens_per_s_per_device:.1f}",
            *(format_seconds(x) for spread in times for x in (spread.mean, spread.p50, spread.p99)),
        )
    failures = {load.failure for load in found.loads if load.failure is not None}
    return Group(made, *(Text(f"failed: {failure}") for failure in sorted(failures)))
