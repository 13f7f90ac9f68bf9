"""The commands about checkpoints: ``weft checkpoint show``, ``weft export`` and ``weft import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from weft import options
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.exchange import described, export
from weft.checkpoint.folder import candidates
from weft.checkpoint.index import Index
from weft.errors import CheckpointError, SaveError, WeftError, of_name
from weft.jobs import bring
from weft.plain import printable
from weft.quantity import format_bytes, format_count, parse_size
from weft.report.output import output

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="of checkpoints, or one of them")]

checkpoint = typer.Typer(help="What checkpoints hold.")


@checkpoint.command()
def show(
    directory: Folder,
    tensors: Annotated[bool, typer.Option("--tensors", help="list every tensor of the newest")] = False,
    as_json: options.Json = False,
) -> None:
    """Tell what is in a directory of checkpoints, and look each one through for damage."""
    with output(as_json) as show:
        found = list(described(candidates(directory)))
        table, rows = Table("step", "plan", "parameters", "tensors", "size", "state"), []
        for path, each in found:
            if isinstance(each, CheckpointError):
                table.add_row(path.name, "", "", "", "", printable(f"damaged: {each}"))
                rows.append({"path": str(path), "state": str(each)})
                continue
            held = contents(each.index)
            plan = "none: brought from elsewhere" if each.index.plan is None else each.index.plan.describe()
            counts = format_count(held["parameters"]), str(held["tensors"]), format_bytes(held["bytes"])
            table.add_row(str(held["step"]), plan, *counts, "whole")
            rows.append({"path": str(path), "state": "whole", **held})
        whole = [each for _, each in found if isinstance(each, Checkpoint)]
        show(_with_tensors(table, whole[0].index) if tensors and whole else table, {"checkpoints": rows})


def contents(index: Index) -> dict[str, Any]:
    """What a checkpoint holds, as plain data."""
    parameters = [t.form for t in index.tensors.values() if t.kind == "parameter"]
    return {
        "step": index.step,
        "plan": None if index.plan is None else index.plan.to_json(),
        "parameters": sum(form.size // form.itemsize for form in parameters),
        "tensors": len(index.tensors),
        "bytes": sum(index.files.values()),
        "files": len(index.files),
        "kinds": {
            kind: sum(t.form.size for t in index.tensors.values() if t.kind == kind)
            for kind in ("parameter", "buffer", "computed", "optimizer")
        },
    }


def _with_tensors(table: Table, index: Index) -> Any:
    each = Table("tensor", "kind", "dtype", "shape", "chunks")
    for name, tensor in index.tensors.items():
        shape = " x ".join(map(str, tensor.form.shape)) or "one number"
        each.add_row(printable(name), tensor.kind, tensor.form.dtype, shape, str(len(tensor.chunks)))
    return Group(table, each)


def export_weights(
    directory: Folder,
    to: Annotated[Path, typer.Argument(metavar="OUT", help="a new directory, or a new file.safetensors")],
    max_file: Annotated[str, typer.Option("--max-file", metavar="SIZE", help="of each file of a directory")] = "5GB",
    as_json: options.Json = False,
) -> None:
    """Write the newest checkpoint's weights as safetensors; for transformers models what from_pretrained reads."""
    with output(as_json) as show:
        path = candidates(directory)[0]
        try:
            done = export(Checkpoint.open(path), to, shard_bytes=parse_size(max_file))
        except OSError as error:
            raise _unwritten(to, error) from error
        text = f"{done.path}: {done.tensors} tensors, {format_bytes(done.size)}, of {path.name}"
        show(text, {"path": str(done.path), "files": list(done.files), "tensors": done.tensors, "bytes": done.size})


def import_weights(
    target: options.TargetText,
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="file.safetensors, or a directory with some")],
    arguments: options.Arguments = None,
    to: Annotated[Path, typer.Option("--checkpoint", metavar="DIR", help="a directory for checkpoints; needed")] = ...,  # type: ignore[assignment]  # typer's way to say that it is needed
    as_json: options.Json = False,
) -> None:
    """Make a checkpoint of weights from elsewhere; `weft train --checkpoint DIR --resume` goes on from it."""
    with output(as_json) as show:
        try:
            path = bring.run(options.target_of(target, arguments).load(), weights, to)
        except OSError as error:
            raise _unwritten(to, error) from error
        show(f"{path}: step 0, of {weights}", {"path": str(path)})


def _unwritten(path: Path, error: OSError) -> WeftError:
    """Why something could not be written: what it was to be called, or the disk."""
    if of_name(error):
        return CheckpointError(f"{path}: cannot be written: {error.strerror}; give a name that can be there")
    return SaveError(f"{path}: cannot be written: {error.strerror or error}")
