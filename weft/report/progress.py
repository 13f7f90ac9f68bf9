"""Progress: bars on a terminal, plain lines elsewhere. Bars and remarks go to stderr, log lines to stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from weft.estimate import OFF, Difference, Estimate, Measurement, differences
from weft.jobs.train import Line
from weft.plan import Plan
from weft.quantity import format_bytes, format_seconds

SHOW_CURSOR = "\x1b[?25h"


class Bar:
    """The progress of a few large pieces of work; call it with what is being done, how many are done and how many
    there are."""

    def __init__(self) -> None:
        self._progress = new_progress() if sys.stderr.isatty() else None
        self._task: TaskID | None = None

    def __call__(self, text: str, done: int, total: int) -> None:
        if self._progress is None:
            if done < total:
                print(f"[{done + 1}/{total}] {text}", file=sys.stderr, flush=True)
        elif self._task is None:
            self._task = self._progress.add_task(text, completed=done, total=total)
            self._progress.start()
        else:
            self._progress.update(self._task, description=text, completed=done, total=total)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()


class TrainingLog:
    """Tells what happens while training. Made by the command line, used in the process of rank 0, to which it is sent:
    so the bar is made there, with the first step."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        """Something worth knowing."""
        print(text, file=sys.stderr, flush=True)

    def planned(self, plan: Plan, estimate: Estimate | None) -> None:
        """The plan that will run, and what it should cost."""
        cut = f"{plan.microbatches} microbatch{'es' if plan.microbatches > 1 else ''}"
        order = f", {plan.schedule}" if plan.pp > 1 else ""
        expected = ""
        if estimate is not None:
            memory = format_bytes(max(estimate.peak_memory_bytes))
            expected = f"; predicted {format_seconds(estimate.step_time_s)} a step, {memory} on the fullest device"
        print(f"plan: {plan.describe()}, {cut}{order}{expected}", flush=True)

    def step(self, step: int, steps: int, loss: float | None) -> None:
        """Move the bar."""
        if not sys.stderr.isatty():
            return
        if self._progress is None:
            self._progress = new_progress()
            self._task = self._progress.add_task("training", completed=step, total=steps)
            self._progress.start()
        assert self._task is not None
        self._progress.update(self._task, completed=step, total=steps)
        if loss is not None:
            self._progress.update(self._task, description=f"loss {loss:.4f}")

    def line(self, line: Line) -> None:
        """Log an interval."""
        print(log_line(line), flush=True)

    def compared(self, estimate: Estimate, measurement: Measurement) -> None:
        """What was predicted and what was seen."""
        print(prediction_line(estimate, measurement), flush=True)
        if off := differences(estimate, measurement):
            print(difference_line(off), flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class PredictionLog:
    """Tells what happens while predicting. Sent to the process of rank 0, as a TrainingLog is."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._told = 0

    def planned(self, plan: Plan) -> None:
        """The plan that will run."""
        print(f"plan: {plan.describe()}", flush=True)

    def resumed(self, done: int, samples: int) -> None:
        """What an earlier run has done."""
        print(f"going on behind {done} of {samples} samples", file=sys.stderr, flush=True)

    def progress(self, done: int, samples: int) -> None:
        """Move the bar, or print a line for each tenth of the way."""
        if not sys.stderr.isatty():
            if (tenth := 10 * done // samples) > self._told:
                self._told = tenth
                print(f"{done}/{samples} samples", file=sys.stderr, flush=True)
            return
        if self._progress is None:
            self._progress = new_progress()
            self._task = self._progress.add_task("predicting", completed=done, total=samples)
            self._progress.start()
        assert self._task is not None
        self._progress.update(self._task, completed=done, total=samples)

    def publishing(self, output: str) -> None:
        """The file is being made."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=f"writing {output}")

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def log_line(line: Line) -> str:
    """An interval of training in one line."""
    step = f"{line.step:>{len(str(line.steps))}}/{line.steps}"
    least, most = min(line.memory_bytes), max(line.memory_bytes)
    rates = f"learning rate {', '.join(f'{rate:.3g}' for rate in line.learning_rates)}  " if line.learning_rates else ""
    spread = format_bytes(most) if most - least < 0.1 * most else f"{format_bytes(least)} to {format_bytes(most)}"
    return (
        f"step {step}  loss {line.loss:.4f}  gradient norm {line.gradient_norm:.3g}  {rates}"
        f"{line.samples_per_s:.1f} samples/s ({line.samples_per_s_per_device:.1f} per device)  "
        f"memory {spread} per device  {format_seconds(line.left_s)} left"
    )


def prediction_line(estimate: Estimate, measurement: Measurement) -> str:
    """Step time and memory, predicted next to measured."""
    predicted, measured = estimate.step_time_s, measurement.step_time_s
    expected, seen = max(estimate.peak_memory_bytes), max(measurement.peak_memory_bytes)
    return (
        f"step time {format_seconds(predicted)} predicted, {format_seconds(measured)} measured "
        f"({predicted / measured - 1:+.0%}); "
        f"memory {format_bytes(expected)} predicted, {format_bytes(seen)} measured ({expected / max(seen, 1) - 1:+.0%})"
    )


def difference_line(off: Sequence[Difference]) -> str:
    """What was predicted wrongly."""

    def told(d: Difference) -> str:
        form = format_bytes if d.term == "memory" else format_seconds
        error = f"{d.predicted / d.measured - 1:+.0%}" if d.measured else "none seen"
        return f"{d.term} {form(d.predicted)} predicted, {form(d.measured)} measured ({error})"

    return f"off by more than {OFF:.0%}: {'; '.join(map(told, off))}"


def new_progress() -> Progress:
    """A bar in the style of all of them, on stderr. What is printed meanwhile goes above it, or to its file."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),
        transient=True,
    )


def show_cursor() -> None:
    """A bar hides the cursor, and a process that died under one could not give it back."""
    if sys.stderr.isatty():
        sys.stderr.write(SHOW_CURSOR)
