"""Training that is disturbed, by the command line as a user runs it, and what became of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.folder import complete

TARGET = str(Path(__file__).with_name("fault_target.py"))
WEFT = [sys.executable, "-c", "from weft.cli import main; main()"]
MARK = "FAULT_TRIAL"
LONGEST_S = 240.0
"""Nothing lasts longer: what does, hangs."""


@dataclass
class Run:
    """A run of ``weft train`` on the target, in a session of its own.

    Attributes:
        checkpoints: its directory.
        process: the command.
        mark: what its processes have in their environment.
    """

    checkpoints: Path
    process: subprocess.Popen[bytes]
    mark: str
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def start(
        cls,
        checkpoints: Path,
        *arguments: str,
        fault: str = "",
        command: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> Run:
        """Begin it. ``fault`` is the target's; ``command`` is what the interpreter is started by."""
        mark = uuid.uuid4().hex
        variables = {**os.environ, "OMP_NUM_THREADS": "1", MARK: mark, **(environment or {})}
        variables |= {"FAULT": fault} if fault else {}
        checkpoints.mkdir(parents=True, exist_ok=True)
        logs = [(checkpoints / f"{mark}.{name}").open("wb") for name in ("out", "err")]
        asked = ["--checkpoint", str(checkpoints), "--log-every", "1", "--json", *arguments]
        process = subprocess.Popen(
            [*command, *WEFT, "train", TARGET, *asked],
            stdout=logs[0],
            stderr=logs[1],
            env=variables,
            start_new_session=True,
        )
        for log in logs:
            log.close()
        return cls(checkpoints, process, mark)

    def workers(self) -> list[psutil.Process]:
        """Its worker processes, in the order in which they were started."""
        found = []
        for each in psutil.process_iter(["pid", "environ", "cmdline", "create_time"]):
            variables = each.info["environ"] or {}
            if variables.get(MARK) == self.mark and "RANK" in variables:
                found.append(each)
        return sorted(found, key=lambda each: int(each.info["environ"]["RANK"]))

    def left(self) -> list[psutil.Process]:
        """What is still there of it."""
        return [
            each
            for each in psutil.process_iter(["environ"])
            if (each.info["environ"] or {}).get(MARK) == self.mark and each.status() != psutil.STATUS_ZOMBIE
        ]

    def newest(self) -> int:
        """The step of its newest checkpoint; 0 where there is none."""
        found = complete(self.checkpoints)
        return int(found[0].name.removeprefix("step-")) if found else 0

    def until(self, what: Callable[[], object], seconds: float = LONGEST_S / 2) -> bool:
        """Wait for something, no longer than the run lasts; whether it came."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if what():
                return True
            time.sleep(0.02)
        return bool(what())

    def end(self) -> Ended:
        """Wait for its end, and for that of its processes.

        Raises:
            AssertionError: it hangs, or has left processes behind.
        """
        try:
            code = self.process.wait(LONGEST_S - (time.monotonic() - self.began))
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it hangs; it said {self.said()[-2000:]}") from None
        patience = time.monotonic() + 10
        while self.left() and time.monotonic() < patience:
            time.sleep(0.05)
        if left := [(each.pid, each.name()) for each in self.left()]:
            self.kill()
            raise AssertionError(f"it left processes {left}; it said {self.said()[-2000:]}")
        out = (self.checkpoints / f"{self.mark}.out").read_text()
        return Ended(code, json.loads(out) if code == 0 else None, self.said())

    def said(self) -> str:
        """What it wrote for people."""
        return (self.checkpoints / f"{self.mark}.err").read_text()

    def kill(self) -> None:
        """End all of it."""
        self.process.kill()
        for each in self.left():
            each.send_signal(signal.SIGKILL)
        self.process.wait()


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, its result (None where it failed), and what it said to people."""

    code: int
    result: Any
    said: str

    @property
    def error(self) -> str:
        """The one line about what was wrong."""
        lines = [line for line in self.said.splitlines() if line.startswith("weft: ")]
        assert len(lines) == 1, self.said[-3000:]
        assert "Traceback" not in self.said, self.said[-3000:]
        return lines[0]


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """Everything in a directory's newest checkpoint."""
    found = Checkpoint.open(complete(directory)[0])
    found.verify()
    return {
        name: found.stored(name).read(tuple(slice(0, length) for length in tensor.form.shape))
        for name, tensor in found.index.tensors.items()
    }


def same(one: Path, other: Path, tolerance: float = 0.0) -> None:
    """Whether two runs ended in the same state: to the bit, or to a share of each tensor's norm.

    Raises:
        AssertionError: they did not.
    """
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if not tolerance:
            assert torch.equal(tensor, second[name]), f"{name} is not the same to the bit"
            continue
        difference, norm = (tensor - second[name]).double().norm(), tensor.double().norm()
        assert difference <= tolerance * max(1.0, float(norm)), f"{name} differs by {float(difference)}"
