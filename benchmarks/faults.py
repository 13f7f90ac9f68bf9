"""What becomes of training that is disturbed, in many trials: see ``tests/fault_trials.py``.

    python benchmarks/faults.py                 60 trials (make test-faults)
    python benchmarks/faults.py --trials 500    the long version, kept in benchmarks/results/faults.json
    python benchmarks/faults.py --seed 17 --trials 1

Each trial has a seed, which is printed: it decides what happens, when and to whom.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from hardware import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
sys.path.insert(0, str(ROOT / "tests"))

from fault_trials import Outcome, Trials  # noqa: E402  # where the tests are


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, help="of the first trial; the others count on (default: by the clock)")
    parser.add_argument("--kind", help="of all trials; default: as each seed says")
    given = parser.parse_args()
    first = int(time.time()) % 10**6 if given.seed is None else given.seed
    done: list[Outcome] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="weft-faults-") as directory:
        trials = Trials(Path(directory))
        for seed in range(first, first + given.trials):
            began = time.monotonic()
            try:
                done.append(trials.run(seed, given.kind))
                told = f"{done[-1].kind:10} {done[-1].plan:8} {done[-1].said}"
            except AssertionError as error:
                failed.append(str(error))
                told = f"FAILED: {error}"
            print(f"seed {seed}: {told} ({time.monotonic() - began:.0f} s)", flush=True)
    recovered = [each.recovered_s for each in done if each.recovered_s is not None]
    print(f"{len(done)} of {given.trials} trials went well: {dict(Counter(each.kind for each in done))}")
    if recovered:
        print(f"from fault to next checkpoint: {median(recovered):.1f} s (median), {max(recovered):.1f} s (most)")
    if given.trials >= 500:
        kept = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "first_seed": first,
            "failed": failed,
            "trials": [asdict(each) for each in done],
        }
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
