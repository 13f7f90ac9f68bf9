"""Measuring a job's devices and links from inside."""

import os

import pytest
import torch.distributed as dist

from weft.cluster import Cluster, measure
from weft.errors import ClusterError


def measured(memory_bytes=None, devices_per_node=None):
    return measure(memory_bytes=memory_bytes, devices_per_node=devices_per_node)


@pytest.mark.long
def test_four_processes_agree_on_what_they_are(pool, tmp_path):
    clusters = pool.run(measured, 2**30, ranks=4)
    assert clusters == clusters[:1] * 4
    cluster = clusters[0]
    assert (cluster.devices, cluster.calibration, cluster.memory_bytes) == (4, "measured here", 2**30)
    assert not cluster.device.accelerator
    matmul = cluster.device.matmul["float32"]
    assert all(1e8 < rate < 1e13 for rate in matmul.rates)
    assert 1e-8 < cluster.device.overhead_s < 1e-3
    assert {"pointwise", "transcendental", "normalization", "softmax", "attention"} <= set(cluster.device.rates)
    # The same random numbers cost many times a sum, on every processor.
    assert cluster.device.rates["random"].at(1e6) < cluster.device.rates["pointwise"].at(1e6)
    assert cluster.cores is None or 0 < cluster.cores < 4
    (link,) = cluster.links
    assert link.devices == 4
    assert 0 <= link.busy_s < 0.02
    assert {(c.kind, c.ranks) for c in link.collectives} == {
        (kind, ranks) for kind in ("all_reduce", "all_gather", "reduce_scatter") for ranks in (2, 4)
    }
    cluster.save(tmp_path / "here.toml")
    assert Cluster.load(tmp_path / "here.toml") == cluster


@pytest.mark.long
def test_two_nodes_have_a_link_inside_and_one_between(pool):
    cluster = pool.run(measured, 2**30, 2, ranks=4)[0]
    assert [(link.name, link.devices) for link in cluster.links] == [("inside a node", 2), ("between nodes", 4)]
    assert (sum(node.count for node in cluster.nodes), cluster.devices_per_node) == (2, 2)


def test_one_process_alone_has_no_links():
    cluster = measure()
    assert cluster.links == ()
    assert cluster.cores is None


def test_nodes_must_be_equal(pool):
    with pytest.raises(ClusterError, match="3 devices per node"):
        pool.run(measured, 2**30, 3, ranks=4)


def test_nodes_that_have_lost_devices_are_measured_one_by_one(pool):
    def job():
        os.environ["LOCAL_WORLD_SIZE"] = "2" if dist.get_rank() < 2 else "1"
        return measure(memory_bytes="1GiB")

    cluster = pool.run(job, ranks=3)[0]
    assert (cluster.devices, cluster.devices_per_node, len(cluster.links)) == (3, 1, 1)
