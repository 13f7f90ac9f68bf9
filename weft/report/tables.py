"""Tables: results side by side, for people. The same numbers as the JSON."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from weft.cluster import Cluster
from weft.cluster.nodes import Nodes
from weft.cluster.topology import FLOP_KINDS
from weft.jobs.compare import Comparison, Row
from weft.jobs.verify import Verification
from weft.quantity import format_bytes, format_count, format_seconds

NONE = "-"


def comparison(found: Comparison, *, steps: int) -> RenderableType:
    """One row per strategy, the sentence, and how far the predictions were off."""
    table = new_table(f"{steps} timed step{'s' if steps > 1 else ''} each, medians")
    for title in ("strategy", "degrees"):
        table.add_column(title)
    for title in (
        "step\npredicted",
        "\nmeasured",
        "\nsamples/s",
        "memory\npredicted",
        "\nmeasured",
        "sent\nper step",
        "devices\nidle",
        "last\nloss",
        "largest\ndeviation",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for row in found.rows:
        table.add_row(*cells(row), style="bold" if row.strategy == "chosen" else None)
    reasons = [Text(f"{row.strategy} was not run: {row.reason}") for row in found.rows if row.reason]
    error = f"Predicted step times were off by {found.step_time_error:.0%} on average."
    return Group(table, *reasons, Text(found.sentence), Text(error))


def cells(row: Row) -> list[str]:
    """A row of the comparison as text."""
    degrees = " ".join(f"{name}={degree}" for name, degree in row.degrees.items() if degree > 1)
    if row.microbatches is not None and row.microbatches > 1:
        degrees += f" x{row.microbatches}"
    return [
        row.strategy,
        degrees or NONE,
        NONE if row.predicted_step_s is None else format_seconds(row.predicted_step_s),
        NONE if row.measured_step_s is None else format_seconds(row.measured_step_s),
        NONE if row.samples_per_s is None else f"{row.samples_per_s:.1f}",
        NONE if row.predicted_peak_bytes is None else format_bytes(row.predicted_peak_bytes),
        NONE if row.measured_peak_bytes is None else format_bytes(row.measured_peak_bytes),
        NONE if row.bytes_sent_per_step is None else format_bytes(row.bytes_sent_per_step),
        NONE if row.idle_share is None else f"{row.idle_share:.0%}",
        f"{row.losses[-1]:.4f}" if row.losses else NONE,
        NONE if row.loss_deviation is None else f"{row.loss_deviation:.1e}",
    ]


def verification(found: Verification, *, plan: str) -> RenderableType:
    """Each error beside what counts as equal, and the verdict."""
    table = new_table(f"{plan} against one device: {found.steps} steps in {found.dtype}")
    table.add_column("largest relative error of")
    table.add_column("found", justify="right")
    table.add_column("allowed", justify="right")
    table.add_column("in")
    for what, error, where in (
        ("loss", found.loss_error, ""),
        ("gradients", found.gradient_error, found.worst_gradient),
        ("parameters", found.parameter_error, found.worst_parameter),
    ):
        holds = error <= found.tolerance
        table.add_row(what, f"{error:.1e}", f"{found.tolerance:.0e}", where, style=None if holds else "bold red")
    held = ", ".join(format_bytes(size) for size in found.parameter_bytes)
    verdict = "The plan gives what one device gives." if found.ok else "The plan does NOT give what one device gives."
    return Group(table, Text(f"Parameters held by each device: {held}"), Text(verdict))


def cluster(found: Cluster) -> RenderableType:
    """Devices of every kind, rates at the ends of their curves, and links."""
    tables = []
    for device in found.kinds:
        kind = f"{device.name}, {format_bytes(device.memory_bytes)}: " if len(found.kinds) > 1 else ""
        table = new_table(f"{kind}{found.name} ({found.calibration})")
        table.add_column("what")
        table.add_column("small work", justify="right")
        table.add_column("large work", justify="right")
        curves = [(f"matmul {dtype}", curve, "flop/s") for dtype, curve in device.matmul.items()]
        curves += [(kind, curve, "flop/s" if kind in FLOP_KINDS else "B/s") for kind, curve in device.rates.items()]
        for what, curve, unit in curves:
            table.add_row(what, format_count(curve.rates[0], unit), format_count(curve.rates[-1], unit))
        tables.append(table)
    lines = [
        *map(_entry, found.nodes),
        *(
            f"link {link.name}, {link.devices} devices: {format_seconds(link.latency_s)} and "
            f"{format_count(link.bytes_per_s, 'B/s')} each way"
            + (f", {format_count(link.alone_bytes_per_s, 'B/s')} alone" if link.alone_bytes_per_s else "")
            + (f", {format_seconds(link.busy_s)} of computing lost at each end" if link.busy_s else "")
            for link in found.links
        ),
    ]
    return Group(*tables, *map(Text, lines))


def _entry(nodes: Nodes) -> str:
    """Nodes of one kind in a line."""
    device = nodes.device
    what = f"{nodes.count} node{'s' if nodes.count > 1 else ''} of" if nodes.host is None else f"{nodes.host}:"
    cores = "" if nodes.cores is None else f"; a node computes as fast as {nodes.cores:g} of its devices alone"
    share = "" if device.core_share == 1 else f", {device.core_share:.0%} of a core"
    return (
        f"{what} {nodes.devices} x {device.name} with {format_bytes(device.memory_bytes)}{share} each; an operation "
        f"takes at least {format_seconds(device.overhead_s)}{cores}"
    )


def new_table(title: str) -> Table:
    """A table in the style of all of them."""
    return Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
