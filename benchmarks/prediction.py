"""How well weft's predictions hold on this machine: step time and peak memory of many plans of three models, predicted
from a measurement of the machine in the same run, then measured; and how good the plan is that weft would choose.

    python benchmarks/prediction.py             # everything, kept in benchmarks/results/prediction.json
    python benchmarks/prediction.py --small     # a few minutes: one small model, every kind of surroundings

Every plan is trained in rounds that take turns, a few timed steps each, so that a disturbance hits no plan alone;
before each round the machine is measured again. A plan's step time is the median over its rounds, its prediction that
over the measurements of the machine. Its memory is the largest rank's, in other processes, which have a limit
that no plan reaches: without one the C library keeps what is freed, with holes, and what is measured is that. Where
weft's choice and another plan are close, both get more rounds. Surroundings are hosts behind network cards of 1 Gbit/s
and 100 Mbit/s, one process at half speed, one with half the memory (``hosts``); they need root on Linux and are left
out, with the reason, elsewhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from statistics import fmean
from typing import Any, cast

from handwritten import machine
from hosts import missing
from prediction_cases import (
    MEMORY,
    MODELS,
    PLAIN,
    PLANS,
    ROOT,
    SCENARIOS,
    SMALL_MODELS,
    SMALL_PLANS,
    SMALL_SCENARIOS,
    Model,
    Surroundings,
)
from prediction_rows import Row, Scenario
from rich.console import Console
from rich.table import Table

from weft import Plan
from weft.capture import Profile, capture
from weft.cluster import Cluster
from weft.errors import InputError, WeftError
from weft.estimate import Measurement
from weft.jobs.compare import train_plan
from weft.planner import Choice, Keywords, estimate, make_plan, search
from weft.quantity import format_bytes, format_seconds
from weft.runtime.pool import Pool
from weft.target import Target

RESULTS = ROOT / "benchmarks" / "results" / "prediction.json"
TIME_WITHIN, MEMORY_WITHIN, CHOICE_WITHIN, CHOICES_OF_TEN = 0.12, 0.08, 0.05, 9
SLOW_LINK_AT_LEAST, UNEQUAL_AT_LEAST = 1.5, 1.25
MEMORY_STEPS = 2
CANDIDATES = 6
"""Plans of a scenario that are measured: the best ones by prediction, each with other degrees."""

CLOSE = 1.1
"""Plans that took at most this much of the fastest's time are measured again."""


class Bench:
    """What a run shares: the models with their profiles, and how long to measure.

    Args:
        models: by name.
        rounds: how often each plan is trained from scratch.
        steps: timed steps of each round.
        people: where progress is told.
    """

    def __init__(self, models: dict[str, Model], rounds: int, steps: int, people: Console) -> None:
        self.rounds, self.steps, self.people = rounds, steps, people
        self.targets = {
            name: Target.parse(str(path), {key: str(value) for key, value in arguments.items()})
            for name, (path, arguments) in models.items()
        }
        self._profiles: dict[str, Profile] = {}

    def profile(self, model: str) -> Profile:
        """What a model costs, captured once."""
        if model not in self._profiles:
            self._profiles[model] = capture(self.targets[model].load())
        return self._profiles[model]

    def run(self, pool: Pool, rows: Iterable[Row], rounds: int) -> None:
        """Train every plan, one after the other, again and again."""
        rows = [row for row in rows if row.failed is None]
        for number in range(rounds):
            for row in rows:
                if row.failed is None:
                    self._once(pool, row)
                    self.people.print(f"  round {number + 1}: {row.describe()}", style="dim")

    def _once(self, pool: Pool, row: Row) -> None:
        try:
            found = self._train(pool, row, self.steps)
        except WeftError as error:  # a plan that does not fit after all has lost, and is told
            row.failed = str(error)
            return
        row.rounds_s.append(found.step_time_s)
        row.idle.append(found.idle_share)

    def _train(self, pool: Pool, row: Row, steps: int) -> Measurement:
        return pool.run(train_plan, self.targets[row.model], row.plan, steps, ranks=row.plan.devices)[0][0]

    # -- many plans ---------------------------------------------------------------------------------------------------

    def plans(self, wanted: dict[str, list[dict[str, Any]]]) -> list[Row]:
        """Every plan of the list, on this machine as it is."""
        counts = sorted({degree_product(keywords) for plans in wanted.values() for keywords in plans})
        clusters = {count: PLAIN.cluster(count) for count in counts}
        rows = []
        for model, plans in wanted.items():
            for keywords in plans:
                cluster = clusters[degree_product(keywords)]
                rows.append(self.row(model, PLAIN, cluster, make_plan(self.profile(model), cluster, **keywords)))
        with PLAIN.pool(counts[-1]) as pool:
            for number in range(self.rounds):
                if number:
                    clusters = {count: PLAIN.cluster(count) for count in counts}
                    for row in rows:
                        again = estimate(self.profile(row.model), clusters[row.plan.devices], row.plan)
                        row.again_s.append(again.step_time_s)
                self.run(pool, rows, 1)
        for row in rows:
            self.memory(row, clusters[row.plan.devices].with_memory(MEMORY))
        return rows

    def memory(self, row: Row, cluster: Cluster) -> None:
        """Measure a plan's memory, in new processes: what another plan has left free is taken again in pieces."""
        row.predicted_peak = max(estimate(self.profile(row.model), cluster, row.plan).peak_memory_bytes)
        with replace(PLAIN, memory=MEMORY).pool(row.plan.devices) as pool:
            row.peak = max(self._train(pool, row, MEMORY_STEPS).peak_memory_bytes)
        self.people.print(f"  memory: {row.describe_memory()}", style="dim")

    def row(self, model: str, surroundings: Surroundings, cluster: Cluster, plan: Plan) -> Row:
        """A plan and its prediction."""
        predicted = estimate(self.profile(model), cluster, plan)
        return Row(model=model, surroundings=surroundings.name, plan=plan, predicted=predicted)

    # -- weft's choice ------------------------------------------------------------------------------------------------

    def scenario(self, model: str, devices: int, surroundings: Surroundings) -> Scenario:
        """Weft's choice in some surroundings, beside the plans that could be as good."""
        self.people.print(f"{model}, {devices} processes, {surroundings.name}")
        cluster = surroundings.cluster(devices)
        plans = candidates(self.profile(model), cluster, surroundings)
        rows = [self.row(model, surroundings, cluster, plan) for plan in plans]
        with surroundings.pool(devices) as pool:
            self.run(pool, rows, self.rounds)
            scenario = Scenario(model=model, surroundings=surroundings.name, devices=devices, rows=rows)
            if scenario.regret > 0:
                best = min(row.step_s for row in scenario.measured)
                close = [row for row in scenario.measured if row.step_s <= CLOSE * best]
                self.run(pool, {id(row): row for row in (rows[0], *close)}.values(), self.rounds)
        return scenario


def degree_product(keywords: dict[str, Any]) -> int:
    """Devices of a plan by its keywords."""
    product = 1
    for name in ("pp", "dp_replicate", "dp_shard", "tp"):
        product *= keywords.get(name, 1)
    return product


def candidates(profile: Profile, cluster: Cluster, surroundings: Surroundings) -> list[Plan]:
    """Weft's choice first; then the best plans of other degrees, fastest first; the plain copies at any rate, since
    everybody knows them, and where devices differ the same with equal parts for all."""
    choice, count = search(profile, cluster), cluster.devices
    found: list[Choice] = []
    for pp in divisors(count):
        for dp_replicate in divisors(count // pp):
            for dp_shard in divisors(count // pp // dp_replicate):
                degrees = {"pp": pp, "dp_replicate": dp_replicate, "dp_shard": dp_shard}
                fixed = {**degrees, "tp": count // pp // dp_replicate // dp_shard}
                try:
                    found.append(search(profile, cluster, **cast(Keywords, fixed)))
                except InputError:
                    continue  # it does not fit, or the model cannot be divided so
    ranked = [other.plan for other in sorted(found, key=lambda other: other.estimate.step_time_s)]
    plans = [choice.plan, *ranked[:CANDIDATES], *(plan for plan in ranked if plan.dp_replicate == count)]
    if surroundings.slow:
        plans.append(make_plan(profile, cluster, dp_replicate=count))
    return list({json.dumps(plan.to_json()): plan for plan in plans}.values())


def divisors(number: int) -> list[int]:
    """Every divisor, in order."""
    return [d for d in range(1, number + 1) if number % d == 0]


# -- what came out ----------------------------------------------------------------------------------------------------


def errors(rows: Sequence[Row]) -> dict[str, float | int | None]:
    """Mean absolute errors of some rows; of memory, of those where it was measured."""
    memory = [abs(row.memory_error) for row in rows if row.memory_error is not None]
    return {
        "plans": len(rows),
        "step_time": fmean(abs(row.time_error) for row in rows),
        "peak_memory": fmean(memory) if memory else None,
    }


def summary(rows: list[Row], scenarios: list[Scenario]) -> dict[str, Any]:
    """Every aim with what was reached; None where it was not measured."""
    rows = [row for row in rows if row.rounds_s]
    every = rows + [row for scenario in scenarios for row in scenario.measured]
    right = sum(scenario.regret <= CHOICE_WITHIN for scenario in scenarios)
    return {
        "plans": errors(rows) if rows else None,
        "all": errors(every) if every else None,
        "by_model": {m: errors([r for r in every if r.model == m]) for m in sorted({r.model for r in every})},
        "by_surroundings": {
            s: errors([r for r in every if r.surroundings == s]) for s in sorted({r.surroundings for r in every})
        },
        "choices": {"scenarios": len(scenarios), "right": right, "regrets": [s.regret for s in scenarios]},
        "slow_link_times_faster": times_faster(scenarios, "100 Mbit/s", 4),
        "unequal_times_faster": times_faster(scenarios, "half speed", 3),
    }


def times_faster(scenarios: list[Scenario], surroundings: str, devices: int) -> float | None:
    """The least speed of weft's choice over that of equal copies on so many devices in these surroundings."""
    found = [s.times_faster for s in scenarios if (s.surroundings, s.devices) == (surroundings, devices)]
    return min((value for value in found if value is not None), default=None)


def table_of_rows(rows: list[Row]) -> Table:
    """Predicted and measured, for people."""
    table = Table(title="Predicted and measured", title_justify="left")
    for name in ("model", "plan"):
        table.add_column(name)
    for name in ("step predicted", "measured", "off", "memory predicted", "measured", "off"):
        table.add_column(name, justify="right")
    for row in rows:
        if row.failed is not None:
            table.add_row(row.model, row.name, f"[red]{row.failed}[/red]")
            continue
        memory = ["", "", ""]
        if row.memory_error is not None:
            memory = [format_bytes(row.predicted_peak), format_bytes(row.peak), marked(row.memory_error, MEMORY_WITHIN)]
        table.add_row(
            row.model,
            row.name,
            format_seconds(row.predicted_s),
            format_seconds(row.step_s),
            marked(row.time_error, TIME_WITHIN),
            *memory,
        )
    return table


def table_of_scenarios(scenarios: list[Scenario]) -> Table:
    """Choices, for people."""
    table = Table(title="What weft chose, and the fastest of the plans measured", title_justify="left")
    for name in ("model", "processes", "surroundings", "chosen", "fastest"):
        table.add_column(name)
    for name in ("step", "slower by", "times as fast as equal copies", "plans"):
        table.add_column(name, justify="right")
    for s in scenarios:
        ratio = s.times_faster
        table.add_row(
            s.model,
            str(s.devices),
            s.surroundings,
            s.rows[0].name,
            s.fastest.name,
            format_seconds(s.rows[0].step_s) if s.rows[0].rounds_s else "failed",
            marked(s.regret, CHOICE_WITHIN),
            "" if ratio is None else f"{ratio:.2f}",
            str(len(s.measured)),
        )
    return table


def marked(error: float, within: float) -> str:
    """A share, red where it misses its aim."""
    return f"{error:+.1%}" if abs(error) <= within else f"[red]{error:+.1%}[/red]"


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parse.add_argument("--small", action="store_true", help="one small model, few plans: minutes")
    parse.add_argument("--rounds", type=int, help="of each plan (default 5, small 1)")
    parse.add_argument("--steps", type=int, help="timed steps of each round (default 5, small 3)")
    parse.add_argument("--only", choices=("plans", "scenarios"), help="half of it")
    parse.add_argument("--json", action="store_true", help="one JSON object on stdout, the tables on stderr")
    return parse


def main() -> None:
    arguments = parser().parse_args()
    small = arguments.small
    people = Console(stderr=arguments.json, width=None if sys.stdout.isatty() else 160)
    rounds, steps = arguments.rounds or (1 if small else 5), arguments.steps or (3 if small else 5)
    bench = Bench(SMALL_MODELS if small else MODELS, rounds, steps, people)
    rows = [] if arguments.only == "scenarios" else bench.plans(SMALL_PLANS if small else PLANS)
    reason = missing()
    wanted = [] if arguments.only == "plans" else SMALL_SCENARIOS if small else SCENARIOS
    possible = [scenario for scenario in wanted if reason is None or scenario[2] == PLAIN]
    if len(possible) < len(wanted):
        people.print(f"left out: {len(wanted) - len(possible)} scenarios; {reason}")
    scenarios = [bench.scenario(*scenario) for scenario in possible]
    every = rows + [row for scenario in scenarios for row in scenario.rows]
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "settings": {name: value for name, value in vars(arguments).items() if name != "json"},
        "summary": summary(rows, scenarios),
        "left_out": reason if len(possible) < len(wanted) else None,
        "plans": [row.to_json() for row in every if row.rounds_s],
        "scenarios": [scenario.to_json() for scenario in scenarios],
    }
    people.print(table_of_rows(every), table_of_scenarios(scenarios))
    people.print_json(json.dumps(result["summary"]))
    if len(sys.argv) == 1:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        people.print(f"kept in {RESULTS.relative_to(ROOT)}")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
