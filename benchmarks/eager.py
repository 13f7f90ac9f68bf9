"""The constants of ``weft/planner/eager.py``, measured: what operations of a forward take of processors, as ratios to
what a cluster's file says of them; and how near predictions with them come to models of other sizes.

    python benchmarks/eager.py              two minutes
    python benchmarks/eager.py --check      only the predictions, with the constants as they are

Everything is a process's own time, which other programs on its core do not count in, and is taken in turns with what it
is a ratio to, so that a phase in which the machine is slower hits both: so it can be run beside other work.

    READ, READ_BY_ONE    products of 2 to 32 rows with matrices that have left the caches, and of one row
    LOOKED_UP            attentions of single queries, over 128 to 512 keys of 32 to 128 features
    OVERHEADS            a step of decoding of a Llama with next to no numbers in it: what blocks add
    FORWARD_OVERHEADS    and what is left without them
    STAGE_OVERHEADS      what a step takes more on one of two stages, beside what messages take of Gloo's threads
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Container, Sequence
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from inference_rows import Request
from inference_scenarios import Model, costs_of, workload
from rich.console import Console
from rich.table import Table
from torch import Tensor

import weft
from weft.capture.profile import Profile
from weft.cluster import Cluster, measure
from weft.cluster.rates import Clock, curves, overhead_s, probes
from weft.planner import choose_inference, eager
from weft.runtime.pool import Pool

ROUNDS = 15
COLD_BYTES = 2**25
"""Matrices and caches take turns that are so many bytes together, more than a core's caches."""

MATRICES = ((128, 512), (256, 256), (256, 1024), (1024, 256), (512, 2048), (1024, 1024))
ROWS = (1, 2, 4, 8, 16, 32)
ATTENTIONS = tuple((batch, keys, size) for batch in (8, 32) for keys in (128, 512) for size in (32, 64, 128))
HEADS = 8
TABLE_WIDTH = 120  # where nobody says how wide: a pipe, a file
TINY, TINY_DEEP = Model(2, 16, 2), Model(14, 16, 2)
STEPS = Request(1, 8, 24)

HELD_OUT = (Model(8, 256, 8), Model(4, 512, 8), Model(12, 128, 4), Model(6, 384, 6))
REQUESTS = (Request(1, 32, 16), Request(1, 256, 16), Request(8, 64, 16), Request(32, 128, 8))


class Found(NamedTuple):
    """A constant as it is, and as it was measured: the median, and from where to where its cases are."""

    name: str
    now: float
    median: float
    least: float
    most: float

    @classmethod
    def of(cls, name: str, values: Sequence[float]) -> Found:
        """Of what some cases gave."""
        return cls(name, getattr(eager, name), median(values), min(values), max(values))


def in_turns(runs: Sequence[Callable[[], object]], rounds: int = ROUNDS) -> list[float]:
    """Seconds of a process's time that each takes, the median of the rounds."""
    found: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 1):  # the first warms up
        for run, seconds in zip(runs, found, strict=True):
            began = time.thread_time()
            run()
            if number:
                seconds.append(time.thread_time() - began)
    return [median(seconds) for seconds in found]


def cold(bytes_each: int) -> int:
    """How many things of this size leave the caches while the others are used."""
    return max(2, COLD_BYTES // bytes_each)


# -- operations -------------------------------------------------------------------------------------------------------


def operations() -> list[Found]:
    """What products and attentions read."""
    device = torch.device("cpu")
    cases: list[tuple[str, float, float, int, Callable[[], object]]] = []
    for inner, outer in MATRICES:
        size = 4 * inner * outer
        matrices = [torch.randn(outer, inner) for _ in range(cold(size))]
        for rows in ROWS:
            name = "READ_BY_ONE" if rows == 1 else "READ"
            run = _products(torch.randn(rows, inner), matrices)
            cases.append((name, size, 2.0 * rows * inner * outer, len(matrices), run))
    for batch, keys, width in ATTENTIONS:
        size = 2 * 4 * batch * HEADS * keys * width
        caches = [torch.randn(2, batch, HEADS, keys, width) for _ in range(cold(size))]
        cases.append(("LOOKED_UP", size, 0.0, len(caches), _attentions(torch.randn(batch, HEADS, 1, width), caches)))

    work = [p for p in probes(device, (torch.float32,)) if p.kind in ("reduction", "matmul float32")]
    each_s = overhead_s(Clock(device))
    seconds = in_turns([*(probe.run for probe in work), *(run for *_, run in cases)])
    found = curves(work, seconds[: len(work)], each_s)
    stream, arithmetic = found["reduction"].at(COLD_BYTES), found["matmul float32"].rates[-1]
    values: dict[str, list[float]] = {}
    for (name, size, flops, count, _), spent in zip(cases, seconds[len(work) :], strict=True):
        reading = spent / count - each_s - flops / arithmetic
        values.setdefault(name, []).append(size / max(reading, 0.1 * spent / count) / stream)
    return [Found.of(name, own) for name, own in values.items()]


def _products(x: Tensor, matrices: list[Tensor]) -> Callable[[], object]:
    def run() -> None:
        with torch.inference_mode():
            for matrix in matrices:
                F.linear(x, matrix)

    return run


def _attentions(query: Tensor, caches: list[Tensor]) -> Callable[[], object]:
    def run() -> None:
        with torch.inference_mode():
            for keys, values in caches:
                F.scaled_dot_product_attention(query, keys, values)

    return run


# -- steps ------------------------------------------------------------------------------------------------------------


def step_s(model: Model, plan: weft.Plan, rounds: int = 3) -> float:
    """Seconds of a process's time that a step of decoding takes, the least of some: in a process of the job."""
    engine = weft.parallelize(workload(model, STEPS.batch), plan, purpose="inference")
    ids = torch.ones(STEPS.batch, STEPS.prompt, dtype=torch.long)
    found = []
    for _ in range(rounds + 1):
        told: list[float] = []
        engine.generate(
            ids, max_new_tokens=STEPS.new, eos_token_id=[], on_tokens=lambda _, t=told: t.append(time.thread_time())
        )
        found.append((told[-1] - told[0]) / (STEPS.new - 1))
    return min(found[1:])


def tiny_steps(shallow: weft.Plan, deep: weft.Plan) -> tuple[float, float, float]:
    """Seconds of a step of both tiny models, and of an operation: in a process of the job."""
    clock, seconds = Clock(torch.device("cpu")), []
    for _ in range(5):
        seconds.append((step_s(TINY, shallow), step_s(TINY_DEEP, deep), overhead_s(clock)))
    one, other, each = (min(column) for column in zip(*seconds, strict=True))
    return one, other, each


def count(profile: Profile, names: Container[str] | None = None) -> int:
    """Operations of a forward, or of the calls of these names."""
    return sum(len(call.forward) for call in profile.calls if names is None or call.name in names)


def overheads(pool: Pool, one: Cluster, two: Cluster) -> list[Found]:
    """What a step takes whatever its numbers."""
    shallow, deep = (costs_of(model, STEPS) for model in (TINY, TINY_DEEP))
    plans = [choose_inference(costs, one).plan for costs in (shallow, deep)]
    step, deeper, each_s = pool.run(tiny_steps, *plans, ranks=1)[0]
    of_each = (deeper - step) / (count(deep.decode) - count(shallow.decode)) / each_s
    of_forward = step / each_s - count(shallow.decode) * of_each
    staged = choose_inference(shallow, two, pp=2, microbatches=1).plan
    more = [
        seconds / each_s - count(shallow.decode, stage) * of_each - of_forward
        for stage, seconds in zip(staged.stages, pool.run(step_s, TINY, staged), strict=True)
    ]
    return [
        Found.of("OVERHEADS", [of_each]),
        Found.of("FORWARD_OVERHEADS", [of_forward]),
        Found.of("STAGE_OVERHEADS", more),
    ]


# -- predictions ------------------------------------------------------------------------------------------------------


class Checked(NamedTuple):
    """Seconds of a process's time of a prompt and of a step, predicted and measured."""

    model: Model
    request: Request
    first: tuple[float, float]
    token: tuple[float, float]


def spent(model: Model, request: Request, plan: weft.Plan, rounds: int = 5) -> tuple[float, float]:
    """Seconds of a process's time until the first token, and of each other: in a process of the job."""
    engine = weft.parallelize(workload(model, request.batch), plan, purpose="inference")
    ids, found = torch.ones(request.batch, request.prompt, dtype=torch.long), []
    for _ in range(rounds + 1):
        told, began = [], time.thread_time()
        engine.generate(
            ids, max_new_tokens=request.new, eos_token_id=[], on_tokens=lambda _, t=told: t.append(time.thread_time())
        )
        found.append((told[0] - began, (told[-1] - told[0]) / (request.new - 1)))
    first, token = (median(column) for column in zip(*found[1:], strict=True))
    return first, token


def checked(pool: Pool) -> list[Checked]:
    """Predictions for models that no constant was measured with; before each model the machine is measured."""
    found = []
    for model in HELD_OUT:
        cluster = pool.run(measure, ranks=1)[0]
        for request in REQUESTS:
            choice = choose_inference(costs_of(model, request), cluster, microbatches=1)
            first, token = pool.run(spent, model, request, choice.plan, ranks=1)[0]
            estimate = choice.estimate
            assert estimate.first_token_s is not None
            assert estimate.token_s is not None
            found.append(Checked(model, request, (estimate.first_token_s, first), (estimate.token_s, token)))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only the predictions")
    given, console = parser.parse_args(), Console(width=None if Console().is_terminal else TABLE_WIDTH)
    with Pool(2, device="cpu") as pool:
        if not given.check:
            one, two = pool.run(measure, ranks=1)[0], pool.run(measure)[0]
            table = Table("constant", "now", "measured", "least", "most")
            for each in [*pool.run(operations, ranks=1)[0], *overheads(pool, one, two)]:
                table.add_row(each.name, *(f"{value:.3g}" for value in each[1:]))
            console.print(table)
        table = Table("layers x hidden", "sequences", "first token", "measured", "off", "token", "measured", "off")
        for row in checked(pool):
            cells = []
            for predicted, seen in (row.first, row.token):
                cells += [f"{1e3 * predicted:.2f} ms", f"{1e3 * seen:.2f} ms", f"{predicted / seen - 1:+.0%}"]
            table.add_row(f"{row.model.layers} x {row.model.hidden}", row.request.describe(), *cells)
        console.print(table)


if __name__ == "__main__":
    main()
