"""Two hosts in network namespaces: one is killed and returns, the losses stay those of an undisturbed run; and nobody
listens on a network card that the job has nothing to do with."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import hosts
import psutil
import pytest
from faults import Run, same

from weft.cluster import Cluster
from weft.runtime.launch import launch
from weft.runtime.meeting import LOOPBACK

STEPS, EVERY = 300, 10
WIDTH = "width=160"  # so that the job lasts until the host has returned
WITH_HOSTS = [
    pytest.mark.root,
    pytest.mark.skipif(hosts.missing() is not None, reason=f"no hosts here: {hosts.missing()}"),
]


@pytest.fixture
def network() -> Iterator[hosts.Network]:
    with hosts.hosts(2) as network:
        yield network


def start(network: hosts.Network, host: int, directory: Path, *arguments: str) -> Run:
    cluster = directory.with_name("cluster.toml")
    if not cluster.exists():
        Cluster.local(4).save(cluster)  # measuring takes its time, and is another test's
    asked = ["--devices", "2", "--cluster", str(cluster), "--steps", str(STEPS)]
    asked += ["--checkpoint-every", str(EVERY), "--restarts", "3"]
    meeting = ["--nodes", "1:2", "--rendezvous", f"{network.addresses[0]}:29400"]
    return Run.start(directory, WIDTH, *asked, *meeting, *arguments, command=network.commands[host])


@pytest.mark.root
@pytest.mark.skipif(hosts.missing() is not None, reason=f"no hosts here: {hosts.missing()}")
@pytest.mark.long
def test_a_host_is_killed_and_returns(network: hosts.Network, tmp_path: Path) -> None:
    directory, alone = tmp_path / "disturbed", tmp_path / "undisturbed"
    ended = Run.start(alone, WIDTH, "--devices", "2", "--steps", str(STEPS)).end()
    assert ended.code == 0, ended.said
    losses = ended.result["losses"]

    directory.mkdir()
    stays, goes = start(network, 0, directory), start(network, 1, directory)
    assert stays.until(lambda: stays.newest() >= 20), (stays.said(), goes.said())
    goes.kill()
    killed, before = time.monotonic(), stays.newest()
    assert stays.until(lambda: stays.newest() > before + EVERY), stays.said()
    print(f"{time.monotonic() - killed:.1f} s from the kill of a host to the next checkpoint")
    returns = start(network, 1, directory, "--resume")
    ended, also = stays.end(), returns.end()
    assert ended.code == also.code == 0, (ended.said, also.said)
    plans = [line for line in ended.said.splitlines() if "measuring" in line]
    print(plans)
    first = ended.result["first_step"]
    assert first > before
    assert ended.result["losses"] == pytest.approx(losses[first:], rel=1e-8)
    assert ended.result["losses"] == also.result["losses"]
    degrees = ended.result["plan"]
    assert degrees["pp"] * degrees["dp_replicate"] * degrees["dp_shard"] * degrees["tp"] == 4
    same(directory, alone, 1e-8)


@pytest.mark.root
@pytest.mark.skipif(hosts.missing() is not None, reason=f"no hosts here: {hosts.missing()}")
@pytest.mark.long
def test_a_host_whose_link_is_dead_ends_with_an_error(network: hosts.Network, tmp_path: Path) -> None:
    directory = tmp_path / "cut"
    directory.mkdir()
    stays, cut = (start(network, host, directory, "--timeout", "10") for host in (0, 1))
    assert stays.until(lambda: stays.newest() >= 10), (stays.said(), cut.said())
    subprocess.run([*network.commands[1], "ip", "link", "set", hosts.CARD, "down"], check=True)
    began, before = time.monotonic(), stays.newest()
    assert stays.until(lambda: stays.newest() > before + EVERY), stays.said()
    ended = cut.end()  # no sooner than its store has been silent for so long
    print(f"{time.monotonic() - began:.1f} s from the cut of a host's link to its end")
    stays.kill()
    assert ended.code == 1, ended.said
    assert "cannot be met any more" in ended.error


def test_a_job_listens_on_loopback_only() -> None:
    def listening() -> list[str]:
        family = [psutil.Process(), psutil.Process().parent()]
        return [c.laddr.ip for each in family for c in each.net_connections("tcp") if c.status == psutil.CONN_LISTEN]

    mine = {c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    found = launch(listening, devices=2, device="cpu")
    everywhere = [address for addresses in found for address in addresses if address != LOOPBACK]
    assert len(everywhere) <= 2 * len([1 for address in mine if address.ip != LOOPBACK]), found
    assert all(LOOPBACK in addresses for addresses in found)
