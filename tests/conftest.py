"""What the tests share: one pool of worker processes for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import cloudpickle
import hypothesis
import pytest

from weft.runtime.pool import Pool

PROCESSES = 8

hypothesis.settings.register_profile("weft", deadline=None)  # a busy machine is no failure
hypothesis.settings.register_profile("long", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("weft")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Send the functions of test modules to the workers by value: there they cannot be imported."""
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        cloudpickle.register_pickle_by_value(module)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Eight CPU processes of one thread each, started when first needed: ``pool.run(fn, *args, ranks=4)``."""
    with Pool(PROCESSES, device="cpu", timeout_s=60) as processes:
        yield processes
