"""The command ``weft train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from weft import options
from weft.fixed import takes_fixed
from weft.jobs import train as training
from weft.quantity import parse_sizes
from weft.report.output import output
from weft.report.progress import TrainingLog
from weft.runtime.nonfinite import NonFinite


@takes_fixed
def train(
    target: options.TargetText,
    arguments: options.Arguments = None,
    plan_file: options.PlanFile = None,
    cluster: options.ClusterText = None,
    devices: options.Devices = None,
    memory: options.Memory = None,
    steps: Annotated[int | None, typer.Option(min=1, help="in all; default: one epoch")] = None,
    checkpoint: Annotated[Path | None, typer.Option(metavar="DIR", help="save here at the end")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, metavar="N", help="and every N steps")] = None,
    keep: Annotated[int, typer.Option(min=1, metavar="K", help="checkpoints that stay")] = training.KEPT,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint")] = False,
    restarts: Annotated[int, typer.Option(min=0, metavar="N", help="start again when a process dies, N times")] = 0,
    device_check: Annotated[
        str | None, typer.Option(metavar="COMMAND", help="fails where device $WEFT_DEVICE is lost: go on without it")
    ] = None,
    nodes: Annotated[str, typer.Option(metavar="N|MIN:MAX", help="machines in the job; run this on each")] = "1",
    rendezvous: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="where the machines meet")] = None,
    log_every: Annotated[int, typer.Option(min=1, metavar="N", help="steps per logged line")] = 10,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="that ranks wait for one another before training fails")
    ] = training.TIMEOUT_S,
    nonfinite: Annotated[
        str, typer.Option(metavar="WHAT", help="stop, skip or ignore steps whose loss or gradient is NaN or infinite")
    ] = "stop",
    check_replicas: Annotated[
        int, typer.Option(min=0, metavar="N", help="compare copies of weights every N steps; 0: never")
    ] = 100,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    *,
    fixed: dict[str, Any],
) -> None:
    """Plan, unless there is a plan, and train."""
    with output(as_json) as show:
        work = options.target_of(target, arguments)
        work.load()  # what is wrong with it shows before any process starts
        given = None if plan_file is None else options.plan_of(plan_file, fixed)
        machines = options.nodes_of(nodes, rendezvous)
        known = None
        if cluster is not None:  # a file is of the whole job, --devices of this machine
            known = options.cluster_of(cluster, devices if machines.most == 1 else None, memory)
        order = training.Order(
            steps=steps,
            plan=given,
            cluster=known,
            constraints=fixed,
            memory_bytes=parse_sizes(memory),
            checkpoint=None if checkpoint is None else str(checkpoint),
            checkpoint_every=checkpoint_every,
            keep=keep,
            resume=resume,
            restarts=restarts,
            device_check=device_check,
            nodes=machines,
            log_every=log_every,
            timeout_s=timeout,
            nonfinite=cast(NonFinite, nonfinite),  # checked there
            check_replicas=check_replicas,
        )
        count = options.devices_of(devices, given, known, machines)
        show("", training.run(work, order, TrainingLog(), devices=count).to_json())
