"""Planning for very large clusters: what it takes to capture a model and search for its plan, on this machine.

    python benchmarks/planning.py                  Llama-3.1-405B and a GPT of a trillion parameters
    python benchmarks/planning.py --small          small models on small clusters; seconds
    python benchmarks/planning.py --only gpt-1t

Every measurement is a process of its own on two cores: it captures the model, which has no memory, and searches. Its
memory is the process's at its peak, Python and torch included; libraries are imported before the clock starts. The
clusters of a model take turns, round after round, and a row has the medians. A search takes longer on twice the
cluster, by a factor of `growth`, the median of the rounds' ratios. On one node the large models fit under no plan,
which the search has to find out, too.
"""

import argparse
import functools
import json
import operator
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from hardware import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import weft
from weft.capture import capture
from weft.cluster import Cluster
from weft.errors import MemoryLimitError
from weft.planner.search import search
from weft.quantity import format_seconds

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "planning.json"
CORES = 2
TOGETHER_S = 10.0
NODE_SEARCH_S = 1.0
MEMORY_BYTES = 2e9
DOUBLED = 1.3
TABLE_WIDTH = 150  # where nobody says how wide: a pipe, a file
LARGE, TWICE, NODE = "cluster", "twice the cluster", "one node"


class Tokens:
    """Samples of so many tokens."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return 1 << 16

    def __getitem__(self, index: int) -> Tensor:
        return torch.zeros(self.length, dtype=torch.long)


def causal(model: nn.Module, batch: Tensor) -> Tensor:
    """The loss of a language model on its own input."""
    loss: Tensor = model(input_ids=batch, labels=batch).loss
    return loss


def workload(model: Callable[[], nn.Module], length: int, batch_size: int) -> weft.Workload:
    """A language model trained with AdamW."""
    return weft.Workload(
        model=model, loss=causal, data=Tokens(length), optimizer=torch.optim.AdamW, batch_size=batch_size
    )


def llama(layers: int, hidden: int, inner: int, heads: int, *, length: int, batch_size: int) -> weft.Workload:
    """A Llama 3.1 of these dimensions, as transformers builds it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=length,
        rope_theta=500000.0,
        tie_word_embeddings=False,
    )
    return workload(functools.partial(LlamaForCausalLM, config), length, batch_size)


def gpt(layers: int, hidden: int, heads: int, *, length: int, batch_size: int) -> weft.Workload:
    """A GPT of these dimensions, as transformers builds it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=layers,
        n_embd=hidden,
        n_head=heads,
        n_positions=length,
        vocab_size=51200,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        loss_type="ForCausalLM",
    )
    return workload(functools.partial(GPT2LMHeadModel, config), length, batch_size)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A model, and a cluster preset with its nodes of eight devices."""

    make: Callable[[], weft.Workload]
    preset: str
    nodes: int

    def cluster(self, which: str) -> str:
        """One of the clusters it is planned for, as ``--cluster`` takes it."""
        nodes = {LARGE: self.nodes, TWICE: 2 * self.nodes, NODE: 1}[which]
        return f"{self.preset}:{nodes}x8"


SCENARIOS = {
    "llama-3.1-405b": Scenario(
        make=functools.partial(llama, 126, 16384, 53248, 128, length=8192, batch_size=2048),
        preset="h100-sxm",
        nodes=2048,
    ),
    "gpt-1t": Scenario(
        make=functools.partial(gpt, 128, 25600, 160, length=2048, batch_size=3072), preset="a100-80", nodes=512
    ),
    "llama-3.1-8b": Scenario(
        make=functools.partial(llama, 32, 4096, 14336, 32, length=8192, batch_size=128), preset="h100-sxm", nodes=1
    ),
}
SMALL = {
    "llama": Scenario(
        make=functools.partial(llama, 4, 256, 512, 8, length=128, batch_size=64), preset="h100-sxm", nodes=2
    ),
    "gpt": Scenario(make=functools.partial(gpt, 4, 256, 4, length=128, batch_size=64), preset="a100-80", nodes=2),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model on one cluster.

    Attributes:
        model, where, cluster: what was planned, and for which of a scenario's clusters.
        devices: of the cluster.
        parameters: of the model.
        captures_s, searches_s: seconds of capture and search in every round's process.
        peak_bytes: of the largest of these processes at its peak.
        plan: the chosen one, described; or why there is none.
        step_s: its step, as estimated.
        growth: on twice the cluster, the search's time over that on the cluster, the median of the rounds.
        met: whether every aim is, by its name.
    """

    model: str
    where: str
    cluster: str
    devices: int
    parameters: int
    captures_s: list[float]
    searches_s: list[float]
    peak_bytes: int
    plan: str
    step_s: float | None = None
    growth: float | None = None
    met: dict[str, bool]

    @property
    def together_s(self) -> float:
        """Capture and search."""
        return statistics.median(map(sum, zip(self.captures_s, self.searches_s, strict=True)))

    def and_again(self, other: "Row") -> "Row":
        """With another round's measurements."""
        return replace(
            self,
            captures_s=self.captures_s + other.captures_s,
            searches_s=self.searches_s + other.searches_s,
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
        )


def measure(name: str, scenario: Scenario, where: str) -> Row:
    """In a process of its own: capture and search."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    task, cluster = scenario.make(), Cluster.parse(scenario.cluster(where))
    began = time.perf_counter()
    profile = capture(task, "bf16")
    captured = time.perf_counter()
    plan, step_s = "", None
    try:
        choice = search(profile, cluster, precision="bf16")
        plan, step_s = choice.plan.describe(), choice.estimate.step_time_s
        plan += f" microbatches={choice.plan.microbatches} {choice.plan.schedule}"
    except MemoryLimitError as error:
        plan = str(error).splitlines()[0]
    searched = time.perf_counter()
    unit = 1 if sys.platform == "darwin" else 1024
    return Row(
        model=name,
        where=where,
        cluster=scenario.cluster(where),
        devices=cluster.devices,
        parameters=sum(p.bytes for p in profile.parameters.values() if p.trainable) // 4,
        captures_s=[captured - began],
        searches_s=[searched - captured],
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        plan=plan,
        step_s=step_s,
        met={},
    )


def apart(name: str, where: str, arguments: argparse.Namespace) -> Row:
    """The same in a fresh process.

    Raises:
        SystemExit: it failed; its own words are on stderr.
    """
    command = [sys.executable, __file__, "--process", name, where]
    done = subprocess.run([*command, *(["--small"] if arguments.small else [])], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name} on {where}: the process ended with {done.returncode}")
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def judged(row: Row, on_cluster: Row | None) -> Row:
    """The row held against its aims; ``on_cluster``: the same model's on the cluster itself."""
    met = {"memory": row.peak_bytes <= MEMORY_BYTES}
    if row.where == NODE:
        return replace(row, met={**met, "search": statistics.median(row.searches_s) <= NODE_SEARCH_S})
    met["together"] = row.together_s <= TOGETHER_S
    if row.where == LARGE or on_cluster is None:
        return replace(row, met=met)
    growth = statistics.median(map(operator.truediv, row.searches_s, on_cluster.searches_s))
    if row.model not in SMALL:  # whose searches are too short to tell
        met["growth"] = growth <= DOUBLED
    return replace(row, growth=growth, met=met)


def table_of(rows: list[Row]) -> Table:
    """The rows for people; what misses its aim is red."""
    table = Table(title="capture and search, medians of processes", title_justify="left")
    for name in ("model", "cluster"):
        table.add_column(name)
    for name in ("devices", "capture s", "search s", "together s", "peak GB", "growth", "aim", "met"):
        table.add_column(name, justify="right")
    for row in rows:
        aims = {
            "together": f"together <= {TOGETHER_S:g} s",
            "search": f"search <= {NODE_SEARCH_S:g} s",
            "memory": f"<= {MEMORY_BYTES / 1e9:g} GB",
            "growth": f"growth <= {DOUBLED:g}",
        }
        missed = [name for name, met in row.met.items() if not met]
        table.add_row(
            row.model,
            row.cluster,
            f"{row.devices:,}",
            f"{statistics.median(row.captures_s):.2f}",
            f"{statistics.median(row.searches_s):.2f}",
            f"{row.together_s:.2f}",
            f"{row.peak_bytes / 1e9:.2f}",
            "" if row.growth is None else f"{row.growth:.2f}",
            ", ".join(aim for name, aim in aims.items() if name in row.met),
            f"[red]not {', '.join(missed)}[/red]" if missed else "yes",
        )
    return table


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parse.add_argument("--only", choices=[*SCENARIOS, *SMALL], action="append", help="one model; may be repeated")
    parse.add_argument("--small", action="store_true", help="small models on small clusters")
    parse.add_argument("--rounds", type=int, default=3, help="processes of each row (default %(default)s)")
    parse.add_argument("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    parse.add_argument("--process", nargs=2, metavar=("MODEL", "WHERE"), help=argparse.SUPPRESS)
    return parse


def main() -> None:
    arguments = parser().parse_args()
    scenarios = SMALL if arguments.small else SCENARIOS
    if arguments.process:
        name, where = arguments.process
        print(json.dumps(asdict(measure(name, scenarios[name], where))))
        return
    people = Console(stderr=arguments.json)
    people.width = max(people.width, TABLE_WIDTH if not people.is_terminal else 0)
    rows: list[Row] = []
    with Console(stderr=True).status("") as status:
        for name, scenario in scenarios.items():
            if arguments.only and name not in arguments.only:
                continue
            found: dict[str, Row] = {}
            for number in range(arguments.rounds):
                for where in (LARGE, TWICE, NODE) if scenario.nodes > 1 else (NODE,):
                    status.update(f"{name} on {scenario.cluster(where)}, round {number + 1}")
                    row = apart(name, where, arguments)
                    found[where] = found[where].and_again(row) if where in found else row
            rows += [judged(row, found.get(LARGE)) for row in found.values()]
    people.print(table_of(rows))
    for row in rows:
        step = "" if row.step_s is None else f": a step of {format_seconds(row.step_s)}"
        people.print(f"{row.model} ({row.parameters / 1e9:,.4g} billion) on {row.cluster}: {row.plan}{step}")
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "process")}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    aims = {"together_s": TOGETHER_S, "node_search_s": NODE_SEARCH_S, "memory_bytes": MEMORY_BYTES, "growth": DOUBLED}
    result = {"date": date, "machine": machine(), "settings": settings, "aims": aims, "rows": [asdict(r) for r in rows]}
    if settings == {name: vars(parser().parse_args([]))[name] for name in settings}:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")
        people.print(f"kept in {RESULTS.relative_to(ROOT)}")
    else:
        people.print("not kept: only a run without options is")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
