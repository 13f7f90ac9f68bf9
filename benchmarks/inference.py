"""Inference under a plan against what one writes without one, on this machine.

    python benchmarks/inference.py                      everything; minutes
    python benchmarks/inference.py --only pipeline
    python benchmarks/inference.py --small              seconds

    pipeline   tokens/s of decoding on two stages, against two processes that hand activations over, as accelerate's
               device_map places a model: one of them works at a time. Prompts are long, so that most of a step is
               reading the cache, which two groups of sequences share out; ``short`` ones let the reading of weights
               and Python weigh more, which they do not
    replicas   samples/s of predictions of some batches on two replicas, against one process; each batch is cut into the
               microbatches that weft chooses for the machine as it measures it. A ``narrow`` model multiplies less for
               what it reads, and reading is what two cores of one machine share
    single     tokens/s of generation in one process, against transformers' generate

The two sides take turns in the same processes, on the same weights and prompts, the order changing every round; a
round's time is the slowest process's, and the ratio is the median of the rounds'. Tokens that differ are an error.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hardware import machine
from inference_sides import Sizes, pipeline, plan_of, replicas, single
from rich.console import Console
from rich.table import Table

import weft.cluster
from weft.cluster import Cluster
from weft.runtime.pool import Pool

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "inference.json"
AIMS = {"pipeline": 1.6, "pipeline, short": 1.6, "replicas": 1.85, "replicas, narrow": 1.85, "single": 1.0}
TABLE_WIDTH = 120  # where nobody says how wide: a pipe, a file
SMALL = Sizes(layers=2, hidden=64, heads=4, sequences=4, prompt=16, tokens=8, samples=8, batches=2, rounds=2)


CASES: dict[str, tuple[Callable[..., Any], dict[str, int], dict[str, int]]] = {  # degrees, and other sizes
    "pipeline": (pipeline, {"pp": 2, "microbatches": 2}, {}),
    "pipeline, short": (pipeline, {"pp": 2, "microbatches": 2}, {"prompt": 32}),
    "replicas": (replicas, {"dp_replicate": 2}, {"prompt": 256, "hidden": 512, "batches": 3}),
    "replicas, narrow": (replicas, {"dp_replicate": 2}, {"prompt": 256}),
    "single": (single, {}, {"prompt": 64}),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A case.

    Attributes:
        weft_s, without_s: seconds of every round.
        ratio: how many times as fast weft is, the median of the rounds.
    """

    name: str
    plan: str
    weft_s: list[float]
    without_s: list[float]
    ratio: float
    aim: float

    @property
    def met(self) -> bool:
        """Whether it is as fast as it should be."""
        return self.ratio >= self.aim


def measure_cluster() -> Cluster:
    """Run by every process: what it computes on."""
    return weft.cluster.measure()


def measure(name: str, sizes: Sizes, pool: Pool) -> Row:
    """One case."""
    case, degrees, other = CASES[name]
    if sizes != SMALL:
        sizes = replace(sizes, **other)
    cluster = pool.run(measure_cluster)[0] if case is replicas else None
    plan = plan_of(sizes, cluster, **degrees)
    seconds = pool.run(case, sizes, plan, ranks=plan.devices)[0]
    ratio = statistics.median(b / a for a, b in zip(seconds["weft"], seconds["without"], strict=True))
    return Row(
        name=name,
        plan=f"{plan.describe()} x{plan.microbatches}",
        weft_s=seconds["weft"],
        without_s=seconds["without"],
        ratio=ratio,
        aim=AIMS[name],
    )


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, help="one case")
    parser.add_argument("--small", action="store_true", help="a small model, a few rounds, nothing kept")
    parser.add_argument("--rounds", type=int)
    given = parser.parse_args()
    sizes = SMALL if given.small else Sizes()
    sizes = Sizes(**{**asdict(sizes), **({"rounds": given.rounds} if given.rounds else {})})
    with Pool(2, device="cpu") as pool:
        rows = [measure(name, sizes, pool) for name in CASES if given.only in (None, name)]
    console = Console(width=None if Console().is_terminal else TABLE_WIDTH)
    table = Table("case", "plan", "weft s", "without s", "times as fast", "aim", "met", title="inference, medians")
    for row in rows:
        seconds = (f"{statistics.median(s):.3f}" for s in (row.weft_s, row.without_s))
        met = "yes" if row.met else "no"
        table.add_row(row.name, row.plan, *seconds, f"{row.ratio:.2f}", f"{row.aim:.2f}", met)
    console.print(table)
    if not given.small and given.only is None:
        kept = {
            "when": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
            "sizes": asdict(sizes),
            "rows": [asdict(row) | {"met": row.met} for row in rows],
        }
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        console.print(f"kept in {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
