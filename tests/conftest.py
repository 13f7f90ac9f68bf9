"""What the tests share: one pool of worker processes for the whole session; and which tests are long."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator

import cloudpickle
import hypothesis
import pytest

from weft.runtime.pool import Pool

PROCESSES = 8
ONE_IN = 8
"""Of the cases of a matrix one in so many is not long, chosen by their names' checksums: by no order of theirs."""

hypothesis.settings.register_profile("weft", deadline=None)  # a busy machine is no failure
hypothesis.settings.register_profile("long", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("weft")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Send the functions of test modules to the workers by value: there they cannot be imported."""
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        cloudpickle.register_pickle_by_value(module)
    matrices: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("matrix") is not None:
            matrices[item.nodeid.partition("[")[0]].append(item)
    for cases in matrices.values():
        short = [item for item in cases if zlib.crc32(item.name.encode()) % ONE_IN == 0] or cases[:1]
        for item in cases:
            if item not in short:
                item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Eight CPU processes of one thread each, started when first needed: ``pool.run(fn, *args, ranks=4)``."""
    with Pool(PROCESSES, device="cpu", timeout_s=60) as processes:
        yield processes
