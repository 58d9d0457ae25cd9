"""What the tests of several nodes share: a real Slurm."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.one_machine_slurm import OneMachineSlurm


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneMachineSlurm]:
    """Two nodes on this machine; fails where Slurm can neither be found nor installed."""
    slurm = OneMachineSlurm(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
