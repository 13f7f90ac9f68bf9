"""Meeting: where the processes and machines of a job find each other, and on which network card.

PyTorch's stores listen on every network card of a machine, and its rendezvous unpickles what it finds there. Here they
listen on one address only: the one of the job itself, or, on several machines, the one that leads to where they meet.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
from torch._C._distributed_c10d import TCPStore  # torch.distributed has it too, but not for type checkers
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from weft.errors import InputError

LOOPBACK = "127.0.0.1"
BACKLOG = 2048
"""Processes that may knock at once."""

LAST_CALL, ALIVE_EVERY_S, ALIVE_MISSED = timedelta(seconds=4), 1, 4
"""How long nodes that could be more wait for another; how often each says that it is there; and how many of these it
may miss before the others go on without it."""

JOINING, CLOSING = timedelta(minutes=10), timedelta(seconds=10)
READING = timedelta(seconds=60)


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
            InputError: that is no place.
        """
        if self.rendezvous is None:
            return LOOPBACK, 0
        host, _, port = self.rendezvous.rpartition(":")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except OSError as error:
            raise InputError(f"--rendezvous {self.rendezvous}: {host} is no machine: {error.strerror}") from error
        return str(found[0][4][0]), int(port)

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


def card_of(address: str) -> str | None:
    """The network card that has an address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return str(name)
    return None


def store_at(address: str, port: int = 0, *, timeout: timedelta = READING) -> TCPStore:
    """A store that listens on one address of this machine.

    Raises:
        OSError: somebody listens there already.
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
        address, own, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listening.detach()
    )


class Meeting(DynamicRendezvousHandler):
    """PyTorch's rendezvous, whose stores listen on this machine's own address only, and are new in every round."""

    @classmethod
    def of(cls, nodes: Nodes, run_id: str) -> Meeting:
        """The meeting of a job, seen from this machine, which keeps it if it is the place.

        Raises:
            InputError: there is no such place, or nobody is there.
        """
        (place, port), own = nodes.place, nodes.address
        try:
            store = store_at(place, port) if place == own else TCPStore(place, port, is_master=False, timeout=JOINING)
        except OSError:  # another process of this machine keeps it already
            store = TCPStore(place, port, is_master=False, timeout=READING)
        except RuntimeError as error:
            raise InputError(
                f"--rendezvous {nodes.rendezvous}: nobody is there; start the job on {place} too"
            ) from error
        made = cls.from_backend(
            run_id,
            store,
            C10dRendezvousBackend(store, run_id),
            nodes.least,
            nodes.most,
            own,
            RendezvousTimeout(join=JOINING, last_call=LAST_CALL, close=CLOSING),
            keep_alive_interval=ALIVE_EVERY_S,
            keep_alive_max_attempt=ALIVE_MISSED,
        )
        assert isinstance(made, cls)
        return made

    def _create_tcp_store_server(self, master_addr: str, master_port: int) -> TCPStore:
        """Where a round's processes meet."""
        return store_at(master_addr, master_port)

    def forget_processes(self) -> None:
        """Have the next round's processes meet at a new store. The one before has the addresses of those that are gone,
        and Gloo calls them; and a node that was not the first would look for it where the first one was (found in torch
        2.13)."""
        this: Any = self
        this._bootstrap_store_info = this._shared_tcp_store_server = None
