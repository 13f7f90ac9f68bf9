"""Predictions against published measurements: step time, peak memory, and which plan is fastest.

    python benchmarks/published.py                              every table of benchmarks/data; kept in results/
    python benchmarks/published.py --kind single-node           one of them
    python benchmarks/published.py --csv FILE --kind training   another table of one of their formats
    python benchmarks/published.py --rows                       every row beside its summary
    python benchmarks/published.py --json                       summaries only, for programs

For every row the model is built from its dimensions (published_models), captured on fake tensors, and the plan it was
trained under is estimated on the cluster it ran on (published_systems). Rows of one model share a capture. Rows that
cannot be modelled are counted and named with the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from hardware import machine
from published_metrics import Predicted, Summary, summaries
from published_models import DTYPES, loss_kind, workload
from published_rows import DATA, FILES, read
from published_run import GIB, Run, Skipped
from published_systems import CannotPredictError, predict

from weft.capture import capture
from weft.errors import WeftError

PROCESSES = 2
RESULTS = Path(__file__).resolve().parent / "results" / "published.json"


def predicted(runs: list[Run]) -> list[Predicted | Skipped]:
    """Predictions of runs of one model; whatever goes wrong with one is its reason to be skipped."""
    torch.set_num_threads(1)
    try:
        profile = capture(workload(runs[0]))
    except WeftError as error:
        return [_skipped(run, error) for run in runs]
    results: list[Predicted | Skipped] = []
    for run in runs:
        try:
            results.append(Predicted(run, predict(run, replace(profile, batch_size=run.global_batch))))
        except (CannotPredictError, WeftError) as error:
            results.append(_skipped(run, error))
    return results


def predict_all(runs: Iterable[Run], processes: int = PROCESSES) -> tuple[list[Predicted], list[Skipped]]:
    """Predictions of any runs, in their order, and what could not be predicted; models are shared out to processes."""
    models: dict[object, list[Run]] = {}
    for run in runs:
        models.setdefault((run.shape, DTYPES.get(run.dtype), loss_kind(run)), []).append(run)
    batches = sorted(models.values(), key=lambda batch: -len(batch))
    if processes > 1 and len(batches) > 1:
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            found = [result for batch in pool.map(predicted, batches) for result in batch]
    else:
        found = [result for batch in batches for result in predicted(batch)]
    done = [r for r in found if isinstance(r, Predicted)]
    return sorted(done, key=lambda p: (p.run.source, p.run.row)), [r for r in found if isinstance(r, Skipped)]


def _skipped(run: Run, error: Exception) -> Skipped:
    return Skipped(run.source, run.row, run.model, str(error))


def table(found: list[Summary]) -> str:
    """Summaries for people."""
    lines = [f"{'source':<44} {'rows':>5} {'skip':>4} {'time':>12} {'memory':>13} {'tau':>6} {'regret':>7}"]
    lines += [f"{'':<44} {'':>5} {'':>4} {'mean':>6}{'median':>6}% {'mean':>6}{'median':>6}% {'':>6} {'%':>7}"]
    for s in found:
        figures = [_figure(x) for x in (s.time_mape, s.time_median_ape, s.memory_mape, s.memory_median_ape)]
        tau = "-" if s.kendall_tau is None else f"{s.kendall_tau:.2f}"
        lines.append(
            f"{s.source[:44]:<44} {s.rows:>5} {s.skipped:>4} {figures[0]:>6}{figures[1]:>6}  {figures[2]:>6}"
            f"{figures[3]:>6}  {tau:>6} {_figure(s.regret):>7}"
        )
    return "\n".join(lines)


def row_lines(found: list[Predicted]) -> str:
    """A line for every row: predicted, measured and error of time and memory."""
    lines = []
    for p in found:
        parts = [f"{p.run.source[:16]:<16} {p.run.row:>4} {p.run.model[:32]:<32} {p.run.describe():<56}"]
        if p.time_error is not None:
            measured = p.run.step_time_s or 0.0
            parts.append(f"{p.prediction.step_time_s:9.4g} s of {measured:9.4g} s {100 * p.time_error:+6.1f} %")
        if p.memory_error is not None:
            ours, theirs = (b / GIB for b in (p.prediction.peak_memory_bytes, p.run.peak_memory_bytes or 0))
            parts.append(f"{ours:7.2f} GiB of {theirs:7.2f} GiB {100 * p.memory_error:+6.1f} %")
        lines.append("  ".join(parts))
    return "\n".join(lines)


def skipped_lines(skipped: list[Skipped]) -> str:
    """Why rows were not predicted, and which."""
    rows: dict[tuple[str, str], list[int]] = {}
    for s in skipped:
        rows.setdefault((s.source, s.reason), []).append(s.row)
    return "\n".join(
        f"skipped: {source}, row{'s' * (len(found) > 1)} {', '.join(map(str, sorted(found)))}: {reason}"
        for (source, reason), found in rows.items()
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="a table; the project's own without it")
    parser.add_argument("--kind", choices=list(FILES), help="which kind of table")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rows", action="store_true", help="print every row")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="processes that predict")
    options = parser.parse_args(arguments)
    kinds = [options.kind] if options.kind else list(FILES)
    tables = [(options.csv, options.kind)] if options.csv else [(DATA / FILES[kind], kind) for kind in kinds]
    runs: list[Run] = []
    skipped: list[Skipped] = []
    for path, kind in tables:
        try:
            more, not_read = read(path, kind)
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        runs += more
        skipped += not_read
    found, failed = predict_all(runs, options.processes)
    skipped += failed
    result = summaries(found, skipped)
    as_json = {"sources": [s.to_json() for s in result]}
    if not (options.csv or options.kind):
        RESULTS.write_text(json.dumps({"machine": machine(), **as_json}, indent=2) + "\n")
    if options.json:
        print(json.dumps(as_json, indent=2))
        return 0
    if options.rows:
        print(row_lines(found))
    print(table(result))
    if skipped:
        print(skipped_lines(skipped))
    return 0


if __name__ == "__main__":
    sys.exit(main())
