"""weft against the same plan written by hand in plain PyTorch: step time and peak memory, on this machine.

    python benchmarks/handwritten.py                      every plan; minutes
    python benchmarks/handwritten.py --only pp=2 --rounds 40

The two sides take turns in the same processes, on the same batches from the same weights, the order changing every
round. A round's times are the slowest process's, and the throughput ratio is the median over rounds of hand's time over
weft's, so that whatever else the machine does slows both. Peak memory is measured apart, each side in fresh processes.
Losses that differ are an error: a step that computes something else is not faster.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import trainers
from hardware import machine
from rich.console import Console
from rich.table import Table

import weft
from weft.plan import TensorStyle
from weft.quantity import format_bytes, format_seconds
from weft.runtime import memory
from weft.runtime.launch import launch
from weft.runtime.pool import Pool
from weft.runtime.worker import join

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "handwritten.json"
HAND, WEFT = "hand", "weft"
THROUGHPUT_AT_LEAST = 0.97
MEMORY_AT_MOST = 1.05
LOSS_TOLERANCE = 1e-4  # relative, float32
WARMUP = 3
MEMORY_STEPS = 3
TABLE_WIDTH = 150  # where nobody says how wide: a pipe, a file
Series = dict[str, list[float]]
PLANS: list[tuple[str, dict[str, int]]] = [
    ("DistributedDataParallel", {"dp_replicate": 2}),
    ("DistributedDataParallel", {"dp_replicate": 4}),
    ("fully_shard", {"dp_shard": 2}),
    ("fully_shard", {"dp_shard": 4}),
    ("DTensor styles", {"tp": 2}),
    ("PipelineStage, Schedule1F1B", {"pp": 2}),
    ("fully_shard x DTensor styles", {"dp_shard": 2, "tp": 2}),
]


@dataclass(frozen=True, kw_only=True)
class Size:
    """The example's arguments."""

    layers: int = 8
    hidden: int = 256
    batch_size: int = 32


@dataclass(frozen=True, kw_only=True)
class Row:
    """One plan, measured: the median time of the slowest process, the memory of the fullest above its baseline."""

    plan: str
    by_hand: str
    throughput_ratio: float | None = None
    throughput_quartiles: list[float] | None = None
    memory_ratio: float | None = None
    loss_deviation: float | None = None
    step_s: dict[str, float]
    peak_memory_bytes: dict[str, int]
    losses: Series


def plan_of(size: Size, degrees: dict[str, int], microbatches: int) -> weft.Plan:
    """The plan both sides run: blocks halved over two stages, attention and MLP divided over their features."""
    calls = ["token", "position", *(f"blocks.{i}" for i in range(size.layers)), "norm", "head"]
    cut = 2 + size.layers // 2
    column = ("attention.query", "attention.key", "attention.value", "mlp.0")
    styles = {**dict.fromkeys(column, "colwise"), "attention.out": "rowwise", "mlp.2": "rowwise"}
    return weft.Plan(
        **degrees,
        stages=(tuple(calls[:cut]), tuple(calls[cut:])) if "pp" in degrees else (tuple(calls),),
        tensor={f"blocks.{i}.{name}": TensorStyle(style) for i in range(size.layers) for name, style in styles.items()}
        if "tp" in degrees
        else {},
        microbatches=microbatches if "pp" in degrees else 1,
        batch_size=size.batch_size,
    )


def example(size: Size) -> weft.Workload:
    """The example's workload."""
    sys.path.insert(0, str(ROOT / "examples"))
    import code_lm

    return code_lm.workload(**asdict(size))


def step_of(side: str, workload: weft.Workload, plan: weft.Plan) -> trainers.Step:
    """One side's training step: it takes the global batch and gives the global mean loss."""
    if side == HAND:
        return trainers.build(workload, plan, join())
    engine = weft.parallelize(workload, plan)
    return lambda batch: float(engine.step(batch))


def batches(workload: weft.Workload, count: int) -> list[Any]:
    """Global batches, made before anything is timed."""
    size = workload.batch_size
    return [workload.collate([workload.data[b * size + i] for i in range(size)]) for b in range(count)]


def race(size: Size, plan: weft.Plan, sides: list[str], rounds: int) -> tuple[Series, Series]:
    """In every process: the sides in turn. Returns each side's seconds per round (the slowest process), and losses."""
    workload = example(size)
    steps = {side: step_of(side, workload, plan) for side in sides}
    seconds: Series = {side: [] for side in sides}
    losses: Series = {side: [] for side in sides}
    for i, batch in enumerate(batches(workload, WARMUP + rounds)):
        for side in sides if i % 2 else reversed(sides):
            took, loss = timed(steps[side], batch)
            losses[side].append(loss)
            if i >= WARMUP:
                seconds[side].append(took)
    return seconds, losses


def timed(step: Callable[[Any], float], batch: Any) -> tuple[float, float]:
    """Seconds of one step on the slowest process, and its loss."""
    dist.barrier()
    start = time.perf_counter()
    loss = step(batch)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    took = torch.tensor(time.perf_counter() - start, device=join())
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return took.item(), loss


def peak(size: Size, plan: weft.Plan, side: str) -> int:
    """In every process: bytes at the peak of a few steps above what the process used before it had a model."""
    workload = example(size)
    held = batches(workload, MEMORY_STEPS)
    used = memory.of(join())
    step = step_of(side, workload, plan)
    for batch in held:
        step(batch)
    return used.peak()


def measure(pool: Pool, what: str, degrees: dict[str, int], arguments: argparse.Namespace, sides: list[str]) -> Row:
    """One row of the table."""
    size = Size(layers=arguments.layers, hidden=arguments.hidden, batch_size=arguments.batch_size)
    plan = plan_of(size, degrees, arguments.microbatches)
    seconds, losses = pool.run(race, size, plan, sides, arguments.rounds, ranks=plan.devices)[0]
    row = Row(
        plan=plan.describe(),
        by_hand=what,
        step_s={side: statistics.median(seconds[side]) for side in sides},
        peak_memory_bytes={side: max(launch(peak, size, plan, side, devices=plan.devices)) for side in sides},
        losses=losses,
    )
    return row if len(sides) < 2 else compared(row, seconds)


def compared(row: Row, seconds: Series) -> Row:
    """The row with its ratios.

    Raises:
        SystemExit: the two sides' losses differ.
    """
    hand, woven = row.losses[HAND], row.losses[WEFT]
    deviation = max(abs(w - h) / abs(h) for h, w in zip(hand, woven, strict=True))
    if not deviation <= LOSS_TOLERANCE:
        raise SystemExit(f"{row.plan}: losses differ by {deviation:.1e} of their size: hand {hand}, weft {woven}")
    ratios = [h / w for h, w in zip(seconds[HAND], seconds[WEFT], strict=True)]
    return Row(
        **{
            **asdict(row),
            "throughput_ratio": statistics.median(ratios),
            "throughput_quartiles": statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2,
            "memory_ratio": row.peak_memory_bytes[WEFT] / row.peak_memory_bytes[HAND],
            "loss_deviation": deviation,
        }
    )


def table_of(rows: list[Row], title: str) -> Table:
    """The rows for people; a ratio that misses its aim is red. Quartiles of the rounds stand beside their median."""
    table = Table(title=title, title_justify="left", caption="ratios are weft / by hand", caption_justify="left")
    table.add_column("plan")
    table.add_column("by hand with")
    for name in (
        "step",
        "weft's",
        f"throughput >= {THROUGHPUT_AT_LEAST}",
        "peak",
        "weft's",
        f"memory <= {MEMORY_AT_MOST}",
    ):
        table.add_column(name, justify="right")
    table.add_column("losses apart", justify="right")
    for row in rows:
        throughput = space = apart = ""
        if row.throughput_ratio is not None:
            low, high = row.throughput_quartiles or (0.0, 0.0)
            throughput = (
                f"{marked(row.throughput_ratio, row.throughput_ratio >= THROUGHPUT_AT_LEAST)} {low:.2f}..{high:.2f}"
            )
        if row.memory_ratio is not None:
            space = marked(row.memory_ratio, row.memory_ratio <= MEMORY_AT_MOST)
        if row.loss_deviation is not None:
            apart = f"{row.loss_deviation:.0e}"
        step = [format_seconds(row.step_s[side]) if side in row.step_s else "" for side in (HAND, WEFT)]
        peaks = [format_bytes(row.peak_memory_bytes[s]) if s in row.peak_memory_bytes else "" for s in (HAND, WEFT)]
        table.add_row(row.plan, row.by_hand, *step, throughput, *peaks, space, apart)
    return table


def marked(ratio: float, holds: bool) -> str:
    """The ratio, red where it misses its aim."""
    return f"{ratio:.3f}" if holds else f"[red]{ratio:.3f}[/red]"


def words(degrees: dict[str, int]) -> str:
    """``dp_shard=2 tp=2``, as a plan describes itself."""
    return " ".join(f"{name}={degree}" for name, degree in degrees.items())


def parser() -> argparse.ArgumentParser:
    every = [words(degrees) for _, degrees in PLANS]
    size = Size()
    parse = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parse.add_argument("--only", choices=every, action="append", metavar="PLAN", help=f"one of: {'; '.join(every)}")
    parse.add_argument("--rounds", type=int, default=20, help="timed rounds of each plan (default %(default)s)")
    parse.add_argument("--layers", type=int, default=size.layers)
    parse.add_argument("--hidden", type=int, default=size.hidden)
    parse.add_argument("--batch-size", type=int, default=size.batch_size, help="global, in samples")
    parse.add_argument("--microbatches", type=int, default=8, help="of the pipeline (default %(default)s)")
    parse.add_argument("--side", choices=(HAND, WEFT, "both"), default="both", help="measure one side alone")
    parse.add_argument("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    return parse


def main() -> None:
    arguments = parser().parse_args()
    sides = [HAND, WEFT] if arguments.side == "both" else [arguments.side]
    chosen = [(what, degrees) for what, degrees in PLANS if not arguments.only or words(degrees) in arguments.only]
    people = Console(stderr=arguments.json)
    people.width = max(people.width, TABLE_WIDTH if not people.is_terminal else 0)
    rows = []
    processes = max(math.prod(degrees.values()) for _, degrees in chosen)
    with Pool(processes) as pool, Console(stderr=True).status("") as status:
        for what, degrees in chosen:
            status.update(f"{words(degrees)}: {what} against weft")
            rows.append(measure(pool, what, degrees, arguments, sides))
    size = f"layers={arguments.layers} hidden={arguments.hidden} batch_size={arguments.batch_size}"
    people.print(table_of(rows, f"examples/code_lm.py {size}, {arguments.rounds} rounds"))
    settings = {name: value for name, value in vars(arguments).items() if name != "json"}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    result = {"date": date, "machine": machine(), "settings": settings, "rows": [asdict(row) for row in rows]}
    if settings == {name: value for name, value in vars(parser().parse_args([])).items() if name != "json"}:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")
        people.print(f"kept in {RESULTS.relative_to(ROOT)}")
    else:
        people.print("not kept: only a run without options is")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
