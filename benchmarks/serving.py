"""Continuous batching over HTTP: tokens/s of 16 clients at once against those of one, on this machine.

    python benchmarks/serving.py                      every plan; minutes
    python benchmarks/serving.py --only pp=2 --rounds 5

A server for each plan; the two loads take turns at it, and the ratio is the median over rounds, so that whatever else
the machine does slows both. The clients share the machine with the server. Requests that fail are an error.
"""

import argparse
import asyncio
import json
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hardware import machine
from rich.console import Console
from rich.table import Table

from weft.jobs.bench import started
from weft.quantity import format_seconds
from weft.serving.load import Asked, Client, Load, at_once

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "serving.json"
EXAMPLE = str(ROOT / "examples" / "hf_llama.py")
CLIENTS = 16
AT_LEAST = 4.0
PLANS = {
    "one device": ["--devices", "1"],
    "pp=2": ["--devices", "2", "--pp", "2", "--microbatches", "2"],
    "tp=2": ["--devices", "2", "--tp", "2"],
    "dp_replicate=2": ["--devices", "2", "--dp-replicate", "2"],
}


async def loads(url: str, asked: Asked, rounds: int) -> list[tuple[Load, Load]]:
    """Of each round: one client, and all."""
    client = Client(url, None)
    await client.look()
    found = []
    try:
        await at_once(client, asked, CLIENTS, CLIENTS)
        for _ in range(rounds):
            found.append((await at_once(client, asked, 1, 3), await at_once(client, asked, CLIENTS, 3 * CLIENTS)))
    finally:
        await client.close()
    failed = [load.failure for both in found for load in both if load.failed]
    if failed:
        raise SystemExit(f"a request failed: {failed[0]}")
    return found


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A row: medians over rounds."""
    asked = Asked(prompt_tokens=arguments.prompt_tokens, new_tokens=arguments.new_tokens)
    size = [f"layers={arguments.layers}", f"hidden={arguments.hidden}", "heads=8"]
    with started([EXAMPLE, *size, *PLANS[name]]) as url:
        rounds = asyncio.run(loads(url, asked, arguments.rounds))
    ratios = [many.tokens_per_s / one.tokens_per_s for one, many in rounds]
    return {
        "plan": name,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        **{
            f"{clients}_clients": {
                "tokens_per_s": statistics.median(both[side].tokens_per_s for both in rounds),
                "first_token_s": statistics.median(both[side].first_token.p50 for both in rounds),
                "per_token_s": statistics.median(both[side].per_token.p50 for both in rounds),
            }
            for side, clients in enumerate((1, CLIENTS))
        },
    }


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    """One row per plan."""
    table = Table(title=title, title_justify="left")
    for name in (
        "plan",
        *(f"{n} {what}" for n in (1, CLIENTS) for what in ("tokens/s", "first token", "token")),
        "ratio",
    ):
        table.add_column(name, justify="left" if name == "plan" else "right")
    for row in rows:
        cells = [
            text
            for n in (1, CLIENTS)
            for load in [row[f"{n}_clients"]]
            for text in (
                f"{load['tokens_per_s']:.1f}",
                format_seconds(load["first_token_s"]),
                format_seconds(load["per_token_s"]),
            )
        ]
        ratio = f"{row['ratio']:.2f}"
        table.add_row(row["plan"], *cells, ratio if row["ratio"] >= AT_LEAST else f"[red]{ratio}[/red]")
    return table


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parse.add_argument("--only", choices=list(PLANS), action="append", metavar="PLAN")
    parse.add_argument("--rounds", type=int, default=7, help="of each plan (default %(default)s)")
    parse.add_argument("--layers", type=int, default=4)
    parse.add_argument("--hidden", type=int, default=256)
    parse.add_argument("--prompt-tokens", type=int, default=32)
    parse.add_argument("--new-tokens", type=int, default=64)
    parse.add_argument("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    return parse


def main() -> None:
    arguments = parser().parse_args()
    people = Console(stderr=arguments.json)
    people.width = max(people.width, 140 if not people.is_terminal else 0)
    rows = [measure(name, arguments) for name in arguments.only or PLANS]
    size = f"layers={arguments.layers} hidden={arguments.hidden}"
    asked = f"{arguments.prompt_tokens} tokens and {arguments.new_tokens} new ones"
    people.print(table_of(rows, f"examples/hf_llama.py {size}, {asked}, {arguments.rounds} rounds"))
    settings = {name: value for name, value in vars(arguments).items() if name != "json"}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    result = {"date": date, "machine": machine(), "settings": settings, "rows": rows}
    if settings == {name: value for name, value in vars(parser().parse_args([])).items() if name != "json"}:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")
        people.print(f"kept in {RESULTS.relative_to(ROOT)}")
    else:
        people.print("not kept: only a run without options is")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
