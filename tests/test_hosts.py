"""Hosts made of network namespaces: links are measured as they were made, plans train across them, nothing stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import hosts
import psutil
import pytest
from test_equality import plan_for
from workloads import code_lm

from weft.cluster import Cluster, measure
from weft.jobs.verify import Verification, verify_here
from weft.runtime.pool import Place, Pool

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(hosts.missing() is not None, reason=f"no hosts here: {hosts.missing()}"),
]
BITS_PER_S = 1e8


@pytest.fixture(scope="module")
def network() -> Iterator[hosts.Network]:
    """Two hosts with cards of 100 Mbit/s."""
    with hosts.hosts(2, bits_per_s=BITS_PER_S) as network:
        yield network


@pytest.fixture(scope="module")
def across(network: hosts.Network) -> Iterator[Pool]:
    """Two processes on each of them."""
    places = [network.place(rank // 2) for rank in range(4)]
    with Pool(4, device="cpu", timeout_s=60, places=places, address=network.address) as pool:
        yield pool


@pytest.fixture(scope="module")
def measured(across: Pool) -> Cluster:
    return across.run(measure)[0]


@pytest.mark.long
def test_links_are_measured_at_both_levels(measured: Cluster):
    # Two hosts of a busy machine may seem unlike: which are alike is the question of test_cluster_kinds.
    assert (sum(node.count for node in measured.nodes), measured.devices_per_node) == (2, 2)
    inside, between = measured.links
    assert inside.bytes_per_s * 8 > 5 * BITS_PER_S
    # Two processes share the card, one has it to itself.
    assert between.bytes_per_s * 8 == pytest.approx(BITS_PER_S / 2, rel=0.2)
    assert between.alone_bytes_per_s is not None
    assert between.alone_bytes_per_s * 8 == pytest.approx(BITS_PER_S, rel=0.2)
    assert inside.alone_bytes_per_s is None


def test_collectives_across_hosts_take_as_long_as_their_bytes(measured: Cluster):
    # In a ring of n ranks every rank passes on 2 (n - 1) / n of the tensor; one of four goes out of each host, and both
    # of two groups do.
    size, card = 2**22, BITS_PER_S / 8
    for ranks, stride, crossing in ((4, 1, 2 * 3 / 4), (2, 2, 2 * 2 * 1 / 2)):
        (reduce,) = measured.links[1].measured("all_reduce", stride)
        assert reduce.ranks == ranks
        # Never faster than the card; between its rounds a collective leaves it idle for a while.
        assert 0.95 < size / reduce.rates.at(size) / (crossing * size / card) < 1.5
    assert [(c.ranks, c.stride) for c in measured.links[0].measured("all_reduce", 2)] == [(2, 1)]


@pytest.mark.parametrize("degrees", [{"pp": 2, "tp": 2}, {"dp_replicate": 2, "dp_shard": 2}])
def test_a_plan_across_hosts_equals_one_device(across: Pool, degrees: dict[str, int]):
    plan = plan_for(code_lm(), degrees, microbatches=2)
    result = across.run(lambda: verify_here(code_lm(), plan, steps=2, dtype="float64"))[0]
    assert isinstance(result, Verification)
    assert result.ok, result


@pytest.mark.long
def test_weft_cluster_measures_the_job_it_is_started_in(network: hosts.Network):
    # What torchrun does on every host: a process with the job's variables.
    variables = {
        "MASTER_ADDR": network.addresses[0],
        "MASTER_PORT": "29500",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
    }
    processes = []
    for rank in range(2):
        place = network.place(rank)
        environment = {**os.environ, **variables, **place.environment, "RANK": str(rank)}
        command = [*place.command, sys.executable, "-c", "from weft.cli import main; main()", "cluster", "--json"]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (out for out, _ in outputs)
    assert second == ""
    found = json.loads(first)
    (link,) = found["links"]
    assert [node["devices"] for node in found["nodes"] for _ in range(node["count"])] == [1, 1]
    assert link["bytes_per_s"] * 8 == pytest.approx(BITS_PER_S, rel=0.2)


SPIN = """
import time
began, spent = time.perf_counter(), time.thread_time()
while time.perf_counter() - began < 0.5:
    pass
print((time.thread_time() - spent) / (time.perf_counter() - began))
"""


def test_a_slow_process_gets_its_share_of_a_core():
    with hosts.slowed(Place(), 0.25) as slow:
        done = subprocess.run([*slow.command, sys.executable, "-c", SPIN], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.3  # a busy machine gives less


def test_nothing_stays_even_after_an_error():
    def there() -> tuple[set[str], set[str], set[int]]:
        cards = {name for name in psutil.net_if_addrs() if name.startswith("weft")}
        groups = {group.name for group in hosts.CPU_GROUPS.glob("weft-*")}
        return cards, groups, {process.pid for process in psutil.Process().children(recursive=True)}

    before = there()

    def fail() -> None:
        with hosts.hosts(2, bits_per_s=1e9), hosts.slowed(Place(), 0.5, "failing"):
            inside = there()
            assert all(len(now - then) for now, then in zip(inside, before, strict=True))
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert there() == before
