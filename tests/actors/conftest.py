"""Real vLLM engines on tiny models, started once for all tests that want them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.actors.tiny_models import Served


@pytest.fixture(scope="session", params=["tied", "untied"])
def session_engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    from tests.actors.tiny_models import Served, save_model, start_engine

    folder = tmp_path_factory.mktemp(request.param)
    model = save_model(folder, seed=0, tied=request.param == "tied")
    engine = start_engine(folder)
    engine.init_weight_transfer_engine({"timeout_s": 10.0})
    yield Served(engine, model, folder)
    engine.close()


@pytest.fixture
def served(session_engine: Served) -> Served:
    """The engine as it is after starting: version 0, nothing running."""
    from tests.actors.tiny_models import transfer

    transfer(session_engine.engine, session_engine.model)
    session_engine.engine.accept(0)
    return session_engine
