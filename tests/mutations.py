"""Mutations: what is valid, changed until it hardly is: plain data by its structure, and bytes as they come.

Every choice is drawn from a ``random.Random``, so that hypothesis can draw and shrink them, and a fuzzer can seed them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
import torch
import workloads

from weft.capture import capture
from weft.checkpoint.exchange import bring
from weft.checkpoint.index import NAME
from weft.checkpoint.tensors import checksum
from weft.cluster import Cluster
from weft.cluster.file import write_cluster
from weft.planner import make_plan

FILE = "rank-00000.safetensors"

RAW = {
    "@nan@": "NaN",
    "@inf@": "-Infinity",
    "@toml nan@": "nan",
    "@toml inf@": "inf",
    "@digits@": "9" * 5000,
    "@hexadecimal@": "0x" + "f" * 9000,
    "@deep list@": "[" * 3000 + "]" * 3000,
    "@endless list@": "[" * 100_000,
    "@deep table@": '{"a": ' * 700 + "1" + "}" * 700,
    "@deep inline@": "{a=" * 300 + "1" + "}" * 300,
    "@fifty levels@": "[" * 50 + "]" * 50,
    "@null@": "null",
    "@large@": "1e999",
    "@empty@": "",
    "@surrogate@": '"\\ud800"',
}
"""What no library writes, by what stands for it until all is text."""

VALUES: list[Any] = [
    *RAW,
    True,
    False,
    0,
    1,
    2,
    -1,
    3.5,
    1.0,
    -0.0,
    2**31,
    2**60,
    2**63,
    10**30,
    10**400,
    1e300,
    "",
    "x",
    "9" * 400 + "GiB",
    "../../elsewhere",
    "/etc/passwd",
    "a\x00b",
    "[/red]\x1b[31m\n",
    "é" * 2000,
    [],
    {},
    [[]],
    [1, "x", None],
    {"a": {"b": []}},
    [0] * 100,
    list(range(2, 40)),
    {"style": []},
]


BYTES = [b"\xff", b"\x00", b"\xed\xa0\x80", b"[", b"{", b'"', b"9" * 40, b"\n", b"-"]


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every place in plain data: what holds it, and by which key."""
    found: list[tuple[Any, Any]] = []
    for key in list(data) if isinstance(data, dict) else range(len(data)):
        found.append((data, key))
        if isinstance(data[key], dict | list):
            found += places(data[key])
    return found


def changed(data: Any, rng: random.Random) -> Any:
    """Plain data with a few changes."""
    data = json.loads(json.dumps(data))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        there = places(data)
        if not there:
            break
        holder, key = rng.choice(there)
        how = rng.randrange(7)
        value = json.loads(json.dumps(rng.choice(VALUES)))
        if how <= 2:
            holder[key] = value
        elif how == 3:
            del holder[key]
        elif how == 4:
            other, at = rng.choice(there)
            holder[key] = json.loads(json.dumps(other[at])) if _has(other, at) else value
        elif isinstance(holder, dict):
            name = rng.choice([str(key) + "x", "", "../x", "a.b", "é", "[/x]"])
            holder[name] = holder.pop(key) if how == 5 else value
        else:
            holder.insert(rng.randrange(len(holder) + 1), value)
    return data


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def as_json(data: Any, rng: random.Random) -> bytes:
    """The text of plain data, now and then with a key that is there twice."""
    text = json.dumps(data, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.05 and isinstance(data, dict) and data:
        text = f"{text[:-1]}, {json.dumps(next(iter(data)))}: 1}}"
    return _raw(text)


def as_toml(data: Any, rng: random.Random) -> bytes:
    """The same as TOML, which has no null."""
    return _raw(tomli_w.dumps(_without_null(data)))


def _without_null(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _without_null(value) for name, value in data.items()}
    if isinstance(data, list):
        return [_without_null(value) for value in data]
    return "@null@" if data is None else data


def _raw(text: str) -> bytes:
    for mark, raw in RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text.encode()


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes with a few changes."""
    found = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        start = rng.randrange(len(found) + 1)
        end = min(len(found), start + rng.choice([1, 1, 8, 64]))
        how = rng.randrange(6)
        if how == 0 and start < len(found):
            found[start] ^= 1 << rng.randrange(8)
        elif how == 1:
            del found[start:end]
        elif how == 2:
            found[start:start] = rng.choice(BYTES)
        elif how == 3:
            del found[start:]
        elif how == 4:
            found[start:start] = found[start:end]
        else:
            found[start:end] = bytes(rng.randrange(256) for _ in range(end - start))
    return bytes(found)


def anything(valid: Any, text: Callable[[Any, random.Random], bytes], rng: random.Random) -> bytes:
    """The content of a file: of changed data, damaged, both, or of no meaning at all."""
    how = rng.randrange(8)
    if how == 0:
        return bytes(rng.randrange(256) for _ in range(rng.choice([0, 1, 9, 200])))
    if how == 1:
        return damaged(text(valid, rng), rng)
    content = text(changed(valid, rng), rng)
    return damaged(content, rng) if how == 2 else content


# -- what is valid ----------------------------------------------------------------------------------------------------


def plan() -> dict[str, Any]:
    """A plan of several kinds at once."""
    profile = capture(workloads.mlp())
    found = make_plan(profile, Cluster.local(4), pp=2, dp_shard=2).to_json()
    found["tensor"], found["tp"] = {"0": "colwise", "1.weight": {"style": "shard", "dim": 0, "parts": [2, 2]}}, 2
    found["recompute"], found["shares"] = {"0": "full"}, [3, 1]
    return found


def cluster() -> dict[str, Any]:
    """A cluster of two kinds of nodes, with measured collectives."""
    found = write_cluster(Cluster.parse("a100-80:2x2+h100-sxm:1x2"))
    found["links"][-1]["collectives"] = [
        {"kind": "all_reduce", "ranks": 2, "stride": 1, "sizes": [1.0, 1e6], "rates": [1e6, 1e9]}
    ]
    found["nodes"][0]["cores"] = 1.5
    return found


class InMemory:
    """A tensor as a checkpoint is made of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.shape = tensor, tuple(tensor.shape)

    def read(self, box: Any) -> torch.Tensor:
        return self.tensor[box]


def checkpoint(directory: Path) -> Path:
    """A checkpoint of step 0."""
    weights = {
        "0.weight": InMemory(torch.arange(6.0).reshape(2, 3)),
        "0.bias": InMemory(torch.zeros(2)),
        "count": InMemory(torch.tensor(3)),
        "none": InMemory(torch.zeros(0, 4, dtype=torch.bfloat16)),
    }
    kinds = {name: "parameter" if "." in name else "buffer" for name in weights}
    return bring(weights, kinds, directory, {"model_type": "none", "layers": [1, {"a": 2}]})


def index(path: Path) -> dict[str, Any]:
    """A checkpoint's index, as one that training saved has it."""
    found = json.loads((path / NAME).read_text())
    found.update(plan=plan(), groups=[{"lr": 0.1, "betas": [0.9, 0.99]}], scheduler={"last_epoch": 1})
    found.update(loss_scale={"scale": 1.0}, values={"optimizer.0.weight.step": 1})
    return signed(found)


def signed(data: Any) -> Any:
    """An index with its checksum right."""
    if not isinstance(data, dict):
        return data
    data = {name: value for name, value in data.items() if name != "checksum"}
    return {**data, "checksum": checksum(json.dumps(data, sort_keys=True).encode())}


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a file of tensors, and its numbers."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def tensors(header: bytes, numbers: bytes) -> bytes:
    """A file of tensors."""
    return len(header).to_bytes(8, "little") + header + numbers
