"""One Ray cluster for all tests that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    import ray

    from actors.cluster.connection import connect

    if (
        ray.is_initialized()
    ):  # Ray starts by itself as soon as it is asked something; that cluster may be too small
        ray.shutdown()
    connect(None, cpus=12)
    yield
    ray.shutdown()
