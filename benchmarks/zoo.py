"""Coverage: which architectures weft trains under which plans, next to PyTorch's own ``pipeline()``.

    python benchmarks/zoo.py                                  all of them; writes docs/coverage.md and results/zoo.json
    python benchmarks/zoo.py --only 'causal/l*' --kinds pp=2,tp=2     some of them; prints only
    python benchmarks/zoo.py --resume                         continue from results/zoo.json
    python benchmarks/zoo.py --resume --again                 and run what failed there once more

Every architecture is built small (``zoo_models``) and trained one step on one process and under every kind of plan,
with real processes over Gloo, in float32. It counts for a kind where the loss and every gradient are one device's (1e-4
of the norm) and the plan really divided something: a stage holds only what its own calls read, and no process holds
more than 0.65 of the bytes that two should halve. What does not run on one process is listed, and not counted.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import queue
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))  # for the workers

import zoo_job  # noqa: E402  # after the path is set
import zoo_models  # noqa: E402
import zoo_pipeline  # noqa: E402
import zoo_report  # noqa: E402

from weft.errors import WorkerError  # noqa: E402
from weft.runtime.pool import Pool  # noqa: E402

RESULTS = HERE / "results" / "zoo.json"
PAGE = HERE.parent / "docs" / "coverage.md"
KINDS: dict[str, dict[str, int]] = {
    "pp=2": {"pp": 2},
    "pp=3": {"pp": 3},
    "tp=2": {"tp": 2},
    "dp_shard=2": {"dp_shard": 2},
    "pp=2 dp_replicate=2": {"pp": 2, "dp_replicate": 2},
    "pp=2 tp=2": {"pp": 2, "tp": 2},
}
BASELINE = "pipeline()"
PROCESSES = 4


class Failed(str):
    """Why a run gave no result."""


@dataclass
class Survey:
    """What to run, and what is known so far.

    Attributes:
        kinds: names of the kinds of plan, and BASELINE.
        timeout: seconds a run may take.
        path: where results are written after every architecture; None where they are not kept.
        results: by name of the architecture: ``recipe``, ``one_process`` (why it does not run there, or ""), and
            ``kinds``: why each does not count, or "", and ``float64``: those that float64 showed to be equal.
    """

    kinds: list[str]
    timeout: int
    path: Path | None
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def missing(self, name: str, again: bool) -> list[str]:
        """Kinds of an architecture that are still to run."""
        known = self.results.get(name)
        if known is None:
            return self.kinds
        if known["one_process"]:
            return self.kinds if again else []
        return [kind for kind in self.kinds if kind not in known["kinds"] or (again and known["kinds"][kind])]

    def run(self, pool: Pool, name: str, kinds: list[str]) -> dict[str, Any]:
        """One architecture under some kinds."""
        known = self.results.get(name, {"kinds": {}})
        plans = {kind: KINDS[kind] for kind in kinds if kind in KINDS}
        prepared = self._call(pool, 1, zoo_job.prepare, zoo_job.Case(name, known.get("recipe")), plans)
        if isinstance(prepared, Failed):  # not the model's own doing, as far as anybody knows
            return {"recipe": known.get("recipe"), "one_process": "", "kinds": dict.fromkeys(kinds, prepared)}
        if isinstance(prepared, str):
            return {"recipe": None, "one_process": zoo_report.shorten(prepared), "kinds": {}}
        case = zoo_job.Case(name, prepared.recipe)
        found, rounded = dict(known["kinds"]), set(known.get("float64", [])) - set(kinds)
        for kind in kinds:
            plan = prepared.plans.get(kind)
            if kind == BASELINE:
                found[kind] = self._call(pool, 2, zoo_pipeline.run, case)
            elif isinstance(plan, str):
                found[kind] = zoo_report.shorten(plan)
            else:
                found[kind], in_float64 = self._check(pool, case, plan, prepared)
                rounded |= {kind} if in_float64 else set()
        return {"recipe": prepared.recipe, "one_process": "", "kinds": found, "float64": sorted(rounded)}

    def _check(self, pool: Pool, case: Any, plan: Any, prepared: Any) -> tuple[str, bool]:
        """Why a plan does not count, or "", and whether it took float64 to show that it does."""
        told = self._call(pool, plan.devices, zoo_job.check, case, plan, prepared, "float32")
        if isinstance(told, str) or not told[0]:
            return (told if isinstance(told, str) else told[1]), False
        again = self._call(pool, plan.devices, zoo_job.check, case, plan, prepared, "float64")
        equal = not isinstance(again, str) and not again[0]
        return (told[1] if equal else told[0]), equal and not told[1]

    def _call(self, pool: Pool, ranks: int, function: Any, *arguments: Any) -> Any:
        """What rank 0 returned, or why it did not."""
        start = time.monotonic()
        try:
            return pool.run(function, *arguments, self.timeout, ranks=ranks)[0]
        except Exception as error:  # whatever became of the processes is this case's result, and no other's
            if time.monotonic() - start >= self.timeout:
                return Failed(f"no result within {self.timeout} s")
            return Failed(zoo_report.shorten(error.cause if isinstance(error, WorkerError) else zoo_job.line(error)))

    def keep(self, name: str, result: dict[str, Any]) -> None:
        """Note a result, and write all."""
        with self.lock:
            self.results[name] = result
            if self.path:
                part = self.path.with_suffix(".part")
                part.write_text(json.dumps(zoo_report.to_json(self.results), indent=1) + "\n")
                part.rename(self.path)


def serve(survey: Survey, work: queue.SimpleQueue[tuple[int, str, list[str]] | None], total: int) -> None:
    """Run architectures until there are none left, in a pool of this thread's own."""
    with Pool(PROCESSES, device="cpu", timeout_s=survey.timeout) as pool:
        while (item := work.get()) is not None:
            place, name, kinds = item
            start = time.monotonic()
            result = survey.run(pool, name, kinds)
            survey.keep(name, result)
            marks = [
                f"{kind} {'FAILS' if result['kinds'][kind] else 'ok'}" for kind in kinds if kind in result["kinds"]
            ]
            text = ", ".join(marks) or f"does not run on one process: {result['one_process']}"
            print(f"[{place}/{total}] {name}: {text} ({time.monotonic() - start:.0f} s)", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", help="names that match, as 'causal/*'; nothing is written")
    parser.add_argument("--kinds", help=f"comma-separated, of {', '.join([*KINDS, BASELINE])}; 'pp2xtp2' is pp=2 tp=2")
    parser.add_argument("--resume", action="store_true", help="keep the results that are there, run what is missing")
    parser.add_argument("--again", action="store_true", help="with --resume: run what failed once more")
    parser.add_argument("--results", type=Path, help=f"keep results in this file (default: {RESULTS.name}, of all)")
    parser.add_argument("--timeout", type=int, default=120, help="seconds one run may take (120)")
    parser.add_argument("--jobs", type=int, default=2, help="architectures at the same time, each with 4 processes (2)")
    options = parser.parse_args()
    everything = [*KINDS, BASELINE]
    kinds = [_kind(text) for text in options.kinds.split(",")] if options.kinds else everything
    if unknown := [kind for kind in kinds if kind not in everything]:
        parser.error(f"--kinds: {unknown[0]!r} is unknown; choose from {', '.join(everything)}")
    names = [name for name in zoo_models.models() if fnmatch.fnmatch(name, options.only or "*")]
    if not names:
        parser.error(f"--only: no name matches {options.only!r}; names look like 'causal/llama'")
    complete = options.only is None and kinds == everything
    path = options.results or (RESULTS if complete else None)
    survey = Survey(kinds, options.timeout, path)
    if options.resume:
        survey.results = zoo_report.from_json(json.loads((path or RESULTS).read_text()))
    todo = [(name, missing) for name in names if (missing := survey.missing(name, options.again))]
    work: queue.SimpleQueue[tuple[int, str, list[str]] | None] = queue.SimpleQueue()
    threads = [threading.Thread(target=serve, args=(survey, work, len(todo)), daemon=True) for _ in range(options.jobs)]
    for place, (name, missing) in enumerate(todo, 1):
        work.put((place, name, missing))
    for _ in threads:
        work.put(None)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shown = {name: survey.results[name] for name in names if name in survey.results}
    page = zoo_report.page(shown, kinds)
    print(page)
    if complete:
        PAGE.write_text(page)
        print(f"written: {PAGE} and {path}", file=sys.stderr)


def _kind(text: str) -> str:
    """``pp2xtp2`` or ``pp=2 tp=2`` as KINDS has it."""
    short = {"pp2xdp2": "pp=2 dp_replicate=2", "pp2xtp2": "pp=2 tp=2", "baseline": BASELINE}
    return short.get(text.strip(), text.strip())


if __name__ == "__main__":
    main()
