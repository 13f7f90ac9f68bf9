"""How well weft's predictions hold on one accelerator: step time and peak memory of Llamas of 0.3 to 8 billion
parameters, plain, recomputed, compiled and both, predicted from a measurement of the device in the same run, then
measured.

    python benchmarks/gpu.py              on a CUDA device; kept in benchmarks/results/gpu.json
    python benchmarks/gpu.py --only 1b    one size; its rows replace those that are kept
    python benchmarks/gpu.py --small      a tiny model in float32 on the CPU; kept nowhere

`bf16` rows have parameters, gradients and optimizer state in bfloat16; `autocast` rows are weft's own precision bf16,
where only operations are. Every row is a process of its own. Step time is the median of a few steps.
Memory is what tensors take at their fullest moment, as the caching allocator counts it: the prediction's allowances for
its fragments and for the driver are taken off before the two are compared, and stand in the kept results. A row that is
predicted not to fit is tried all the same on an accelerator, for one step: it should run out of memory.
The share of the matrix-multiply rate is that of the model's own operations, recomputed ones left out, in the largest
rate that was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from gpu_llama import SIZES
from hardware import machine
from rich.console import Console
from rich.table import Table

import weft
from weft.capture import Profile, capture
from weft.cluster import Cluster, presets
from weft.errors import WorkerError
from weft.estimate import Measurement
from weft.jobs.compare import measure_here, train_plan
from weft.plan import Plan
from weft.planner import estimate, make_plan
from weft.quantity import format_bytes, format_count, format_seconds
from weft.target import Target

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
TIME_WITHIN, MEMORY_WITHIN = 0.10, 0.05
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recompute": {"recompute": "full"},
    "compile": {"compile": True},
    "recompute, compile": {"recompute": "full", "compile": True},
}
DTYPES = {"bf16": ("bfloat16", "float32"), "autocast": ("float32", "bf16"), "float32": ("float32", "float32")}
"""Dtype of the parameters and ``Plan.precision``, by how a row is called."""

SHAPES = {"tiny": (64, 4), "0.3b": (2048, 8), "1b": (2048, 8), "3b": (2048, 4), "8b": (2048, 4)}
"""Tokens of a sample, and samples of a batch."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model trained in one way. Seconds of a step and bytes; None where it was not run.

    Attributes:
        size, numbers, way: keys of SIZES, DTYPES and WAYS.
        predicted_s, predicted_bytes: from what was measured of the device; bytes are those of tensors.
        preset_s: the same from the device's preset.
        needed_bytes: predicted with what the driver and the allocator take besides.
        measured_s, measured_bytes, reserved_bytes: seen; reserved is what the allocator held.
        share: of the measured matrix-multiply rate that the model's operations reach.
        left_out: why it was not run: it is predicted not to fit.
        overflowed: of a row left out, whether it did run out of memory when tried.
    """

    size: str
    numbers: str
    way: str
    predicted_s: float
    predicted_bytes: float
    preset_s: float
    needed_bytes: float
    measured_s: float | None = None
    measured_bytes: int | None = None
    reserved_bytes: int | None = None
    share: float | None = None
    left_out: str | None = None
    overflowed: bool | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from other rows."""
        return self.size, self.numbers, self.way

    @property
    def time_error(self) -> float | None:
        """Predicted over measured step time, less one."""
        return None if self.measured_s is None else self.predicted_s / self.measured_s - 1

    @property
    def memory_error(self) -> float | None:
        """Predicted over measured bytes, less one."""
        return None if self.measured_bytes is None else self.predicted_bytes / self.measured_bytes - 1


def trained(target: Target, plan: Plan, steps: int) -> tuple[Measurement, int | None]:
    """Inside a job: what steps cost, and what the caching allocator held at most."""
    measurement, _ = train_plan(target, plan, steps)
    return measurement, torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None


def model_flops(profile: Profile) -> float:
    """Floating-point operations of a step's products and attention, forward and backward, nothing recomputed."""
    every = (operation for call in profile.calls for operation in (*call.forward, *call.backward))
    return sum(operation.flops.at(profile.batch_size) for operation in every)


def tensors(needed: float, cluster: Cluster) -> float:
    """Of predicted bytes those of tensors: Measurement counts no others on an accelerator."""
    device = cluster.device
    return (needed - device.reserved_bytes) / (1 + device.allocator_share) if device.accelerator else needed


class Bench:
    """A device, measured, and its preset.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        steps: timed steps of every row.
    """

    def __init__(self, device: str, steps: int) -> None:
        self.device, self.steps = device, steps
        dtypes = ("float32",) if device == "cpu" else ("float32", "bfloat16")
        self.cluster: Cluster = weft.launch(measure_here, (), dtypes, devices=1, device=device)[0]
        name = presets.like(torch.cuda.get_device_name()) if device == "cuda" else None
        self.preset = Cluster.local(1) if name is None else Cluster.preset(name, nodes=1, devices_per_node=1)
        self._profiles: dict[tuple[str, str], tuple[Target, Profile]] = {}

    def profile(self, size: str, numbers: str) -> tuple[Target, Profile]:
        """A model and what it costs, captured once."""
        if (size, numbers) not in self._profiles:
            length, samples = SHAPES[size]
            arguments = {"size": size, "dtype": DTYPES[numbers][0], "length": str(length), "batch_size": str(samples)}
            target = Target.parse(str(Path(__file__).with_name("gpu_llama.py")), arguments)
            self._profiles[size, numbers] = target, capture(target.load(), DTYPES[numbers][1])
        return self._profiles[size, numbers]

    def row(self, size: str, numbers: str, way: str) -> Row:
        """One row, predicted, then measured."""
        target, profile = self.profile(size, numbers)
        plan = make_plan(profile, self.cluster, **WAYS[way])
        predicted = estimate(profile, self.cluster, plan)
        (needed,) = predicted.peak_memory_bytes
        row = Row(
            size=size,
            numbers=numbers,
            way=way,
            predicted_s=predicted.step_time_s,
            predicted_bytes=tensors(needed, self.cluster),
            preset_s=estimate(profile, self.preset, plan).step_time_s,
            needed_bytes=needed,
        )
        if needed > self.cluster.memory_bytes:
            left_out = f"needs {format_bytes(needed)} of {format_bytes(self.cluster.memory_bytes)}"
            overflowed = self.overflows(target, plan) if self.device != "cpu" else None
            return replace(row, left_out=left_out, overflowed=overflowed)
        found, reserved = weft.launch(trained, target, plan, self.steps, devices=1, device=self.device)[0]
        dtype = "float32" if numbers == "float32" else "bfloat16"
        rate = max(self.cluster.device.matmul[dtype].rates)
        return replace(
            row,
            measured_s=found.step_time_s,
            measured_bytes=max(found.peak_memory_bytes),
            reserved_bytes=reserved,
            share=model_flops(profile) / found.step_time_s / rate,
        )

    def overflows(self, target: Target, plan: Plan) -> bool:
        """Whether a plan really runs out of memory.

        Raises:
            WorkerError: it fails of something else.
        """
        try:
            weft.launch(trained, target, plan, 1, devices=1, device=self.device)
        except WorkerError as error:
            if "out of memory" not in str(error).lower():
                raise
            return True
        return False


def summary(rows: list[Row]) -> dict[str, Any]:
    """Mean absolute errors against what is aimed at, and whether all that was left out overflowed."""
    times = [abs(row.time_error) for row in rows if row.time_error is not None]
    memory = [abs(row.memory_error) for row in rows if row.memory_error is not None]
    fits = [row.overflowed for row in rows if row.overflowed is not None]
    time_error, memory_error = (fmean(errors) if errors else None for errors in (times, memory))
    return {
        "time_error": time_error,
        "memory_error": memory_error,
        "met": {
            "time": time_error is not None and time_error <= TIME_WITHIN,
            "memory": memory_error is not None and memory_error <= MEMORY_WITHIN,
            "left out": all(fits),
        },
    }


def table_of(rows: list[Row]) -> Table:
    """One line per row."""
    table = Table(title="predicted from the measured device, then measured", title_justify="left")
    for column in ("model", "numbers", "way"):
        table.add_column(column)
    for column in ("step", "measured", "error", "by preset", "memory", "measured", "error", "of matmul rate"):
        table.add_column(column, justify="right")
    for row in rows:
        common = (row.size, row.numbers, row.way, format_seconds(row.predicted_s))
        preset, memory = format_seconds(row.preset_s), format_bytes(row.predicted_bytes)
        if row.measured_s is None or row.measured_bytes is None:
            tried = {True: "ran out of memory when tried", False: "DID fit when tried", None: ""}[row.overflowed]
            table.add_row(*common, "left out", "", preset, memory, "", "", f"{row.left_out} {tried}".strip())
            continue
        table.add_row(
            *common, format_seconds(row.measured_s), f"{row.time_error:+.1%}", preset,
            memory, format_bytes(row.measured_bytes), f"{row.memory_error:+.1%}", f"{row.share:.0%}",
        )  # fmt: skip
    return table


def wanted(arguments: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Size, numbers and way of every row to be run."""
    if arguments.small:
        rows = [("tiny", "float32", way) for way in WAYS] + [("8b", "float32", "plain")]
    else:
        rows = [(size, "bf16", way) for size in SIZES if size != "tiny" for way in WAYS]
        rows += [(size, "autocast", way) for size in ("0.3b", "1b", "8b") for way in ("plain", "recompute")]
    return [
        row
        for row in rows
        if (not arguments.only or row[0] in arguments.only) and (not arguments.way or row[2] in arguments.way)
    ]


def keep(rows: list[Row], about: dict[str, Any]) -> list[Row]:
    """Write the results; rows of the same hardware and versions that were not run again stay. All of them."""
    old: list[Row] = []
    if RESULTS.exists():
        kept = json.loads(RESULTS.read_text())
        if kept["machine"] == about["machine"]:
            old = [Row(**row) for row in kept["rows"] if tuple(row[k] for k in ("size", "numbers", "way"))
                   not in {row.key for row in rows}]  # fmt: skip
    every = [*old, *rows]
    result = {**about, "summary": summary(every), "rows": [asdict(row) for row in every]}
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    return every


def main() -> None:
    parse = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parse.add_argument("--small", action="store_true", help="a tiny model on the CPU")
    parse.add_argument("--only", action="append", choices=list(SIZES), help="a size; may be repeated")
    parse.add_argument("--way", action="append", choices=list(WAYS), help="may be repeated")
    parse.add_argument("--steps", type=int, default=8, help="timed steps of each row (default %(default)s)")
    parse.add_argument("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    arguments = parse.parse_args()
    people = Console(stderr=arguments.json, width=None if sys.stdout.isatty() else 160)
    if not arguments.small and not torch.cuda.is_available():
        parse.error("there is no CUDA device here; --small runs a tiny model on the CPU")
    bench = Bench("cpu" if arguments.small else "cuda", arguments.steps)
    rates = {dtype: max(curve.rates) for dtype, curve in bench.cluster.device.matmul.items()}
    found = ", ".join(f"{dtype} {format_count(rate, 'flop/s')}" for dtype, rate in rates.items())
    people.print(f"{bench.cluster.name}: {format_bytes(bench.cluster.memory_bytes)}; matrix products reach {found}")
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine() | {"cuda": torch.version.cuda},
        "settings": {"steps": arguments.steps, "shapes": SHAPES},
        "matmul_flops_per_s": rates,
        "memory_bytes": bench.cluster.memory_bytes,
        "aims": {"time": TIME_WITHIN, "memory": MEMORY_WITHIN},
    }
    rows: list[Row] = []
    for what in wanted(arguments):
        rows.append(bench.row(*what))
        people.print(table_of(rows[-1:]) if people.is_terminal else f"{', '.join(what)}: done", style="dim")
        if not arguments.small:
            keep(rows, about)  # row by row: a device may be lent for minutes only
    people.print(table_of(rows))
    told = summary(rows)
    for what, within in (("time", TIME_WITHIN), ("memory", MEMORY_WITHIN)):
        error = told[f"{what}_error"]
        people.print(
            f"{what}: {'nothing measured' if error is None else f'{error:.1%} mean absolute error'}, aim {within:.0%}"
        )
    people.print("not kept: --small" if arguments.small else f"kept in {RESULTS.relative_to(ROOT)}")
    if arguments.json:
        print(json.dumps({**about, "summary": told, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
