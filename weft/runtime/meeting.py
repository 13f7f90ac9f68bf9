"""Meeting: where the processes and machines of a job find each other, and on which network card.

PyTorch's stores listen on every network card of a machine, and its rendezvous unpickles what it finds there. Here they
listen on one address only: the one of the job itself, or, on several machines, the one that leads to where they meet.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import re
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
from torch._C._distributed_c10d import TCPStore  # torch.distributed has it too, but not for type checkers
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousInfo
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from weft.errors import InputError
from weft.runtime.register import READING, Register, SilentError, answer

LOOPBACK = "127.0.0.1"
BACKLOG = 2048
"""Processes that may knock at once."""

LAST_CALL, ALIVE_EVERY_S, ALIVE_MISSED = timedelta(seconds=4), 1, 4
"""How long nodes that could be more wait for another; how often each says that it is there; and how many of these it
may miss before the others go on without it: each host counts that by itself (``register``)."""

JOINING, CLOSING = timedelta(minutes=10), timedelta(seconds=10)
KNOCK_S, PAUSE_S = 2.0, 0.2
"""How long a host waits to be let in before it tries again, and the pause before it does."""

WELCOME = timedelta(seconds=10)
"""How long what listens at the place may take to show that it is a store."""


class LostNodeError(RendezvousError):
    """A round that lacks a node already: it is over, and there has to be another."""


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The machines of a job: so many at least and at most, and ``host:port`` where they meet; None: this one only."""

    least: int = 1
    most: int = 1
    rendezvous: str | None = None

    def __post_init__(self) -> None:
        host, _, port = (self.rendezvous or "here:1").rpartition(":")
        if not re.fullmatch(r"[\w.-]+|\[[0-9A-Fa-f:.]+\]", host) or not re.fullmatch(r"[0-9]{1,5}", port, re.ASCII):
            raise InputError(f"--rendezvous {self.rendezvous}: write HOST:PORT, as in 10.0.0.1:29400")
        if not 0 < int(port) < 2**16:
            raise InputError(f"--rendezvous {self.rendezvous}: there is no port {port}; the largest is 65535")

    @property
    def place(self) -> tuple[str, int]:
        """Address and port where they meet; port 0 is any.

        Raises:
            InputError: that is no place, or none that the other machines can reach.
        """
        if self.rendezvous is None:
            return LOOPBACK, 0
        host, _, port = self.rendezvous.rpartition(":")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except OSError as error:
            raise InputError(f"--rendezvous {self.rendezvous}: {host} is no machine: {error.strerror}") from error
        addresses = [str(each[4][0]) for each in found]
        place = next((each for each in addresses if not is_loopback(each)), addresses[0])
        # A host's own name may be 127.0.1.1 on that host, and on no other (Debian's /etc/hosts).
        if self.most > 1 and is_loopback(place) and not (is_loopback(host.strip("[]")) or host.startswith("localhost")):
            raise InputError(
                f"--rendezvous {self.rendezvous}: {host} is {place} on this machine, where no other machine can reach "
                f"it; give the address it has on the network of the others, as in 10.0.0.1:{port}"
            )
        return place, int(port)

    @property
    def address(self) -> str:
        """This machine's own address on the way there."""
        place, port = self.place
        family = socket.AF_INET6 if ":" in place else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # nothing is sent: the way is looked up
            try:
                probe.connect((place, port or 1))
            except OSError as error:
                raise InputError(
                    f"--rendezvous {self.rendezvous}: {place} cannot be reached: {error.strerror}"
                ) from error
            return str(probe.getsockname()[0])


def is_loopback(address: str) -> bool:
    """Whether an address is this machine's in any case; a name is none."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def is_here(address: str) -> bool:
    """Whether an address is this machine's."""
    return is_loopback(address) or card_of(address.partition("%")[0]) is not None


def card_of(address: str) -> str | None:
    """The network card that has an address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return str(name)
    return None


def store_at(address: str, port: int = 0) -> TCPStore:
    """A store that listens on one address of this machine.

    Raises:
        OSError: somebody listens there already, or nobody may.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((address, port))
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    own = listening.getsockname()[1]
    return TCPStore(
        address, own, is_master=True, wait_for_workers=False, timeout=READING, master_listen_fd=listening.detach()
    )


def store_of(nodes: Nodes) -> TCPStore:
    """The store of a job's machines: kept here if this is the place, and nobody here keeps it already.

    Raises:
        InputError: nobody is there, or somebody else is.
    """
    place, port = nodes.place
    here = is_here(place)
    if here:
        try:
            return store_at(place, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise InputError(
                    f"--rendezvous {nodes.rendezvous}: this machine cannot be met at {place}, port {port}: "
                    f"{error.strerror}; choose another port"
                ) from error
    _knock(nodes, READING if here else JOINING)
    try:
        store = answer(lambda: TCPStore(place, port, is_master=False, timeout=WELCOME), 2 * WELCOME)
    except (RuntimeError, SilentError) as error:
        raise InputError(
            f"--rendezvous {nodes.rendezvous}: what listens at {place}, port {port} is no job; choose another port"
        ) from error
    store.set_timeout(READING)
    return store


def _knock(nodes: Nodes, patience: timedelta) -> None:
    """Wait until somebody listens at the place, in attempts that are short: in between signals are heard.

    Raises:
        InputError: nobody does.
    """
    place, port = nodes.place
    until = time.monotonic() + patience.total_seconds()
    while True:
        try:
            return socket.create_connection((place, port), KNOCK_S).close()
        except OSError as error:
            if time.monotonic() > until:
                raise InputError(
                    f"--rendezvous {nodes.rendezvous}: nobody listens at {place}, port {port}; start the job "
                    "there too, and give the address which that machine has on this network"
                ) from error
        time.sleep(PAUSE_S)


class Meeting(DynamicRendezvousHandler):
    """PyTorch's rendezvous, whose stores listen on this machine's own address only, and are new in every round."""

    @classmethod
    def of(cls, nodes: Nodes, run_id: str) -> Meeting:
        """The meeting of a job, seen from this machine, which keeps it if it is the place.

        Raises:
            InputError: there is no such place, nobody is there, or somebody else.
        """
        store = store_of(nodes)
        try:
            register = Register(store, run_id, LAST_CALL)
        except RendezvousError as error:
            raise InputError(f"--rendezvous {nodes.rendezvous}: who was there has just left; try again") from error
        made = cls.from_backend(
            run_id,
            store,
            register,
            nodes.least,
            nodes.most,
            nodes.address,
            RendezvousTimeout(join=JOINING, last_call=LAST_CALL, close=CLOSING),
            keep_alive_interval=ALIVE_EVERY_S,
            keep_alive_max_attempt=ALIVE_MISSED,
        )
        assert isinstance(made, cls)
        return made

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet.

        Raises:
            LostNodeError: a node was there and is gone. The others have found the same, or will.
            RendezvousError: as PyTorch's.
        """
        found: RendezvousInfo = super().next_rendezvous()
        if not max(found.rank + 1, self.settings.min_nodes) <= found.world_size:
            raise LostNodeError(f"{found.world_size} nodes are left of a round of at least {self.settings.min_nodes}")
        return found

    def leave(self) -> None:
        """Say no more that this node is there; the others may go on."""
        with contextlib.suppress(SilentError):  # a last word that is on its way over a dead link is not waited for
            answer(self._stop_heartbeats, timedelta(seconds=ALIVE_EVERY_S))

    def _create_tcp_store_server(self, master_addr: str, master_port: int) -> TCPStore:
        """Where a round's processes meet."""
        return store_at(master_addr, master_port)

    def forget_processes(self) -> None:
        """Have the next round's processes meet at a new store. The one before has the addresses of those that are gone,
        and Gloo calls them; and a node that was not the first would look for it where the first one was (found in torch
        2.13)."""
        this: Any = self
        this._bootstrap_store_info = this._shared_tcp_store_server = None
