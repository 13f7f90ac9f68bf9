"""The page of a plan: it needs nothing else, its numbers add up, and it draws what the estimate was read from."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import planner_profiles
import pytest

from weft.cluster import Cluster
from weft.errors import PlanError
from weft.planner import Choice, changes, search
from weft.planner.spans import Span, spans
from weft.report import page

H100 = Cluster.parse("h100-sxm:2x8")
PROFILE = planner_profiles.gpt(batch_size=64)


def chosen(cluster: Cluster = H100, profile=PROFILE, **fixed) -> Choice:
    return search(profile, cluster, **fixed)


def numbers(text: str, table: str) -> list[list[float]]:
    """The exact values of a table's rows."""
    inside = text[text.index(f'id="{table}"') :].partition("</table>")[0]
    rows = [[float(v) for v in re.findall(r'data-v="([^"]+)"', row)] for row in inside.split("<tr")]
    return [row for row in rows if row]


@pytest.mark.parametrize(
    ("cluster", "fixed"),
    [
        (H100, {"pp": 4, "tp": 2, "microbatches": 8}),
        (H100, {"dp_shard": 16}),
        (Cluster.local(4), {"pp": 2}),
        (Cluster.parse("a100-80:1x8+h100-sxm:1x8"), {"pp": 2, "dp_replicate": 8}),
    ],
    ids=["hybrid", "sharded", "processes", "unequal"],
)
def test_the_numbers_of_a_page_add_up(cluster: Cluster, fixed: dict[str, int]) -> None:
    choice = chosen(cluster, **fixed)
    text = page.render(choice, PROFILE, cluster)
    times, memory = numbers(text, "time"), numbers(text, "memory")
    assert len(times) == (1 + choice.plan.pp if choice.plan.pp > 1 else 1)
    for *terms, total in times:
        assert sum(terms) == pytest.approx(total)
        assert total == pytest.approx(choice.estimate.step_time_s)
    assert [sum(terms) for *terms, _ in memory] == pytest.approx(choice.estimate.peak_memory_bytes)
    assert [total for *_, total in memory] == pytest.approx(choice.estimate.peak_memory_bytes)


def test_a_page_needs_nothing_else_and_tells_everything() -> None:
    choice = chosen(pp=4, microbatches=8)
    found = changes(PROFILE, H100, choice, pp=4, microbatches=8)
    text = page.render(choice, PROFILE, H100, found)
    assert not re.search(r"<script|<link|<img|src=|https?:|@import|url\((?!#)", text)
    assert choice.alternatives
    assert choice.refused or choice.later
    assert all(str(a.plan.describe()) in text for a in choice.alternatives)
    assert all(refused.reason in text for refused in choice.refused)
    assert all(change.what in text for change in found)
    assert "blocks.0-" in text
    assert "datasheet" in text


def of(found: list[Span], device: int, *parts: str) -> float:
    return sum(s.end_s - s.begin_s for s in found if s.device == device and s.part in parts)


@pytest.mark.parametrize(
    ("cluster", "fixed"),
    [
        (H100, {"pp": 4, "tp": 4, "microbatches": 8, "recompute": "full"}),
        (H100, {"pp": 2, "dp_shard": 8, "microbatches": 4}),
        (Cluster.local(4), {"pp": 2, "dp_replicate": 2, "microbatches": 4}),
    ],
    ids=["tensor", "sharded", "processes"],
)
def test_spans_are_the_timeline_the_estimate_was_read_from(cluster: Cluster, fixed: dict[str, int]) -> None:
    choice = chosen(cluster, **fixed)
    found, step = spans(PROFILE, cluster, choice.plan), choice.estimate.step_time_s
    assert max(s.end_s for s in found) == pytest.approx(step)
    for device, time in enumerate(choice.estimate.stage_time):
        computing = of(found, device, "forward", "backward", "weight", "recompute")
        assert computing == pytest.approx(time["compute"], rel=1e-6)
        assert of(found, device, "optimizer") == pytest.approx(time["optimizer"], rel=1e-6)
        exchanged = time["tensor_parallel"] + time["data_parallel"] + time["pipeline"]
        assert of(found, device, "communication") == pytest.approx(exchanged, rel=1e-6)
        ordered = sorted((s for s in found if s.device == device), key=lambda s: s.begin_s)
        assert all(a.end_s <= b.begin_s + 1e-9 * step for a, b in itertools.pairwise(ordered))
    assert any(s.part == "recompute" for s in found) == ("recompute" in fixed)


@pytest.mark.long
def test_the_longest_timeline_is_cut_in_the_middle() -> None:
    profile = planner_profiles.gpt(layers=30, hidden=2048, context=2048, batch_size=4096)
    choice = chosen(H100, profile, pp=16, microbatches=4096)
    text = page.render(choice, profile, H100)
    assert len(text.encode()) < 500_000
    assert " left out</text>" in text
    labels = [int(number) for number in re.findall(r'class="n \w+"[^>]*>(\d+)<', text)]
    assert (min(labels), max(labels)) == (0, 4095)
    assert not set(labels) & set(range(1000, 3000))
    assert " left out</text>" not in page.render(chosen(pp=4, microbatches=8), PROFILE, H100)


def test_ticks_are_round_and_inside() -> None:
    for end in (3e-5, 0.00123, 0.9, 25.8, 4000.0):
        found = page.ticks(page.Window(0.0, end, 0.0), 1000 / end, end)
        assert 4 <= len(found) <= 12
        assert found[0] == (0.0, f"0 {found[0][1].split()[1]}")
        assert all(0 <= x <= 1000 and len(text) < 10 for x, text in found)


def test_a_page_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="name a file in a folder there is"):
        page.write(tmp_path / "nowhere" / "plan.html", chosen(pp=2), PROFILE, H100)
