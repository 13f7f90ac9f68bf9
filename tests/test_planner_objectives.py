"""Objectives: least memory, least cost of a sample."""

from __future__ import annotations

import pytest
from planner_profiles import gpt

from weft.cluster import Cluster
from weft.errors import MemoryLimitError, PlanError
from weft.planner import choose, search
from weft.planner.objectives import sizes_of

GIB = 2**30


def node(devices: int = 8, nodes: int = 2, memory: str | None = None) -> Cluster:
    found = Cluster.preset("a100-80", nodes=nodes, devices_per_node=devices)
    return found if memory is None else found.with_memory(int(memory))


def test_time_is_what_a_search_finds():
    assert choose(gpt(), node()).plan.to_json() == search(gpt(), node()).plan.to_json()


def test_nothing_fits_in_less_than_the_least_memory_and_that_plan_is_the_fastest_in_it():
    profile, cluster = gpt(), node()
    least = choose(profile, cluster, objective="memory")
    peak = max(least.estimate.peak_memory_bytes)
    assert peak < max(search(profile, cluster).estimate.peak_memory_bytes)
    with pytest.raises(MemoryLimitError):
        search(profile, cluster.with_memory(int(0.99 * peak)))
    within = search(profile, cluster.with_memory(int(peak) + 1))
    assert least.estimate.step_time_s == within.estimate.step_time_s


def test_the_cheapest_is_cheapest_of_every_number_of_devices():
    profile, cluster = gpt(), node()
    best = choose(profile, cluster, objective="cost", price=2.0)
    assert sizes_of(cluster) == [1, 2, 4, 8, 16]
    every = {n: n * search(profile, cluster.with_devices(n)).estimate.step_time_s for n in sizes_of(cluster)}
    assert best.cost is not None
    assert best.plan.devices == min(every, key=lambda n: every[n]) == best.cost.devices
    assert best.cost.step == pytest.approx(2.0 * min(every.values()) / 3600)
    told = best.to_json()["cost"]
    assert told["per_sample"] == pytest.approx(best.cost.step / profile.batch_size)
    assert "16 devices: " in best.plan.explain()


def test_a_price_is_told_with_any_objective():
    choice = choose(gpt(), node(), price=3.0)
    assert choice.cost is not None
    assert choice.cost.devices == 16
    assert "at 3 for a device and hour" in choice.plan.explain()
    assert choose(gpt(), node()).cost is None


def test_wrong_objectives_and_prices():
    with pytest.raises(PlanError, match="choose from time, memory, cost"):
        choose(gpt(), node(), objective="speed")
    with pytest.raises(PlanError, match="add --price"):
        choose(gpt(), node(), objective="cost")
    for price in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(PlanError, match="price must be a positive number"):
            choose(gpt(), node(), price=price)


def test_the_cheapest_where_nothing_fits_says_so():
    with pytest.raises(MemoryLimitError, match="nothing fits"):
        choose(gpt(), node(nodes=1, devices=2, memory=str(2**20)), objective="cost", price=1.0)
