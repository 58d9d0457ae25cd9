"""One Ray cluster for all tests that need one; none for the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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


@pytest.fixture(autouse=True)
def no_ray_for_what_is_refused(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begin runs without Ray in quick tests: they look at what is refused, which a run finds while
    Ray starts beside it.
    """
    if request.node.get_closest_marker("engines") is not None:
        return
    from actors import begin

    real = begin.Placement

    class Unstarted(real):  # type: ignore[misc, valid-type]
        def __enter__(self) -> Any:
            return super().__enter__() if self.cluster.address else self

    monkeypatch.setattr(begin, "Placement", Unstarted)
    monkeypatch.setattr(begin, "Processes", lambda roles, placement: None)
