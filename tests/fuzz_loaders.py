"""Fuzzing of what reads files that anybody may have written: plans, clusters, and checkpoints' indexes and headers.

    pip install -e '.[dev,fuzz]'
    python tests/fuzz_loaders.py plan -max_total_time=200        # or cluster, or checkpoint; options are libFuzzer's
    python tests/fuzz_loaders.py plan --without-atheris 200      # seconds; where there is no Atheris: blind mutations

A loader may return, or raise an InputError; whatever else it raises is a crash, and its input is kept beside.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST = 20_000
"""Bytes of an input."""
SPLIT = b"\n\x00tensors\x00\n"
"""Between a checkpoint's index and its file of tensors, in an input."""


class Loader:
    """What is fuzzed, in a directory of its own.

    Attributes:
        seeds: valid inputs.
        runs: inputs so far; ``accepted`` of them were valid.
    """

    def __init__(self, kind: str, directory: Path) -> None:
        import mutations  # here, so that Atheris has seen to the imports

        self.mutations, self.directory = mutations, directory
        self.runs = self.accepted = 0
        self.read: Callable[[bytes], None] = getattr(self, f"read_{kind}")
        self._text: Callable[[Any, random.Random], bytes] = mutations.as_json
        if kind == "plan":
            self.valid = mutations.plan()
        elif kind == "cluster":
            self.valid, self._text = mutations.cluster(), mutations.as_toml
        else:
            path = mutations.checkpoint(directory / "valid")
            self.valid = mutations.index(path)
            self._header, self._numbers = mutations.header(path / mutations.FILE)
        self.kind = kind
        self.seeds = [self._joined(self._text(self.valid, random.Random(0)), lambda header: header)]

    def _joined(self, content: bytes, change: Callable[[Any], Any]) -> bytes:
        """The input of a file's content; of a checkpoint, with its file of tensors behind."""
        if self.kind != "checkpoint":
            return content
        header = self.mutations.as_json(change(self._header), random.Random(0))
        return content + SPLIT + self.mutations.tensors(header, self._numbers)

    def mutated(self, content: bytes, rng: random.Random) -> bytes:
        """Another input: of valid data with a few changes, or of this one."""
        how = rng.randrange(4)
        if how == 0:
            return self.mutations.damaged(content, rng)
        if how == 1:
            return self._joined(self._text(self.valid, rng), lambda header: self.mutations.changed(header, rng))
        return self._joined(self._text(self.mutations.changed(self.valid, rng), rng), lambda header: header)

    def __call__(self, content: bytes) -> None:
        """Read an input. Raises what no loader may raise."""
        from weft.errors import InputError

        self.runs += 1
        try:
            self.read(content)
            self.accepted += 1
        except InputError:
            return

    def read_plan(self, content: bytes) -> None:
        """As ``--plan`` does; a plan that is read can be told of, and written."""
        from weft.plan import Plan

        path = self.directory / "plan.json"
        path.write_bytes(content)
        plan = Plan.load(path)
        assert plan.describe()
        assert plan.explain()
        assert Plan.from_json(plan.to_json()) == plan

    def read_cluster(self, content: bytes) -> None:
        """As ``--cluster`` does."""
        from weft.cluster import Cluster
        from weft.cluster.file import Table, read_cluster, write_cluster

        path = self.directory / "cluster.toml"
        path.write_bytes(content)
        cluster = Cluster.load(path)
        assert cluster.devices > 0
        assert read_cluster(Table(write_cluster(cluster), "again")) == cluster

    def read_checkpoint(self, content: bytes) -> None:
        """As ``--resume`` does, with the checksum right: someone who wants harm would see to it."""
        from weft.checkpoint.checkpoint import Checkpoint
        from weft.checkpoint.verbs import contents

        folder = self.directory / "step-00000000"
        folder.mkdir(exist_ok=True)
        text, _, file = content.partition(SPLIT)
        (folder / self.mutations.FILE).write_bytes(file)
        try:
            data = json.loads(text)
            if isinstance(data, dict) and isinstance(data.get("files"), dict) and self.mutations.FILE in data["files"]:
                data["files"][self.mutations.FILE] = len(file)
            text = json.dumps(self.mutations.signed(data)).encode()
        except (ValueError, RecursionError):
            pass
        (folder / "checkpoint.json").write_bytes(text)
        found = Checkpoint.open(folder)
        found.verify()
        contents(found.index)
        for name, tensor in found.index.tensors.items():
            found.stored(name).read(tuple(slice(0, length) for length in tensor.form.shape))


def blindly(loader: Loader, seconds: float) -> None:
    """Mutations without looking at what they reach."""
    seed = random.randrange(2**32)
    rng, end = random.Random(seed), time.monotonic() + seconds
    print(f"seed {seed}")
    while time.monotonic() < end:
        content = rng.choice(loader.seeds)
        for _ in range(rng.choice([1, 1, 2, 5])):
            content = loader.mutated(content, rng)
        try:
            loader(content)
        except BaseException:
            path = Path(f"crash-{hashlib.sha1(content).hexdigest()}")
            path.write_bytes(content)
            print(f"crash of {loader.kind}: its input is in {path}")
            raise


def main() -> None:
    """See the head of this file."""
    kind = sys.argv[1] if len(sys.argv) > 1 else ""
    if kind not in ("plan", "cluster", "checkpoint"):
        sys.exit(__doc__)
    without = sys.argv[2:3] == ["--without-atheris"]
    if not without:
        import atheris

        with atheris.instrument_imports(include=["weft.plan", "weft.plain", "weft.cluster", "weft.checkpoint"]):
            importlib.import_module("mutations")
    with tempfile.TemporaryDirectory() as name:
        loader = Loader(kind, Path(name))
        began = time.monotonic()

        def tell() -> None:
            seconds = time.monotonic() - began
            print(f"{kind}: {loader.runs} inputs, {loader.accepted} of them valid, in {seconds:.0f} s", flush=True)

        if without:
            blindly(loader, float(sys.argv[3]))
            tell()
            return

        def mutator(content: bytes, longest: int, seed: int) -> bytes:
            if seed % 2:
                return bytes(atheris.Mutate(content, longest))
            return loader.mutated(content, random.Random(seed))[:longest]

        def one(content: bytes) -> None:
            loader(content)
            if loader.runs % 10_000 == 0:
                tell()

        corpus = Path(name) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(loader.seeds):
            (corpus / str(number)).write_bytes(seed)
        again = any(Path(argument).is_file() for argument in sys.argv[2:])
        options = [f"-max_len={LONGEST}", *sys.argv[2:], *([] if again else [str(corpus)])]
        atheris.Setup([sys.argv[0], *options], one, custom_mutator=mutator)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
