"""One Ray cluster for all tests that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    import ray

    from actors.placement import connect

    connect(None, cpus=12)
    yield
    ray.shutdown()
