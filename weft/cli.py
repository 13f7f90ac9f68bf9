"""The command line: one thin function per verb.

Results go to stdout, progress and errors to stderr; with ``--json`` stdout gets one JSON object and nothing else. Exit
code 0: done; 1: the job failed, or verification did not hold; 2: what the user gave is wrong, in one line; 130: Ctrl-C.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from weft import options
from weft.capture import capture, capture_inference
from weft.capture.inference import Tokens
from weft.checkpoint import verbs as checkpoints
from weft.cluster import Cluster, measure
from weft.cluster.file import write_cluster
from weft.errors import GaveUpError, InputError, PlanError, WeftError, WorkerError, of_name
from weft.fixed import WITHOUT_DEGREES, takes_fixed
from weft.inference.verbs import generate
from weft.jobs import compare as comparing
from weft.jobs import predict as predicting
from weft.jobs import verify as verifying
from weft.jobs.verbs import train
from weft.plain import printable
from weft.plan import Plan
from weft.planner import Constraints, Keywords, changes, choose, choose_inference, is_inference, search
from weft.quantity import each_of, parse_sizes
from weft.report import page, tables
from weft.report.output import output
from weft.report.progress import Bar, PredictionLog, show_cursor
from weft.runtime.launch import launch as launch_function
from weft.runtime.launch import launch_script
from weft.runtime.worker import run_here
from weft.serving import verbs

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="Train one model on many devices.")
app.command()(generate)
app.command()(verbs.serve)
app.add_typer(verbs.bench, name="bench")
app.add_typer(checkpoints.checkpoint, name="checkpoint")
app.command("export")(checkpoints.export_weights)
app.command("import")(checkpoints.import_weights)

QUICK_S = 3.0
"""Seconds of a search that ``weft plan`` repeats without being asked, to tell what would change its answer."""


@app.command()
@takes_fixed
def plan(
    target: options.TargetText,
    arguments: options.Arguments = None,
    cluster: options.ClusterText = None,
    devices: options.Devices = None,
    memory: options.Memory = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="write the plan here")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="draw it as a page of its own")] = None,
    what_if: Annotated[
        bool | None, typer.Option(help="search again with more memory, faster links, other batches; default: if quick")
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="time, memory or cost; of inference throughput, latency, memory or cost")
    ] = None,
    purpose: Annotated[str, typer.Option(help="training or inference")] = "training",
    prompt: Annotated[int | None, typer.Option(help="inference: tokens of each prompt, to generate")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="inference: tokens after each prompt")] = None,
    batch: Annotated[int | None, typer.Option(help="inference: sequences or samples at once")] = None,
    price: Annotated[float | None, typer.Option(help="of one device for an hour, in any currency")] = None,
    as_json: options.Json = False,
    *,
    fixed: dict[str, Any],
) -> None:
    """Choose a plan and explain it."""
    with output(as_json) as show:
        inference = is_inference(purpose, prompt=prompt, new_tokens=new_tokens, batch=batch)
        if inference and (html is not None or what_if):
            raise PlanError("--html and --what-if are of plans for training; leave them out")
        options.check_place(save, Plan.load)
        options.check_place(html, page.check)
        workload, on = options.target_of(target, arguments).load(), options.cluster_of(cluster, devices, memory)
        if inference:
            tokens = Tokens.asked(prompt, new_tokens)
            costs = capture_inference(workload, options.precision_of(fixed), tokens=tokens, batch_size=batch)
            answer = choose_inference(costs, on, objective=objective, price=price, **fixed)
            if save is not None:
                answer.plan.save(save)
            return show(answer.plan.explain(), answer.to_json())
        profile = capture(workload, options.precision_of(fixed))
        choice = choose(profile, on, objective=objective, price=price, **fixed)
        if save is not None:
            choice.plan.save(save)
        found = []
        if what_if or (what_if is None and choice.search_s < QUICK_S and objective in (None, "time")):
            found = changes(profile, on, choice, **fixed)
        if html is not None:
            page.write(html, choice, profile, on, found)
        lines = ["", "What would change it:", *(f"  {change.describe()}" for change in found)] if found else []
        show("\n".join([choice.plan.explain(), *lines]), choice.to_json() | {"changes": [c.to_json() for c in found]})


app.command()(train)


@app.command()
@takes_fixed
def predict(
    target: options.TargetText,
    arguments: options.Arguments = None,
    output_file: Annotated[Path, typer.Option("--output", metavar="FILE", help=".parquet or .npy; needed")] = ...,  # type: ignore[assignment]  # typer's way to say that it is needed
    input_file: Annotated[Path | None, typer.Option("--input", metavar="FILE", help="of data, for the target")] = None,
    plan_file: options.PlanFile = None,
    cluster: options.ClusterText = None,
    devices: options.Devices = None,
    memory: options.Memory = None,
    checkpoint: Annotated[Path | None, typer.Option(metavar="DIR", help="weights that training saved")] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="the first N samples only")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with what an earlier run has written")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="begin anew, whatever is there")] = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    *,
    fixed: dict[str, Any],
) -> None:
    """Write what the workload predicts for its data; --resume goes on where a run was interrupted."""
    with output(as_json) as show:
        work = options.target_of(target, arguments)
        work = work if input_file is None else work.taking(input_file)
        given = None if plan_file is None else options.plan_of(plan_file, fixed)
        count = options.devices_of(devices, given)
        on = options.cluster_of(cluster, devices or count, memory)
        order = predicting.Order(
            plan=given or predicting.plan_for(work.load(), on, fixed),
            output=str(output_file),
            checkpoint=None if checkpoint is None else str(checkpoint),
            limit=limit,
            resume=resume,
            overwrite=overwrite,
            memory_bytes=parse_sizes(memory),
        )
        show("", predicting.run(work, order, PredictionLog()).to_json())


@app.command()
@functools.partial(takes_fixed, names=WITHOUT_DEGREES)
def compare(
    target: options.TargetText,
    arguments: options.Arguments = None,
    devices: options.Devices = None,
    memory: options.Memory = None,
    steps: Annotated[int, typer.Option(min=1, help="timed steps of every strategy")] = 5,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    *,
    fixed: dict[str, Any],
) -> None:
    """Train the same model under every kind of parallelism and show them side by side."""
    with output(as_json) as show:
        work = options.target_of(target, arguments)
        limits = parse_sizes(memory)
        count = options.devices_of(devices)
        Constraints(**fixed)  # what is wrong with it shows before any process starts
        with Bar() as bar:
            found = comparing.run(
                work, devices=count, memory_bytes=limits, steps=steps, on_progress=bar, fixed=cast(Keywords, fixed)
            )
        show(tables.comparison(found, steps=steps), found.to_json())


@app.command()
@takes_fixed
def verify(
    target: options.TargetText,
    arguments: options.Arguments = None,
    plan_file: options.PlanFile = None,
    devices: options.Devices = None,
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps to compare")] = 3,
    dtype: Annotated[
        str | None,
        typer.Option(help="float64, float32, bf16 or fp16; default: the plan's, or float64"),
    ] = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    *,
    fixed: dict[str, Any],
) -> None:
    """Prove a plan against one device. Exit code 1 if it does not hold."""
    with output(as_json) as show:
        work = options.target_of(target, arguments)
        workload = work.load()
        if plan_file is not None:
            given = options.plan_of(plan_file, fixed)
            options.devices_of(devices, given)
        else:
            profile = capture(workload, options.precision_of(fixed))
            given = search(profile, Cluster.local(options.devices_of(devices)), **fixed).plan
        if dtype is None:
            dtype = given.precision if given.precision != "float32" else "float32" if given.compile else "float64"
        found = verifying.run(work, given, steps=steps, dtype=dtype)
        show(tables.verification(found, plan=given.describe()), found.to_json())
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def cluster(
    devices: options.Devices = None,
    memory: options.Memory = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="write what was measured, for --cluster")] = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure this machine, all devices at once; in a process that torchrun started, the machines of its job."""
    limits = parse_sizes(memory)
    options.check_place(save, Cluster.load)
    rank = os.environ.get("RANK")
    if rank is not None and devices is not None:
        raise InputError(f"this job has its processes already and --devices is {devices}; leave --devices out")
    with output(as_json) as show:
        if rank is None:
            found: Cluster = launch_function(measure_here, limits, devices=devices, memory=limits)[0]
        else:
            mine = each_of(limits, int(os.environ["WORLD_SIZE"]))[int(rank)]
            found = run_here(measure_here, limits, memory_bytes=mine)
        if rank not in (None, "0"):
            return
        if save is not None:
            found.save(save)
        show(tables.cluster(found), write_cluster(found))


@app.command(context_settings={"ignore_unknown_options": True})
def launch(
    script: Annotated[str, typer.Argument(metavar="SCRIPT", help="a Python file")],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="for the script; after -- they are not looked at")
    ] = None,
    devices: options.Devices = None,
    memory: options.Memory = None,
    nodes: Annotated[int, typer.Option(min=1, help="machines in the job; run this on each")] = 1,
    rendezvous: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="where the machines meet")] = None,
    verbose: options.Verbose = False,
) -> None:
    """Run your own script on the devices of this machine."""
    launch_script(script, arguments or [], devices=devices, memory=memory, nodes=nodes, rendezvous=rendezvous)


def measure_here(memory_bytes: Sequence[int]) -> Cluster:
    """Measure inside a job."""
    return measure(memory_bytes=memory_bytes)


USAGE_ERROR: Any = typer.BadParameter.__bases__[0]
"""Base of what typer raises for wrong options; the module it lives in changes with typer's version."""


LONGEST_LINE = 2000
"""Characters of what is said about an error."""


def run(arguments: Sequence[str]) -> int:
    """Run a command line; the exit code."""
    try:
        return int(app(list(arguments) or ["--help"], prog_name="weft", standalone_mode=False) or 0)
    except USAGE_ERROR as error:
        return complain(cast(typer.BadParameter, error).format_message(), 2)
    except WeftError as error:
        if isinstance(error, WorkerError | GaveUpError) and error.traceback:
            if "--verbose" in arguments:
                sys.stderr.write(error.traceback)
            else:
                return complain(f"{error} (--verbose shows where)", error.exit_code)
        return complain(str(error), error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise  # none of the user's files
        remedy = "; name a file that can be there" if of_name(error) else ""
        return complain(f"{error.filename}: {error.strerror}{remedy}", 2 if remedy else 1)
    except (KeyboardInterrupt, typer.Abort):
        return complain("interrupted", 130)
    finally:
        show_cursor()


def complain(text: str, code: int) -> int:
    """One line on stderr."""
    line = " ".join(text.split())
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
    print(f"weft: {printable(line)}", file=sys.stderr)
    return code


def main() -> None:
    """The command ``weft``."""
    sys.exit(run(sys.argv[1:]))
