"""Hosts on one machine, for measuring what slow links and slow devices do: network namespaces, each behind a network
card of a given rate, and control groups. Linux, as root.

    this process ── switch ──┬── card of host 0 ── its processes, which talk to each other unshaped
                             └── card of host 1 ── ...

    with hosts(2, bits_per_s=1e8) as network:
        with Pool(4, places=[network.place(rank // 2) for rank in range(4)], address=network.address) as pool:
            pool.run(...)

A namespace lives as long as a process in it, and takes its ends of cables with it: the one that holds it ends when this
process does, however that happens. So nothing is named, and nothing can be left behind. A control group has a name,
with this process's number in it, and is removed at the end.

Cards are shaped both ways by a token bucket (``tc tbf``). Its burst, BURST_BYTES or what BURST_S let through, passes at
once, so a rate is seen on messages that are much larger.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from weft.runtime.pool import Place

CARD = "eth0"
BURST_BYTES = 2**16
"""What the kernel hands to a card at once; a smaller bucket could not hold it."""

BURST_S = 1e-3
QUEUE_S = 0.05
"""Seconds of traffic that wait in a card before more is dropped."""

CPU_GROUPS = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 10_000
"""A process with a share of a core runs and stands still in turns this long; shorter than any step."""


_networks = itertools.count()


@dataclass(frozen=True)
class Network:
    """Hosts that can reach each other and this process.

    Attributes:
        address: of this process.
        addresses: of the hosts.
        commands: by host, what starts a program in it.
    """

    address: str
    addresses: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]

    def place(self, host: int) -> Place:
        """A process of a pool, on this host. Where there are cores enough, every host has its own."""
        return Place(
            node=host,
            command=(*_cores_of(host, len(self.commands)), *self.commands[host]),
            environment={"GLOO_SOCKET_IFNAME": CARD},
        )


@contextlib.contextmanager
def hosts(count: int, *, bits_per_s: float | None = None) -> Iterator[Network]:
    """Make hosts, each with a card of so many bits per second in either direction; None: as fast as memory.

    Raises:
        OSError: this machine cannot; see ``missing``.
    """
    # Names and addresses of its own for every network of every process.
    outside = f"weft{os.getpid()}-{next(_networks)}"
    number = zlib.crc32(outside.encode())
    subnet = f"10.{64 + number // 256 % 128}.{number % 256}"
    with contextlib.ExitStack() as held:
        switch = held.enter_context(_namespace())
        _run(f"ip link add {outside} type veth peer name outside netns {switch}")
        held.callback(_run, f"ip link delete {outside}")  # the kernel would, but only after a while
        _run(f"ip address add {subnet}.254/24 dev {outside}")
        _run(f"ip link set {outside} addrgenmode none up")
        inside_switch = _into(switch)
        _run("ip link add bridge type bridge", inside_switch)
        _run("ip link set bridge addrgenmode none up", inside_switch)
        _run("ip link set outside addrgenmode none master bridge up", inside_switch)
        commands, addresses = [], []
        for host in range(count):
            process = held.enter_context(_namespace())
            commands.append(_into(process))
            addresses.append(f"{subnet}.{host + 1}")
            _run(f"ip link add {CARD} netns {process} type veth peer name port{host} netns {switch}")
            _run(f"ip link set port{host} addrgenmode none master bridge up", inside_switch)
            _run("ip link set lo up", commands[host])
            _run(f"ip address add {addresses[host]}/24 dev {CARD}", commands[host])
            _run(f"ip link set {CARD} addrgenmode none up", commands[host])
            if bits_per_s is not None:
                _shape(CARD, bits_per_s, commands[host])
                _shape(f"port{host}", bits_per_s, inside_switch)
        yield Network(f"{subnet}.254", tuple(addresses), tuple(commands))


@contextlib.contextmanager
def slowed(place: Place, share: float, name: str = "slow") -> Iterator[Place]:
    """The same place for a process that gets this share of a core and no more.

    Raises:
        OSError: this machine cannot; see ``missing``.
    """
    group = CPU_GROUPS / f"weft-{os.getpid()}-{name}"
    group.mkdir()
    try:
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(round(share * PERIOD_US)))
        enter = ("sh", "-c", 'echo $$ > "$0"; exec "$@"', str(group / "cgroup.procs"))
        yield replace(place, command=(*enter, *place.command))
    finally:
        _remove(group)


@functools.cache
def missing() -> str | None:
    """Why there can be no hosts or slow processes here; None if there can."""
    if sys.platform != "linux":
        return f"network namespaces need Linux, and this is {sys.platform}"
    if os.geteuid() != 0:
        return "network namespaces and control groups need root"
    if absent := [name for name in ("ip", "tc", "unshare", "nsenter", "taskset") if shutil.which(name) is None]:
        return f"{absent[0]} is not installed (iproute2 and util-linux have what is needed)"
    try:
        with hosts(1, bits_per_s=1e8), slowed(Place(), 0.5, "trial"):
            return None
    except OSError as error:
        return str(error)


@contextlib.contextmanager
def _namespace() -> Iterator[int]:
    """The number of a process in a network namespace of its own, which lasts as long as the pipe to it."""
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise OSError("a network namespace cannot be made here (unshare --net)")
        yield process.pid


def _into(process: int) -> tuple[str, ...]:
    return ("nsenter", f"--net=/proc/{process}/ns/net")


def _run(command: str, inside: tuple[str, ...] = ()) -> None:
    done = subprocess.run([*inside, *command.split()], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{command}: {done.stderr.strip() or done.returncode}")


def _shape(card: str, bits_per_s: float, inside: tuple[str, ...]) -> None:
    """Let a card send no faster."""
    burst = max(BURST_BYTES, round(bits_per_s / 8 * BURST_S))
    queue_us = round(QUEUE_S * 1e6)
    _run(f"tc qdisc add dev {card} root tbf rate {bits_per_s:.0f}bit burst {burst} latency {queue_us}us", inside)


def _cores_of(host: int, count: int) -> tuple[str, ...]:
    """What keeps a program to the cores of a host; nothing where there are fewer cores than hosts."""
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // count
    if not each or count == 1:
        return ()
    return ("taskset", "-c", ",".join(map(str, cores[host * each : (host + 1) * each])))


def _remove(group: Path) -> None:
    """Remove a control group once its last process has ended."""
    for _ in range(100):
        try:
            return group.rmdir()
        except OSError:
            time.sleep(0.05)
    group.rmdir()
