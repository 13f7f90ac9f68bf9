"""How far plans for inference do what was predicted, and whether the plan that weft chooses is the fastest: on
processes of this machine, against the estimates of a cluster measured there.

    python benchmarks/inference_plans.py                   everything, kept in benchmarks/results/inference_plans.json
    python benchmarks/inference_plans.py --only plans      tokens/s and time to first token of eight plans of a Llama
    python benchmarks/inference_plans.py --only scenarios  weft's choice among all plans of two processes: batches of 1
                                                           and 32, short and long prompts, a fast and a slow link
    python benchmarks/inference_plans.py --small           a tiny model, a request and a link of each kind: two minutes

The fast link is this machine's memory; the slow one is of 100 Mbit/s between two hosts (``hosts``, which needs root on
Linux; elsewhere these are left out). That is where a choice matters: the activations of a prompt of 256 tokens take
21 ms from stage to stage, those that tensor parallelism sums 0.3 s, more than the 0.1 s of computation that it saves;
at 1 Gbit/s the two are alike. ``inference_scenarios`` says what is measured, and how.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from hardware import machine
from hosts import missing
from inference_rows import VALUES, Request, Row, Scenario
from inference_scenarios import (
    DEVICES,
    SCENARIOS,
    WITHIN,
    Model,
    costs_of,
    measured_in,
    race,
    scenario,
)
from prediction_cases import PLAIN, ROOT, SLOW_LINK, Surroundings
from rich.console import Console
from rich.table import Table

from weft.planner import choose_inference
from weft.quantity import format_count, format_seconds
from weft.runtime.pool import Pool

RESULTS = ROOT / "benchmarks" / "results" / "inference_plans.json"
PREDICTED_WITHIN, CHOICES_OF_EIGHT = 0.15, 7
SMALL_MODEL = Model(layers=2, hidden=64)
TABLE_WIDTH = 160  # where nobody says how wide: a pipe, a file

CASES: list[tuple[Request, list[dict[str, int]]]] = [
    (
        Request(8, 64, 32),
        [{"dp_replicate": 2}, {"pp": 2, "microbatches": 1}, {"pp": 2, "microbatches": 2}, {"tp": 2}],
    ),
    (Request(32, 128, 32), [{"dp_replicate": 2}, {"pp": 2, "microbatches": 4}]),
    (Request(1, 256, 32), [{"pp": 2, "microbatches": 1}]),
    (Request(32, 128, 16), [{"tp": 2}]),
]
"""Eight plans: what each fixes, and what is asked of it."""

SMALL_CASES = [(Request(4, 16, 8), [{"dp_replicate": 2}, {"pp": 2, "microbatches": 2}])]
SMALL_SCENARIOS = [(Request(4, 16, 8), PLAIN), (Request(1, 16, 8), SLOW_LINK)]


def plans(pool: Pool, model: Model, cases: Sequence[tuple[Request, list[dict[str, int]]]], rounds: int) -> list[Row]:
    """Plans that are fixed, predicted and measured."""
    rows = []
    for request, wanted in cases:
        cluster, costs = measured_in(pool), costs_of(model, request)
        made = [choose_inference(costs, cluster, **{"microbatches": 1, **fixed}).plan for fixed in wanted]
        rows += race(pool, model, request, made, cluster, rounds, PLAIN.name)
    return rows


def errors(rows: Sequence[Row]) -> dict[str, float | int]:
    """Mean and largest absolute errors of some rows, and how many are as near as they should be in both."""
    rates, firsts = [abs(row.rate_error) for row in rows], [abs(row.first_error) for row in rows]
    return {
        "plans": len(rows),
        "within": sum(max(pair) <= PREDICTED_WITHIN for pair in zip(rates, firsts, strict=True)),
        "tokens_per_s": fmean(rates),
        "tokens_per_s_worst": max(rates),
        "first_token": fmean(firsts),
        "first_token_worst": max(firsts),
    }


def choices(scenarios: Sequence[Scenario], objective: str) -> dict[str, Any]:
    """How many choices were the fastest plan measured, and how many nearly so."""
    regrets = [each.regret(objective) for each in scenarios]
    return {
        "scenarios": len(scenarios),
        "fastest": sum(regret <= 0 for regret in regrets),
        "within_5_percent": sum(regret <= WITHIN for regret in regrets),
        "regrets": regrets,
    }


def table_of_rows(rows: Sequence[Row]) -> Table:
    """Predicted and measured, for people."""
    table = Table("surroundings", "sequences", "plan", title="Predicted and measured, medians", title_justify="left")
    for name in ("tokens/s predicted", "measured", "off", "first token predicted", "measured", "off"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.surroundings,
            row.request.describe(),
            row.name,
            format_count(row.predicted_tokens_per_s, ""),
            format_count(row.tokens_per_s, ""),
            marked(row.rate_error, PREDICTED_WITHIN),
            format_seconds(row.predicted_first_s),
            format_seconds(row.first_s),
            marked(row.first_error, PREDICTED_WITHIN),
        )
    return table


def table_of_scenarios(scenarios: Sequence[Scenario]) -> Table:
    """Choices, for people."""
    table = Table("surroundings", "sequences", title="Choices of two processes", title_justify="left")
    for objective, what in (("throughput", "batch"), ("latency", "token")):
        for name in (f"by {objective}", "fastest"):
            table.add_column(name)
        for name in (what, "slower by"):
            table.add_column(name, justify="right")
    table.add_column("one process", justify="right")
    for each in scenarios:
        cells = []
        for objective in VALUES:
            row = each.row(objective)
            seconds = row.token_s if objective == "latency" else row.request.batch * row.request.new / row.tokens_per_s
            cells += [row.name, each.fastest(objective).name, format_seconds(seconds)]
            cells.append(marked(each.regret(objective), WITHIN))
        alone = "" if each.alone is None else f"{each.alone.tokens_per_s / each.row('throughput').tokens_per_s:.2f} x"
        table.add_row(each.surroundings, each.request.describe(), *cells, alone)
    return table


def marked(error: float, within: float) -> str:
    """A share, red where it misses its aim."""
    return f"{error:+.1%}" if abs(error) <= within else f"[red]{error:+.1%}[/red]"


def ran(wanted: Sequence[tuple[Request, Surroundings]], model: Model, rounds: int, people: Console) -> list[Scenario]:
    """Every scenario, those of the same surroundings in the same processes."""
    found = []
    for surroundings in dict.fromkeys(where for _, where in wanted):
        with surroundings.pool(DEVICES) as pool:
            for request in (request for request, where in wanted if where == surroundings):
                found.append(scenario(pool, model, request, surroundings, rounds))
                people.print(table_of_rows(found[-1].rows), table_of_scenarios(found[-1:]))
    return found


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, a few plans")
    parser.add_argument("--only", choices=("plans", "scenarios"), help="half of it")
    parser.add_argument("--rounds", type=int, help="of each plan (default 5, small 2)")
    given = parser.parse_args()
    people = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    model, rounds = SMALL_MODEL if given.small else Model(), given.rounds or (2 if given.small else 5)
    rows: list[Row] = []
    if given.only != "scenarios":
        with PLAIN.pool(DEVICES) as pool:
            rows = plans(pool, model, SMALL_CASES if given.small else CASES, rounds)
        people.print(table_of_rows(rows))
    wanted = [] if given.only == "plans" else SMALL_SCENARIOS if given.small else SCENARIOS
    reason = missing() if wanted else None
    possible = [each for each in wanted if reason is None or each[1] == PLAIN]
    if len(possible) < len(wanted):
        people.print(f"left out: {len(wanted) - len(possible)} scenarios; {reason}")
    scenarios = ran(possible, model, rounds, people)
    every = rows + [row for each in scenarios for row in each.rows]
    summary = {
        "plans": errors(rows) if rows else None,
        "all": errors(every),
        "choices": {objective: choices(scenarios, objective) for objective in VALUES} if scenarios else None,
    }
    if scenarios:
        people.print(table_of_scenarios(scenarios))
    people.print_json(json.dumps(summary))
    if not given.small and given.only is None:
        kept = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "model": model._asdict(),
            "rounds": rounds,
            "aims": {"predicted_within": PREDICTED_WITHIN, "choices_of_eight": CHOICES_OF_EIGHT},
            "summary": summary,
            "left_out": reason if len(possible) < len(wanted) else None,
            "plans": [row.to_json() for row in every],
            "scenarios": [each.to_json() for each in scenarios],
        }
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        people.print(f"kept in {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
