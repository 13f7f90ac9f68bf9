"""Checkpoints against ``torch.distributed.checkpoint`` called by hand, and how long training stands still for one.

    python benchmarks/checkpoint.py             two processes, a GPT of 50 million parameters with AdamW's state
    python benchmarks/checkpoint.py --small     seconds, nothing kept

    save, load    the same tensors under the same plan, by both, in turns, in the same processes, until the disk has
                  them; weft's are with checksums, which loading compares
    stall         seconds that training stands still for a checkpoint that is written beside it (in the call, and where
                  the optimizer waits for copies), against the seconds of a save that is waited for
    loss          seconds that the steps beside it take longer in all, which is also for the memory and the disk that
                  both use: of one process, whose thread has a core to itself; and of two on two cores, where all that
                  the threads do is taken from training; no aims

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
STEPS_BESIDE = 4
"""Steps that are timed with a checkpoint on its way, and without. Short ones, and more than a save takes."""


def plan_of(arguments: dict[str, str], devices: int) -> weft.Plan:
    """One device, or every process with a part of everything."""
    return make_plan(capture(Target.parse(TARGET, arguments).load()), Cluster.local(devices), dp_shard=devices)


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

    engine.step(next(batches))
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
    found["bytes"] = [float(sum(t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes for t in state.values()))]
    return found


def stalls_here(arguments: dict[str, str], plan: weft.Plan, rounds: int, directory: Path) -> dict[str, list[float]]:
    """Seconds of a save that is waited for, and that training loses by one that is not, in a process of the job."""
    engine = weft.parallelize(Target.parse(TARGET, arguments).load(), plan)
    batches = engine.batches(epochs=None)
    found: dict[str, list[float]] = {"blocking": [], "stood": [], "lost": [], "step": []}
    stood, settle = [0.0], engine._saver.settle

    def still(run: Callable[[], object]) -> None:
        began = time.perf_counter()
        run()
        stood[0] += time.perf_counter() - began

    engine._saver.settle = lambda: still(settle)

    def steps() -> None:
        for _ in range(STEPS_BESIDE):
            engine.step(next(batches))

    def steps_beside() -> None:
        stood[0] = 0.0
        still(lambda: engine.save(directory, keep=1, wait=False))
        steps()

    steps()
    for number in range(rounds + 1):
        blocking = timed(lambda: engine.save(directory, keep=1))
        before, beside = timed(steps), timed(steps_beside)
        seconds = stood[0]
        engine.finish_saving()
        alone = (before + timed(steps)) / 2
        if number:
            found["blocking"].append(blocking)
            found["stood"].append(seconds)
            found["lost"].append(beside - alone)
            found["step"].append(alone / STEPS_BESIDE)
    return found


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small model, nothing kept")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", help="where to write; default: this directory's disk")
    given = parser.parse_args()
    arguments = {"layers": "2", "hidden": "64"} if given.small else {"layers": "16", "hidden": "512", "batch_size": "4"}
    short = arguments | {"batch_size": "2", "context": "32"}  # steps of less than a save's seconds
    place = given.directory or Path.cwd()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=place, prefix="checkpoints-") as directory:
        for devices, name in ((1, "one process"), (2, "two processes")):
            plan = plan_of(short, devices)
            with Pool(devices, device="cpu") as pool:
                rows = pool.run(stalls_here, short, plan, 2 * given.rounds, Path(directory, name))[0]
            found |= {f"{name}, {what}": values for what, values in rows.items()}
        with Pool(2, device="cpu") as pool:
            found |= pool.run(rounds_here, arguments, plan_of(arguments, 2), given.rounds, Path(directory))[0]
    size = 2 * found.pop("bytes")[0]
    sides = {what: (found[f"{what}, weft"], found[f"{what}, torch"]) for what in ("save", "load")}
    for name in ("one process", "two processes"):
        for what, key in (("stall", "stood"), ("loss", "lost")):
            sides[f"{what}, {name}"] = found[f"{name}, {key}"], found[f"{name}, blocking"]
    ratios = {
        what: statistics.median(ours / theirs for ours, theirs in zip(*pair, strict=True))
        for what, pair in sides.items()
    }
    table = Table("", "seconds", "ratio", "aim", "met", title=f"{size / 1e6:.0f} MB")
    for what, ratio in ratios.items():
        seconds = " / ".join(f"{statistics.median(values):.3f}" for values in sides[what])
        aim = AIMS.get(what.partition(",")[0])
        met = "" if aim is None else "yes" if ratio <= aim else "no"
        table.add_row(what, seconds, f"{ratio:.2f}", "" if aim is None else f"{aim:.2f}", met)
    Console(width=None if Console().is_terminal else 120).print(table)
    if not given.small:
        kept = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "target": arguments,
            "aims": AIMS,
            "ratios": ratios,
            "bytes": size,
            "seconds": found,
        }
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
