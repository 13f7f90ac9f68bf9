"""Clusters of several kinds of devices: their numbers, nodes and links, and how kinds are told apart when measured."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from planner_profiles import gpt
from rich.console import Console

from weft.cluster import Cluster, Device, Link, Nodes, measure, presets
from weft.cluster.kinds import Rank, kinds_of, nodes_of
from weft.cluster.local import core_share
from weft.cluster.rates import Probe
from weft.errors import ClusterError, InputError, WorkerError
from weft.planner import choose
from weft.quantity import parse_sizes
from weft.report import tables
from weft.runtime.launch import launch
from weft.runtime.pool import Pool


def device(name: str, **changes: Any) -> Device:
    return replace(presets.processes(1, memory_bytes=2**30, cores=1).device, name=name, **changes)


FAST, SLOW = device("fast"), device("slow", memory_bytes=2**29, core_share=0.5)
ALL = Link(name="all", devices=6, latency_s=1e-5, bytes_per_s=1e9)


def cluster(*entries: Nodes, links: tuple[Link, ...] = (ALL,)) -> Cluster:
    return Cluster(name="c", nodes=entries, links=links, calibration="preset")


def test_devices_are_numbered_over_the_entries() -> None:
    mixed = cluster(
        Nodes(count=2, devices=1, device=FAST),
        Nodes(count=1, devices=2, device=FAST, cores=2, host="a"),
        Nodes(count=1, devices=1, device=SLOW, cores=2, host="a"),
        Nodes(count=1, devices=1, device=SLOW, host="b"),
    )
    assert [mixed.device_of(i).name for i in range(6)] == ["fast"] * 4 + ["slow"] * 2
    assert [mixed.node_of(i) for i in range(6)] == [0, 1, 2, 2, 2, 3]
    assert (mixed.kinds, mixed.device, mixed.cores, mixed.memory_bytes) == ([FAST, SLOW], FAST, 2, 2**29)
    assert mixed.devices_per_node == 1
    assert cluster(Nodes(count=1, devices=4, device=FAST), Nodes(count=1, devices=2, device=SLOW)).devices_per_node == 2
    for number in (-1, 6):
        with pytest.raises(ClusterError, match=f"devices 0 to 5, there is no device {number}"):
            mixed.device_of(number)


def test_of_several_kinds_the_slowest_is_the_device() -> None:
    mixed = Cluster.parse("h100-sxm:1x8+a100-80:2x8")
    assert mixed.device.name == "a100-80"
    assert mixed.device_of(0).name == "h100-sxm"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((), "has no nodes"),
        (({"host": "a", "count": 2},), "host a: count must be 1, got 2"),
        (({"host": "a"}, {}, {"host": "a"}), "host a one after the other"),
        (({"host": "a", "cores": 2}, {"host": "a", "cores": 1}), "host a share its cores, state the same number"),
    ],
)
def test_parts_of_a_node_must_agree(entries: tuple[dict[str, Any], ...], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        cluster(*(Nodes(**{"count": 1, "devices": 1, "device": FAST, **entry}) for entry in entries))


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ((replace(ALL, among=(0, 6)),), "the last link connects 6 devices of 6"),
        ((replace(ALL, devices=2), replace(ALL, devices=2), ALL), "from one to the next"),
    ],
)
def test_links_must_reach_everything_once(links: tuple[Link, ...], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        cluster(Nodes(count=6, devices=1, device=FAST), links=links)
    with pytest.raises(ClusterError, match="among needs two device numbers"):
        replace(ALL, among=(3, 3))


def test_presets_are_mixed_with_the_slower_network_between() -> None:
    mixed = Cluster.parse("rtx-4090:1x4+h100-sxm:2x8")
    assert (mixed.devices, mixed.calibration) == (20, "datasheet")
    assert mixed.name == "rtx-4090:1x4+h100-sxm:2x8"
    assert [(link.name, link.devices, link.among) for link in mixed.links] == [
        ("PCIe 4.0 x16", 4, (0, 4)),
        ("NVLink 4", 8, (4, 20)),
        ("InfiniBand NDR", 16, (4, 20)),
        ("25 Gbit/s Ethernet", 20, None),
    ]
    # the groups of eight begin at device 4
    assert [mixed.link_between(*pair).name for pair in ((0, 3), (3, 4), (4, 11), (11, 12))] == [
        "PCIe 4.0 x16", "25 Gbit/s Ethernet", "NVLink 4", "InfiniBand NDR",
    ]  # fmt: skip
    # a dimension of two: pairs inside either kind, the slower of which counts; a dimension of eight crosses kinds
    assert mixed.link(2).name == "PCIe 4.0 x16"
    assert mixed.link(4).name == "PCIe 4.0 x16"
    assert mixed.link(8).name == "25 Gbit/s Ethernet"
    assert Cluster.parse("h100-sxm:1x8+h100-sxm:1x8").link(8).name == "NVLink 4"
    assert [(level.name, level.devices) for level in mixed.levels] == [("PCIe 4.0 x16", 4), ("25 Gbit/s Ethernet", 20)]
    alike = Cluster.parse("a100-80:1x8+h100-sxm:2x8")
    assert [(level.name, level.devices) for level in alike.levels] == [("NVLink 3", 8), ("InfiniBand HDR", 24)]
    assert Cluster.parse("h100-sxm:2x8").levels == Cluster.parse("h100-sxm:2x8").links


@pytest.mark.parametrize("text", ["a100-80:2x8+", "a100-80:2x8+h100", "+", "a100-80:2x8+nowhere.toml"])
def test_what_is_no_mix_is_refused(text: str) -> None:
    with pytest.raises(ClusterError, match="several of these with"):
        Cluster.parse(text)


def test_parts_of_a_mix() -> None:
    mixed = Cluster.parse("a100-80:2x8+h100-sxm:1x8")
    assert mixed.with_devices(24) == mixed
    assert mixed.with_devices(16).nodes == Cluster.parse("a100-80:2x8").nodes
    assert [mixed.with_devices(16).link(n).name for n in (8, 16)] == ["NVLink 3", "InfiniBand HDR"]
    assert mixed.with_devices(4).devices_per_node == 4
    with pytest.raises(ClusterError, match=r"24 devices of .* in whole nodes of 8"):
        mixed.with_devices(20)


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
def test_the_levels_of_a_part_of_a_mix_are_those_it_has(devices: int) -> None:
    part = Cluster.parse("a100-80:2x4+h100-sxm:1x2").with_devices(devices)
    names = {min(devices, 4): "NVLink 3", devices: "InfiniBand HDR" if devices > 4 else "NVLink 3"}
    assert {level.devices: level.name for level in part.levels} == names
    assert choose(gpt(), part).plan.devices == devices


def test_memory_device_by_device() -> None:
    whole = presets.processes(4, memory_bytes=2**30, cores=2)
    some = whole.with_memory(2**28, 2**28, 2**27, 2**28)
    assert [some.device_of(i).memory_bytes for i in range(4)] == [2**28, 2**28, 2**27, 2**28]
    assert [(n.devices, n.host, n.cores) for n in some.nodes] == [(2, "node 0", 2), (1, "node 0", 2), (1, "node 0", 2)]
    assert some.devices_per_node == 4
    assert some.with_memory(2**28, 2**28, 2**28, 2**28).memory_bytes == 2**28
    assert whole.with_memory() == whole
    assert whole.with_memory(2**28) == whole.with_memory(*[2**28] * 4)
    with pytest.raises(ClusterError, match="2 sizes of memory for 4 devices; give one for all, or one for each"):
        whole.with_memory(1, 2)


def test_sizes_one_by_one() -> None:
    assert parse_sizes("2GiB, 512MiB") == (2**31, 2**29)
    assert (parse_sizes(7), parse_sizes(None), parse_sizes([7, 8])) == ((7,), (), (7, 8))
    with pytest.raises(ClusterError, match="not a size"):
        parse_sizes("2GiB,")


def test_a_table_for_each_kind() -> None:
    with (console := Console(width=160)).capture() as seen:
        console.print(tables.cluster(cluster(Nodes(count=1, devices=6, device=FAST)).with_memory(*[2**29] * 5, 2**28)))
    assert "fast, 512 MiB: c (preset)" in seen.get()
    assert "node 0: 1 x fast with 256 MiB each" in seen.get()


# -- measuring ------------------------------------------------------------------------------------------------------

PROBES = [
    Probe("matmul float32", 1e6, 3e6, lambda: None),
    Probe("pointwise", 1e6, 1e6, lambda: None),
]


def rank(slowness: float = 1.0, name: str = "CPU process", memory: int = 2**30, **changes: Any) -> Rank:
    seconds = (3e-4 * slowness, 1e-4 * slowness)
    given = {"name": name, "memory_bytes": memory, "seconds": seconds, "overhead_s": 1e-9, "work": (0.5, 0.6)}
    return Rank(**{**given, **changes})


def nodes(ranks: list[Rank], per_node: int) -> tuple[Nodes, ...]:
    return nodes_of(ranks, PROBES, per_node=per_node, accelerator=False, reserved_bytes=0, allocator_share=0.1)


def test_noise_is_averaged() -> None:
    draw = random.Random(0)
    for _ in range(50):
        ranks = [rank(draw.uniform(0.95, 1.07)) for _ in range(8)]
        (entry,) = nodes(ranks, 8)
        assert entry.device.matmul["float32"].rates[0] == pytest.approx(1e10, rel=0.1)
    assert kinds_of([rank(1), rank(1.17), rank(1.3)]) == [0, 0, 0]


def test_processes_of_one_node_are_equal_up_to_noise() -> None:
    slowness = (1, 1.3, 1.02, 1.01)
    (entry,) = nodes([rank(each) for each in slowness], 4)
    assert entry.device.matmul["float32"].rates[0] == pytest.approx(1e10 / (sum(slowness) / 4), rel=1e-3)
    apart = nodes([rank(each) for each in slowness], 1)  # machines may well differ so much
    assert [(n.count, n.device.name) for n in apart] == [
        (1, "CPU process"), (1, "CPU process at 78%"), (2, "CPU process"),
    ]  # fmt: skip


def test_a_slow_rank_is_a_kind_of_its_own() -> None:
    ranks = [rank(1), rank(2.1), rank(1.05), rank(1.9)]
    assert kinds_of(ranks) == [0, 1, 0, 1]
    entries = nodes(ranks, 4)
    assert [(n.devices, n.device.name) for n in entries] == [
        (1, "CPU process"), (1, "CPU process at 51%"), (1, "CPU process"), (1, "CPU process at 51%"),
    ]  # fmt: skip
    assert entries[1].device == entries[3].device
    assert entries[0].device.matmul["float32"].rates[0] == pytest.approx(3e6 / 3e-4 / 1.025, rel=1e-3)


def test_a_quota_slows_and_takes_less_of_the_cores() -> None:
    entries = nodes([rank(), rank(core_share=0.5), rank()], 3)
    assert [n.device.core_share for n in entries] == [1, 0.5, 1]
    assert {(n.host, n.cores) for n in entries} == {("node 0", 1.8)}  # the best window of three ranks
    full, half = entries[0].device, entries[1].device
    assert half.matmul["float32"].rates[0] == pytest.approx(full.matmul["float32"].rates[0] / 2)
    assert half.overhead_s == pytest.approx(2 * full.overhead_s)
    free = nodes([rank(work=(0.98,)), rank(core_share=0.5, work=(0.5,))], 2)
    assert {n.cores for n in free} == {None}  # they get all that they can take


def test_names_and_memory_divide_but_memory_alone_changes_no_rate() -> None:
    entries = nodes([rank(), rank(1.1, memory=2**29), rank(name="other")], 3)
    assert [(n.device.name, n.device.memory_bytes) for n in entries] == [
        ("CPU process", 2**30), ("CPU process", 2**29), ("other", 2**30),
    ]  # fmt: skip
    assert entries[0].device.matmul == entries[1].device.matmul


def test_nodes_of_the_same_kinds_are_one_entry() -> None:
    ranks = [rank(work=(1.0,)), rank(work=(0.5,)), rank(work=(0.8,)), rank(work=(0.9,)), rank(3), rank(3.1)]
    first, second = nodes(ranks, 2)
    assert (first.count, first.devices, first.cores) == (2, 2, 1.6)
    assert (second.count, second.device.name) == (1, "CPU process at 33%")


@pytest.mark.parametrize(
    ("files", "share"),
    [
        ({}, 1.0),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000"}, 0.5),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000"}, 1.0),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000"}, 1.0),
        (
            {
                "proc/self/cgroup": "4:memory:/m\n2:cpu,cpuacct:/a\n1:name=systemd:/\n0::/\n",
                "sys/fs/cgroup/memory/m/cpu.max": "1 100000",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "25000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            0.25,
        ),
    ],
)
def test_a_quota_is_read_where_the_kernel_keeps_it(tmp_path: Path, files: dict[str, str], share: float) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert core_share(tmp_path) == share


@pytest.mark.long
def test_processes_of_unequal_memory_are_measured_and_held_to_it(pool: Pool) -> None:
    found = pool.run(lambda: measure(memory_bytes=[2**30, 2**29]), ranks=2)[0]
    assert [found.device_of(i).memory_bytes for i in range(2)] == [2**30, 2**29]
    assert found.device_of(0).matmul == found.device_of(1).matmul

    def fill(mebibytes: tuple[int, int]) -> int:
        return torch.ones(2**18 * mebibytes[dist.get_rank()]).numel()

    assert launch(fill, (150, 50), devices=2, device="cpu", memory="200MiB,100MiB") == [150 * 2**18, 50 * 2**18]
    with pytest.raises(WorkerError, match="rank 1 failed: out of memory: the process reached its limit of 100 MiB"):
        launch(fill, (50, 150), devices=2, device="cpu", memory="200MiB,100MiB")
    with pytest.raises(InputError, match="3 sizes of memory for 2 devices"):
        Pool(2, device="cpu", memory="1GiB,1GiB,1GiB")


@pytest.mark.root
@pytest.mark.long
def test_a_process_with_a_quota_is_measured_as_slower(pool: Pool) -> None:
    root = Path("/sys/fs/cgroup/cpu" if Path("/sys/fs/cgroup/cpu").is_dir() else "/sys/fs/cgroup")
    group = root / f"weft-test-{os.getpid()}"
    quota = {"cpu.cfs_quota_us": "50000"} if root.name == "cpu" else {"cpu.max": "50000 100000"}
    try:
        group.mkdir()
        for name, text in quota.items():
            (group / name).write_text(text)
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")

    def here() -> Cluster:
        if dist.get_rank() == 1:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        try:
            return measure()
        finally:
            (root / "cgroup.procs").write_text(str(os.getpid()))

    try:
        found = pool.run(here, ranks=3)[0]
    finally:
        group.rmdir()
    assert [found.device_of(i).core_share for i in range(3)] == [1, 0.5, 1]
    fast, slow = (found.device_of(i).matmul["float32"].rates[-1] for i in (0, 1))
    assert 0.4 < slow / fast < 0.6
    assert found.devices_per_node == 3
