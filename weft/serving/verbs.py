"""The verbs ``serve`` and ``bench serve`` of the command line. What they need is installed with the extra ``serve``."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from weft import options
from weft.errors import InputError
from weft.fixed import takes_fixed
from weft.quantity import parse_size, parse_sizes
from weft.report import loads
from weft.report.output import output
from weft.target import Target

bench = typer.Typer(add_completion=False, help="Measure under load.")

Key = Annotated[str | None, typer.Option(metavar="KEY|@FILE", help="what requests bring as Authorization: Bearer")]


@takes_fixed
def serve(
    target: options.TargetText,
    arguments: options.Arguments = None,
    plan_file: options.PlanFile = None,
    devices: options.Devices = None,
    memory: options.Memory = None,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="DIR", help="take the weights that were saved here")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(metavar="DIR", help="a tokenizer of transformers")] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0: every address of this machine")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free")] = 8000,
    api_key: Key = None,
    served_model_name: Annotated[str | None, typer.Option(metavar="NAME", help="default: the target's")] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="requests that may wait; more are answered 429")] = 256,
    max_concurrent: Annotated[int, typer.Option(min=1, help="requests decoded at once")] = 64,
    cache_tokens: Annotated[
        int | None, typer.Option(min=1, help="of all requests together; default: what a quarter of free memory holds")
    ] = None,
    max_request: Annotated[str, typer.Option(metavar="SIZE", help="the largest body that is read")] = "4MiB",
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    *,
    fixed: dict[str, Any],
) -> None:
    """Answer OpenAI's completions and chats over HTTP with a divided model."""
    _installed()
    from weft.jobs import serve as serving
    from weft.serving.server import Settings

    with output(as_json) as show:
        work = options.target_of(target, arguments)
        settings = Settings(
            model=served_model_name or _name(work),
            host=host,
            port=port,
            api_key=_key(api_key),
            max_queue=max_queue,
            max_concurrent=max_concurrent,
            largest_bytes=parse_size(max_request),
        )
        plan = None if plan_file is None else options.plan_of(plan_file, fixed)
        order = serving.Order(
            plan=plan,
            cluster=None if plan else options.cluster_of(None, options.devices_of(devices), memory),
            constraints=fixed,
            memory_bytes=parse_sizes(memory),
            checkpoint=None if checkpoint is None else str(checkpoint),
            cache_tokens=cache_tokens,
            tokenizer=tokenizer,
            settings=settings,
        )
        options.devices_of(devices, plan)
        serving.run(work, order, on_ready=lambda ready: show(ready.describe(), ready.to_json()), say=_say)


@bench.command("serve")
def bench_serve(
    target: Annotated[str, typer.Argument(metavar="URL|TARGET", help="a server, or what to start one with")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[name=value]...", help="and the plan's options, after --")
    ] = None,
    clients: Annotated[str | None, typer.Option(metavar="N,N,...", help="at once; default: 1,4,16")] = None,
    rates: Annotated[str | None, typer.Option(metavar="N,N,...", help="requests a second")] = None,
    requests: Annotated[int, typer.Option(min=1, help="of each load")] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 32,
    new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    seed: Annotated[int, typer.Option(help="of the prompts, and the times between requests")] = 0,
    api_key: Key = None,
    as_json: options.Json = False,
) -> None:
    """Load a server with clients: time to first token, time per token, tokens/s."""
    _installed()
    from weft.jobs import bench as benching
    from weft.serving.load import Asked

    with output(as_json) as show:
        order = benching.Order(
            clients=tuple(map(int, _numbers(clients or ("" if rates else "1,4,16"), "--clients"))),
            rates=tuple(_numbers(rates or "", "--rates")),
            requests=requests,
            asked=Asked(prompt_tokens=prompt_tokens, new_tokens=new_tokens, seed=seed),
        )
        if "://" in target:
            found = benching.run(target, order, api_key=_key(api_key), on_load=_say)
        else:
            with benching.started([target, *(arguments or [])]) as url:
                found = benching.run(url, order, on_load=_say)
        show(loads.table(found), found.to_json())


def _installed() -> None:
    """Raises InputError: a package is not there."""
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client", "httpx") if not _is_there(name)]
    if missing:
        raise InputError(f"serving needs {', '.join(missing)}; install them with: pip install 'weft[serve]'")


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _name(target: Target) -> str:
    """What a target is called by: a file's or a directory's name, or a module's."""
    return Path(target.file).stem if target.file.endswith(".py") else Path(target.file).resolve().name


def _key(text: str | None) -> str | None:
    """A key, or the first line of a file: what stands on a command line is seen by every user of the machine."""
    if text is None or not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text().partition("\n")[0].strip()
    except (OSError, ValueError) as error:
        raise InputError(f"--api-key {text}: cannot be read: {error}") from None


def _numbers(text: str, option: str) -> list[float]:
    """Numbers with commas between."""
    try:
        found = [float(part) for part in text.split(",") if part]
    except ValueError:
        found = [math.nan]
    if not all(0 < number < math.inf for number in found):
        raise InputError(f"{option} {text}: write numbers above 0 with commas between, as in 1,4,16")
    return found


def _say(text: str) -> None:
    print(f"weft: {text}", file=sys.stderr, flush=True)
