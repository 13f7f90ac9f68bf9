"""What becomes of training that is disturbed, in many trials: see ``tests/fault_trials.py``.

    python benchmarks/faults.py                 60 trials (make test-faults)
    python benchmarks/faults.py --trials 500    the long version, kept in benchmarks/results/faults.json
    python benchmarks/faults.py --resume        go on with a long one that was cut off
    python benchmarks/faults.py --seed 17 --trials 1

Each trial has a seed, which is printed: it decides what happens, when and to whom. Some run at once (--at-once), since
a trial waits for most of its time; then seconds are those of a machine that has other work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from hardware import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
sys.path.insert(0, str(ROOT / "tests"))

from fault_trials import Outcome, Trials  # noqa: E402  # where the tests are

LONG = 500
"""Trials whose outcomes are kept."""


@dataclass(frozen=True)
class Failed:
    """A trial after which something did not hold."""

    seed: int
    why: str


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, help="of the first trial; the others count on (default: by the clock)")
    parser.add_argument("--kind", help="of all trials; default: as each seed says")
    parser.add_argument("--at-once", type=int, default=2, help="trials that run side by side (default: 2)")
    parser.add_argument("--resume", action="store_true", help="the trials that are left of those in the kept file")
    given = parser.parse_args()
    first = int(time.time()) % 10**6 if given.seed is None else given.seed
    done: list[Outcome] = []
    failed: list[Failed] = []
    if given.resume:
        kept = json.loads(RESULTS.read_text())
        given.trials, first = kept["asked"], kept["first_seed"]
        done, failed = [Outcome(**each) for each in kept["trials"]], [Failed(**each) for each in kept["failed"]]
    seeds = sorted(set(range(first, first + given.trials)) - {each.seed for each in (*done, *failed)})
    print(f"{len(seeds)} trials from seed {first}", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="weft-faults-") as directory,
        ThreadPoolExecutor(given.at_once) as threads,
        contextlib.ExitStack() as ends,
    ):
        ends.callback(threads.shutdown, cancel_futures=True)  # Ctrl-C: those that run are waited for, no others begin
        trials = Trials(Path(directory))

        def trial(seed: int) -> tuple[Outcome | Failed, float]:
            began = time.monotonic()
            try:
                ended: Outcome | Failed = trials.run(seed, given.kind)
            except Exception as error:  # what a trial did not expect is no less of a failure
                ended = Failed(seed, str(error) if isinstance(error, AssertionError) else repr(error))
            return ended, time.monotonic() - began

        running = {threads.submit(trial, seed): seed for seed in seeds}
        for each in as_completed(running):
            ended, seconds = each.result()
            if isinstance(ended, Outcome):
                done.append(ended)
                told = f"{ended.kind:10} {ended.plan:8} {ended.said}"
            else:
                failed.append(ended)
                told = f"FAILED: {ended.why}"
            print(f"seed {running[each]}: {told} ({seconds:.0f} s)", flush=True)
            if given.trials >= LONG:
                keep(given, first, done, failed)
    recovered = [each.recovered_s for each in done if each.recovered_s is not None]
    print(f"{len(done)} of {given.trials} trials went well: {dict(Counter(each.kind for each in done))}")
    if recovered:
        print(f"from fault to next checkpoint: {median(recovered):.1f} s (median), {max(recovered):.1f} s (most)")
    sys.exit(1 if failed else 0)


def keep(given: argparse.Namespace, first: int, done: list[Outcome], failed: list[Failed]) -> None:
    """Write what is known so far: hours of trials are not lost with the last of them."""
    kept = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "asked": given.trials,
        "first_seed": first,
        "at_once": given.at_once,
        "failed": [asdict(each) for each in failed],
        "trials": [asdict(each) for each in sorted(done, key=lambda each: each.seed)],
    }
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
