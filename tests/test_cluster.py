"""Clusters: files, presets, this machine, and the links between devices."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.cluster import Cluster, Collective, Curve, Device, Link, Nodes
from weft.cluster import presets as presets_room
from weft.errors import ClusterError
from weft.quantity import format_bytes, format_count, format_seconds, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 * 2**30), ("512 MB", 512 * 10**6), ("1.5gib", 3 * 2**29), ("100", 100), (4096, 4096), ("3B", 3)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2 bananas", "-1GiB", "0", 0, -5, "1e9x"])
def test_bad_sizes(text):
    with pytest.raises(ClusterError, match="2GiB"):
        parse_size(text)


@given(st.integers(1, 10**15))
def test_written_sizes_are_near(size):
    assert parse_size(format_bytes(size)) == pytest.approx(size, rel=0.01, abs=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_bytes(1536 * 2**20), "1.50 GiB"),
        (format_bytes(12), "12 B"),
        (format_seconds(0.0123), "12.3 ms"),
        (format_seconds(250), "4 min 10 s"),
        (format_seconds(11100), "3 h 5 min"),
        (format_seconds(0), "0 s"),
        (format_count(12_600_000), "12.6 M"),
        (format_count(3.12e12, "flop/s"), "3.12 Tflop/s"),
        (format_count(19.06, "samples/s"), "19.1 samples/s"),
        (format_count(8), "8"),
    ],
)
def test_numbers_for_people(text, expected):
    assert text == expected


def test_a_curve_meets_its_points_and_stays_between_them():
    curve = Curve((1.0, 100.0, 10000.0), (10.0, 30.0, 20.0))
    assert [curve.at(s) for s in (0.1, 1, 10, 100, 1000, 1e9)] == pytest.approx([10, 10, 20, 30, 25, 20])


@pytest.mark.parametrize(
    "points", [((), ()), ((1.0,), (1.0, 2.0)), ((2.0, 1.0), (1.0, 1.0)), ((1.0,), (0.0,)), ((1.0,), (math.nan,))]
)
def test_bad_curves(points):
    with pytest.raises(ClusterError):
        Curve(*points)


def measured() -> Cluster:
    flat = Curve((1.0, 1e6), (1e9, 2e9))
    device = Device(
        name="a",
        memory_bytes=2**30,
        matmul={"float32": flat},
        rates={"pointwise": flat},
        overhead_s=1e-6,
        accelerator=False,
        reserved_bytes=2**20,
        allocator_share=0.1,
    )
    return Cluster(
        name="c",
        nodes=(Nodes(count=2, devices=4, device=device, cores=1.5),),
        links=(
            Link(
                name="in",
                devices=4,
                latency_s=1e-5,
                busy_s=2e-5,
                bytes_per_s=1e9,
                collectives=(Collective(kind="all_reduce", ranks=4, rates=flat),),
            ),
            Link(
                name="out",
                devices=8,
                latency_s=1e-4,
                bytes_per_s=1e8,
                collectives=tuple(
                    Collective(kind="all_reduce", ranks=8 // stride, stride=stride, rates=flat.scaled(1 / stride))
                    for stride in (1, 4)
                ),
                alone_bytes_per_s=3e8,
            ),
        ),
        calibration="measured here",
    )


SAVED = [
    measured(),
    Cluster.preset("h100-sxm", nodes=2),
    *(presets_room.processes(devices, memory_bytes=2**26, cores=2) for devices in (1, 2, 3)),
    Cluster.parse("a100-80:2x8+h100-sxm:1x8"),
    presets_room.processes(3, memory_bytes=2**26, cores=2).with_memory(2**26, 2**25, 2**25),
]


@pytest.mark.parametrize("cluster", SAVED)
def test_a_saved_cluster_reads_back_equal(cluster, tmp_path):
    path = tmp_path / "cluster.toml"
    cluster.save(path)
    assert Cluster.load(path) == cluster
    assert Cluster.parse(str(path)) == cluster


def test_a_link_is_as_those_see_it_that_share_it():
    cluster = measured()  # two nodes of four devices, a card for each node: four senders get 1e8 each, one alone 3e8
    rates = [cluster.link_between(0, 4, senders).bytes_per_s for senders in (1, 2, 3, 4, 8)]
    assert rates == pytest.approx([3e8, 2e8, 4e8 / 3, 1e8, 1e8])
    assert cluster.link_between(0, 4).bytes_per_s == 1e8
    assert cluster.link_between(0, 1, 1).bytes_per_s == cluster.links[0].bytes_per_s
    assert [c.ranks for c in cluster.links[1].measured("all_reduce", 4)] == [2]
    assert [c.ranks for c in cluster.links[1].measured("all_reduce", 1)] == [8]
    assert [c.ranks for c in cluster.links[1].measured("all_reduce", 2)] == [8, 2]  # better than nothing
    assert cluster.links[1].measured("all_gather", 1) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace("alone_bytes_per_s = 3", "alone_bytes_per_s = -3"), "alone_bytes_per_s must be positive"),
        (lambda t: t.replace("stride = 4", "stride = 0"), "stride at least 1"),
        (lambda t: t.replace("overhead_s", "overhead"), "unknown key 'overhead'"),
        (lambda t: t.replace('name = "c"\n', ""), "'name' is missing"),
        (lambda t: t.replace("measured here", "guessed"), "calibration 'guessed'"),
        (lambda t: t.replace("accelerator = false", "accelerator = 0"), "accelerator must be true or false"),
        (
            lambda t: t.replace("allocator_share = 0.1", "allocator_share = -0.1"),
            "allocator_share must not be negative",
        ),
        (lambda t: t.replace("count = 2", 'count = "2"'), "count must be a whole number"),
        (lambda t: t.replace("memory = 1073741824", 'memory = "1 GBB"'), "unit 'GBB' is unknown"),
        (lambda t: t.replace("devices = 8", "devices = 6"), "the last link connects 6 devices of 8"),
        (lambda t: t.replace("pointwise", "telepathy"), "pointwise"),
        (lambda t: t + "\n[", "is not TOML"),
    ],
)
def test_a_broken_file_names_what_is_wrong(change, message, tmp_path):
    path = tmp_path / "cluster.toml"
    measured().save(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ClusterError, match=message) as raised:
        Cluster.load(path)
    assert raised.value.exit_code == 2


def test_every_preset_can_be_planned_for():
    for name in presets_room.names():
        cluster = Cluster.parse(f"{name}:2x8")
        assert (cluster.devices, cluster.devices_per_node) == (16, 8)
        fitted = name.startswith("a100")
        assert cluster.calibration.startswith("preset fitted on vTrain's" if fitted else "datasheet")
        assert cluster.memory_bytes >= 24 * 10**9
        peak = cluster.device.matmul["float32"].rates[-1]
        assert 1e12 < peak < cluster.device.matmul["bfloat16"].rates[-1] * 1.01
        assert cluster.links[0].bytes_per_s > cluster.links[1].bytes_per_s


@pytest.mark.parametrize("text", ["h100-sxm:0x8", "h100:8", "no/such/file.toml", "h100-sxm:2x", ""])
def test_unknown_clusters(text):
    with pytest.raises(ClusterError, match=r"preset|at least"):
        Cluster.parse(text)


def test_a_driver_name_finds_its_preset():
    assert presets_room.like("NVIDIA H100 80GB HBM3") == "h100-sxm"
    assert presets_room.like("NVIDIA A100-SXM4-40GB") == "a100-40"
    assert presets_room.like("NVIDIA A100-SXM4-80GB") == "a100-80"
    assert presets_room.like("NVIDIA H200") == "h200"
    assert presets_room.like("something new") == presets_room.UNKNOWN


def test_links_are_the_innermost_that_reach():
    cluster = measured()
    assert cluster.link(2).name == "in"
    assert cluster.link(2, stride=2).name == "in"
    assert cluster.link(2, stride=4).name == "out"
    assert cluster.link(3).name == "out"  # ranks 3, 4 and 5 are on two nodes
    assert cluster.link_between(0, 3).name == "in"
    assert cluster.link_between(3, 4).name == "out"


def test_parts_of_a_cluster():
    cluster = measured()
    assert cluster.with_devices(8) == cluster
    assert cluster.with_devices(4).links == cluster.links
    assert cluster.with_devices(1).links == ()
    assert cluster.with_memory(77).memory_bytes == 77
    for devices in (0, 6, 9):
        with pytest.raises(ClusterError, match="whole nodes"):
            cluster.with_devices(devices)


def test_processes_share_the_cores_there_are():
    assert presets_room.processes(4, memory_bytes=2**26, cores=2).cores == 2
    assert presets_room.processes(2, memory_bytes=2**26, cores=2).cores is None


@pytest.mark.parametrize(("devices", "memory"), [(0, None), (2, "1PiB")])
def test_more_than_this_machine_has(devices, memory):
    with pytest.raises(ClusterError):
        Cluster.local(devices, memory)
