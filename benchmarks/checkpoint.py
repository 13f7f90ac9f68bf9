"""Checkpoints against ``torch.distributed.checkpoint`` called by hand, and how long training stands still for one.

    python benchmarks/checkpoint.py             two processes, a GPT of 50 million parameters with AdamW's state
    python benchmarks/checkpoint.py --small     seconds, nothing kept

    save, load    the same tensors under the same plan, by both, in turns, in the same processes, until the disk has
                  them; weft's are with checksums, which loading compares
    stall         seconds that steps take longer while a checkpoint is written beside them, the copy included, against
                  the seconds of a save that is waited for

A ratio is the median of the rounds'. Under dp_shard=2 each process has half of everything.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hardware import machine
from rich.console import Console
from rich.table import Table

import weft
from weft.capture import capture
from weft.cluster import Cluster
from weft.planner import make_plan
from weft.runtime.pool import Pool
from weft.target import Target

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "checkpoint.json"
TARGET = str(ROOT / "examples" / "code_lm.py")
AIMS = {"save": 1.1, "load": 1.1, "stall": 0.1}
STEPS_BESIDE = 6
"""Steps that are timed with a checkpoint on its way, and without."""


def timed(run: Callable[[], object]) -> float:
    """Seconds of something, on the slowest process."""
    dist.barrier()
    began = time.perf_counter()
    run()
    took = torch.tensor(time.perf_counter() - began)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took)


def by_hand(engine: Any) -> dict[str, Any]:
    """What one gives torch.distributed.checkpoint: model and optimizer, as fully_shard and DTensor have them."""
    state: dict[str, Any] = {f"model.{held.name}": held.parameter.detach() for held in engine.part.held}
    for held in engine.part.held:
        for key, value in engine.optimizer.state[held.parameter].items():
            state[f"optimizer.{held.name}.{key}"] = value
    return state


def rounds_here(arguments: dict[str, str], plan: weft.Plan, rounds: int, directory: Path) -> dict[str, list[float]]:
    """Everything, in a process of the job."""
    from torch.distributed.checkpoint import load, save

    engine = weft.parallelize(Target.parse(TARGET, arguments).load(), plan)
    batches = engine.batches(epochs=None)
    found: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        found.setdefault(name, []).append(seconds)

    def steps() -> None:
        for _ in range(STEPS_BESIDE):
            engine.step(next(batches))

    steps()
    state = by_hand(engine)
    sides: dict[str, Callable[[Path], tuple[Callable[[], object], Callable[[], object]]]] = {
        "weft": lambda path: (lambda: engine.save(path), lambda: engine.load(path)),
        "torch": lambda path: (lambda: save(state, checkpoint_id=path), lambda: load(state, checkpoint_id=path)),
    }
    for number in range(rounds + 1):
        for name in sorted(sides, reverse=bool(number % 2)):
            path = directory / f"{name}-{number}"
            saves, loads = sides[name](path)
            seconds = timed(saves), timed(loads)
            if number:  # the first opens connections and makes room
                note(f"save, {name}", seconds[0])
                note(f"load, {name}", seconds[1])
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(path)
        alone = timed(steps)

        def beside(path: Path = directory / f"beside-{number}") -> None:
            engine.save(path, wait=False)
            steps()

        together = timed(beside)
        engine.finish_saving()
        if number:
            note("steps alone", alone)
            note("steps beside a save", together)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(directory / f"beside-{number}")
    found["bytes"] = [float(sum(t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes for t in state.values()))]
    return found


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small model, nothing kept")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", help="where to write; default: this directory's disk")
    given = parser.parse_args()
    arguments = {"layers": "2", "hidden": "64"} if given.small else {"layers": "16", "hidden": "512", "batch_size": "4"}
    plan = make_plan(capture(Target.parse(TARGET, arguments).load()), Cluster.local(2), dp_shard=2)
    place = given.directory or Path.cwd()
    with tempfile.TemporaryDirectory(dir=place, prefix="checkpoints-") as directory, Pool(2, device="cpu") as pool:
        found = pool.run(rounds_here, arguments, plan, given.rounds, Path(directory))[0]
    median = {name: statistics.median(values) for name, values in found.items()}
    ratios = {
        what: statistics.median(a / b for a, b in zip(found[f"{what}, weft"], found[f"{what}, torch"], strict=True))
        for what in ("save", "load")
    }
    pairs = zip(found["steps beside a save"], found["steps alone"], strict=True)
    ratios["stall"] = statistics.median(a - b for a, b in pairs) / median["save, weft"]
    table = Table(
        "", "seconds", "ratio", "aim", "met", title=f"{2 * median.pop('bytes') / 1e6:.0f} MB on two processes"
    )
    for what, ratio in ratios.items():
        told = f"{median.get(f'{what}, weft', ratio * median['save, weft']):.3f}"
        told += f" / {median[f'{what}, torch']:.3f}" if what != "stall" else f" / {median['save, weft']:.3f}"
        table.add_row(what, told, f"{ratio:.2f}", f"{AIMS[what]:.2f}", "yes" if ratio <= AIMS[what] else "no")
    Console(width=None if Console().is_terminal else 120).print(table)
    if not given.small:
        kept = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "target": arguments,
            "aims": AIMS,
            "ratios": ratios,
            "seconds": found,
        }
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
