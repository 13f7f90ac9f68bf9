"""Trials: one fault each, chosen by a seed, in a job that trains; and what must hold after it.

    forward, backward, optimizer    a process kills itself there
    moment                          a process is killed at any moment: what it does then is chance
    saving                          killed while a checkpoint is being written
    restart                         killed, and another of the job's processes again while it starts
    two                             two processes are killed at once
    agent                           the command itself is killed; it is started again with --resume
    stopped                         a process is stopped (SIGSTOP), as on a machine that hangs
    link                            the link between two hosts is taken down (network namespaces; as root)
    disk                            the disk is full: files above a size cannot be written
    truncated, flipped, missing     the newest checkpoint is damaged after the command was killed

A trial ends in training that went on, whose losses and last checkpoint are an undisturbed run's to the bit (to 1e-10
where the plan changed), or in one line of error and checkpoints that load. Nothing hangs, no process is left, and no
more is lost than the steps since the last checkpoint.
"""

from __future__ import annotations

import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hosts
import psutil
import pytest
from faults import TARGET, Ended, Run, same

from weft.capture import capture
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.folder import complete
from weft.cluster import Cluster
from weft.planner import make_plan
from weft.target import Target

STEPS, EVERY = 40, 4
WIDTH = "width=160"  # steps long enough to be met in
TIMEOUT_S = 10
PLANS = {
    "pp2": {"pp": 2, "microbatches": 2},
    "dp2": {"dp_replicate": 2},
    "shard2": {"dp_shard": 2},
    "tp2": {"tp": 2},
    "pp2-dp2": {"pp": 2, "dp_replicate": 2},
}
INSIDE = ("forward", "backward", "optimizer")
KINDS = (
    *INSIDE,
    "moment",
    "saving",
    "restart",
    "two",
    "agent",
    "stopped",
    "link",
    "disk",
    "truncated",
    "flipped",
    "missing",
)


@dataclass(frozen=True)
class Outcome:
    """What became of a trial: how it ended in a few words, and seconds from the fault to the next checkpoint, where
    training went on in the same job."""

    seed: int
    kind: str
    plan: str
    said: str
    recovered_s: float | None


class Trials:
    """Trials that share undisturbed runs. Threads may run some at once.

    Args:
        directory: for checkpoints.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._profile = capture(Target.parse(TARGET, {"width": "160"}).load())
        self._undisturbed: dict[str, list[float]] = {}
        self._making = {plan: threading.Lock() for plan in PLANS}

    def run(self, seed: int, kind: str | None = None) -> Outcome:
        """One trial.

        Raises:
            AssertionError: something does not hold.
        """
        chance = random.Random(seed)
        kind = kind or chance.choice([each for each in KINDS if each != "link" or hosts.missing() is None])
        plan = chance.choice([name for name in PLANS if kind != "link" or name == "pp2"])
        self.undisturbed(plan)
        where = self.directory / f"trial-{seed}"
        trial = _Trial(self, chance, kind, plan, where)
        try:
            said, recovered_s = trial.perform()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {kind} under {plan}: {error}") from error
        shutil.rmtree(where)
        return Outcome(seed, kind, plan, said, recovered_s)

    def file(self, plan: str) -> Path:
        """A plan as a file."""
        path = self.directory / f"{plan}.json"
        if not path.exists():
            choices = PLANS[plan]
            devices = choices.get("pp", 1) * choices.get("dp_replicate", 1)
            devices *= choices.get("dp_shard", 1) * choices.get("tp", 1)
            make_plan(self._profile, Cluster.local(devices), **choices).save(path)
        return path

    def undisturbed(self, plan: str) -> tuple[Path, list[float]]:
        """The checkpoints and losses of a run under a plan that nothing happens to."""
        directory = self.directory / f"undisturbed-{plan}"
        with self._making[plan]:
            if plan not in self._undisturbed:
                ended = Run.start(directory, WIDTH, "--plan", str(self.file(plan)), "--steps", str(STEPS)).end()
                assert ended.code == 0, ended.said
                self._undisturbed[plan] = ended.result["losses"]
        return directory, self._undisturbed[plan]


@dataclass
class _Trial:
    trials: Trials
    chance: random.Random
    kind: str
    plan: str
    directory: Path

    def perform(self) -> tuple[str, float | None]:
        """Do it, and look at what became of it."""
        if self.kind in INSIDE:
            step, rank = self.chance.randrange(1, STEPS - 1), self.chance.randrange(2)
            return self.goes_on(self.start(fault=f"{self.kind}:{step}:{rank}:SIGKILL"), lambda run: None)
        ways: dict[str, Callable[[], tuple[str, float | None]]] = {
            "moment": lambda: self.goes_on(self.start(), self.killed),
            "saving": lambda: self.goes_on(self.start(), self.killed_saving),
            "restart": lambda: self.goes_on(self.start(), self.killed_restarting),
            "two": lambda: self.goes_on(self.start(), lambda run: self.killed(run, 2)),
            "stopped": lambda: self.goes_on(self.start(), self.stopped),
            "agent": lambda: self.resumed(lambda newest: None),
            "truncated": lambda: self.resumed(self.truncated),
            "flipped": lambda: self.resumed(self.flipped),
            "missing": lambda: self.resumed(lambda newest: self.chance.choice(sorted(newest.iterdir())).unlink()),
            "disk": self.disk,
            "link": self.link,
        }
        return ways[self.kind]()

    def start(self, *arguments: str, fault: str = "") -> Run:
        asked = ["--plan", str(self.trials.file(self.plan)), "--steps", str(STEPS), "--checkpoint-every", str(EVERY)]
        asked += ["--restarts", "4", "--timeout", str(TIMEOUT_S), *arguments]
        return Run.start(self.directory, WIDTH, *asked, fault=fault)

    # -- what happens -------------------------------------------------------------------------------------------------

    def somewhere(self, run: Run) -> None:
        """Wait for a moment in training."""
        step = self.chance.randrange(0, STEPS // 2)
        assert run.until(lambda: run.newest() >= step // EVERY * EVERY and run.workers()), run.said()
        time.sleep(self.chance.uniform(0, 2 if step < EVERY else 0.5))

    def killed(self, run: Run, count: int = 1) -> None:
        self.somewhere(run)
        workers = run.workers()
        for worker in self.chance.sample(workers, min(count, len(workers))):
            _signal(worker, signal.SIGKILL)

    def killed_saving(self, run: Run) -> None:
        assert run.until(lambda: run.newest() >= EVERY), run.said()
        run.until(lambda: next(self.directory.glob(".step-*.new"), None), 20)
        time.sleep(self.chance.uniform(0, 0.01))
        if workers := run.workers():
            _signal(self.chance.choice(workers), signal.SIGKILL)

    def killed_restarting(self, run: Run) -> None:
        self.killed(run)
        before = {worker.pid for worker in run.workers()}
        run.until(lambda: {worker.pid for worker in run.workers()} - before, 30)
        time.sleep(self.chance.uniform(0, 5))
        if fresh := [worker for worker in run.workers() if worker.pid not in before]:
            _signal(self.chance.choice(fresh), signal.SIGKILL)

    def stopped(self, run: Run) -> None:
        self.somewhere(run)
        if workers := run.workers():
            _signal(self.chance.choice(workers), signal.SIGSTOP)

    def truncated(self, newest: Path) -> None:
        path = self.chance.choice(sorted(newest.iterdir()))
        content = path.read_bytes()
        path.write_bytes(content[: self.chance.randrange(len(content))])

    def flipped(self, newest: Path) -> None:
        path = self.chance.choice(sorted(newest.iterdir()))
        content = bytearray(path.read_bytes())
        content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
        path.write_bytes(content)

    # -- what must hold -----------------------------------------------------------------------------------------------

    def goes_on(self, run: Run, fault: Callable[[Run], None]) -> tuple[str, float | None]:
        """A job that starts its processes again by itself."""
        fault(run)
        newest, moment, recovered_s = run.newest(), time.monotonic(), None
        if self.kind not in INSIDE and newest < STEPS and run.until(lambda: run.newest() > newest + EVERY):
            recovered_s = time.monotonic() - moment
        ended = run.end()
        if self.kind == "restart" and ended.code == 1:  # killed while it started, twice in a row
            assert "gave up: it died while it started twice in a row" in ended.error
            ended = self.again()
            self.as_undisturbed(ended, newest)
            return f"gave up while it started; started again, went on from step {ended.result['first_step']}", None
        assert ended.code == 0, ended.said[-2000:]
        self.as_undisturbed(ended, newest)
        count = len(ended.result["deaths"])
        return (
            f"went on from step {ended.result['first_step']} after {count} restart{'s' if count != 1 else ''}",
            recovered_s,
        )

    def resumed(self, damage: Callable[[Path], object]) -> tuple[str, float | None]:
        """A command that is killed and started again."""
        run = self.start()
        assert run.until(lambda: run.newest() >= 2 * EVERY), run.said()
        time.sleep(self.chance.uniform(0, 0.3))
        run.process.send_signal(signal.SIGKILL)
        run.process.wait()
        patience = time.monotonic() + 10
        while run.left() and time.monotonic() < patience:
            time.sleep(0.05)
        assert not run.left(), "processes outlive the command"
        newest = complete(self.directory)
        damage(newest[0])
        ended = self.start("--resume").end()
        assert ended.code == 0, ended.said[-2000:]
        at = int(newest[0].name.removeprefix("step-")) - (0 if self.kind == "agent" else EVERY)
        assert ended.result["first_step"] == at, (ended.result["first_step"], newest)
        self.as_undisturbed(ended, at)
        return f"went on from step {at}", None

    def again(self) -> Ended:
        """After an error: the checkpoints that are there are whole, and training goes on from them."""
        found = complete(self.directory)
        for path in found:
            Checkpoint.open(path).verify()
        ended = self.start(*(["--resume"] if found else [])).end()
        assert ended.code == 0, ended.said[-2000:]
        return ended

    def disk(self) -> tuple[str, float | None]:
        """The command cannot write a whole checkpoint any more."""
        size = self.chance.randrange(1000, 60_000)
        run = self.start()
        assert run.until(lambda: run.newest() >= EVERY), run.said()
        for worker in run.workers():
            resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (size, size))
        ended = run.end()
        if ended.code == 0:  # processes that were started again have room
            self.as_undisturbed(ended, 0)
            assert "could not be written" in ended.said, ended.said[-2000:]
            return f"said so, and went on from step {ended.result['first_step']}", None
        assert "could not be written" in ended.error, ended.error
        assert not list(self.directory.glob(".step-*")), "half a checkpoint is left"
        newest = run.newest()
        self.as_undisturbed(self.again(), newest)
        return "one error; went on where there was room again", None

    def link(self) -> tuple[str, float | None]:
        """Two hosts lose each other; the one where they meet goes on alone."""
        self.directory.mkdir(parents=True)
        cluster = self.directory / "cluster.toml"
        Cluster.local(2).save(cluster)
        with hosts.hosts(2) as network:
            asked = ["--cluster", str(cluster), "--steps", str(STEPS), "--checkpoint-every", str(EVERY)]
            asked += ["--restarts", "4", "--timeout", str(TIMEOUT_S), "--devices", "1", "--pp", "2"]
            asked += ["--nodes", "1:2", "--rendezvous", f"{network.addresses[0]}:29400"]
            stays, goes = (Run.start(self.directory, WIDTH, *asked, command=command) for command in network.commands)
            try:
                assert stays.until(lambda: stays.newest() >= EVERY), (stays.said(), goes.said())
                newest, moment, recovered_s = stays.newest(), time.monotonic(), None
                down = [*network.commands[1], "ip", "link", "set", hosts.CARD, "down"]
                subprocess.run(down, check=True)
                if stays.until(lambda: stays.newest() > newest + EVERY):
                    recovered_s = time.monotonic() - moment
                ended = stays.end()
            finally:
                goes.kill()
        assert ended.code == 0, ended.said[-2000:]
        self.as_undisturbed(ended, newest, 1e-10)
        return f"went on from step {ended.result['first_step']} on one host", recovered_s

    def as_undisturbed(self, ended: Ended, newest: int, tolerance: float = 0.0) -> None:
        """The losses and the last checkpoint are what they would have been; nothing before ``newest`` was lost."""
        directory, losses = self.trials.undisturbed(self.plan)
        first = ended.result["first_step"]
        assert first >= newest, f"it went on from step {first} where a checkpoint of step {newest} was"
        expected = losses[first:]
        assert ended.result["losses"] == (pytest.approx(expected, rel=tolerance) if tolerance else expected)
        same(self.directory, directory, tolerance)


def _signal(process: psutil.Process, number: int) -> None:
    """Send a signal to a process, if it is still there."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
