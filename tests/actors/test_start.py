"""What a start is made of, as far as nothing has to be started for it."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from actors.cluster.placement import CACHES, environment
from actors.cluster.processes import Processes
from actors.engine.arguments import engine_arguments, graph_sizes
from actors.settings import ClusterSettings, GenerationSettings
from learners.imports import imported
from learners.settings import ModelSettings
from learners.spans import Span


def test_graph_sizes_reach_the_largest_batch_and_pad_little() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(40) == [1, 2, 4, 8, 16, 32, 40]
    assert graph_sizes(256) == [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256]
    for most in (1, 7, 100, 512):
        sizes = graph_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
        assert all(above <= 2 * below for below, above in itertools.pairwise(sizes))


@pytest.mark.engines
def test_vllm_takes_the_graph_sizes_on_gpus_alone() -> None:
    from vllm import EngineArgs

    generation = GenerationSettings(max_concurrent=100)
    model = ModelSettings(path="somewhere")
    on_gpu = engine_arguments(model, generation, "cuda", 64)
    assert on_gpu["cudagraph_capture_sizes"] == graph_sizes(100)
    assert set(on_gpu) <= {field.name for field in dataclasses.fields(EngineArgs)}
    assert "cudagraph_capture_sizes" not in engine_arguments(model, generation, "cpu", 64)


def test_caches_lie_in_one_folder_where_the_recipe_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not set(CACHES) & set(environment("cuda", 1))
    monkeypatch.chdir(tmp_path)
    of_process = environment("cuda", 1, "kept")
    assert {of_process[name] for name in CACHES} == {
        str(tmp_path / "kept" / own) for own in ("vllm", "triton", "inductor")
    }


def test_vllm_torch_and_triton_read_where_their_caches_are() -> None:
    import inspect

    from torch._inductor.runtime import cache_dir_utils
    from vllm import envs

    assert "VLLM_CACHE_ROOT" in envs.environment_variables
    assert "TORCHINDUCTOR_CACHE_DIR" in inspect.getsource(cache_dir_utils)
    found = importlib.util.find_spec("triton")  # to import it takes half a second
    assert found is not None and found.origin is not None
    assert "TRITON_CACHE_DIR" in Path(found.origin).with_name("knobs.py").read_text()


def test_an_import_leaves_the_collector_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gc.isenabled()
    with pytest.raises(ImportError):
        imported("no_such_module")
    assert gc.isenabled()
    gc.disable()
    try:
        assert imported("json").dumps([]) == "[]"
        assert not gc.isenabled()
    finally:
        gc.enable()


class _Group:
    """Notes what is asked of a role's processes, in the order of all roles."""

    asked: ClassVar[list[str]] = []

    def __init__(self, name: str, *_: Any) -> None:
        self.name = name

    def prepare(self, *_: Any) -> list[Any]:
        self.asked.append(f"import {self.name}")
        return ["import"]

    def start(self, *_: Any, **__: Any) -> list[Any]:
        self.asked.append(f"load {self.name}")
        return ["load"]

    def gather(self, pending: list[str], *_: Any) -> list[list[Span]]:
        self.asked.append(f"wait {self.name}") if pending == ["load"] else None
        return [[Span(pending[0], 0.0, 1.0)]]

    def call(self, method: str, tier: str, **_: Any) -> None:
        self.asked.append(f"{method} {self.name} {tier}")


@pytest.mark.parametrize(
    "swap, shared, order",
    [
        ("always", True, ["load engine", "wait engine", "sleep engine always", "load actor"]),
        ("kv_cache", True, ["load engine", "wait engine", "sleep engine kv_cache", "load actor"]),
        ("never", True, ["load engine", "load actor", "wait engine"]),
        ("always", False, ["load engine", "load actor", "wait engine"]),
    ],
)
def test_engines_start_alone_only_where_they_make_room(
    monkeypatch: pytest.MonkeyPatch, swap: str, shared: bool, order: list[str]
) -> None:
    from actors.cluster import processes

    monkeypatch.setattr(processes, "Engines", _Group)
    monkeypatch.setattr(processes, "WorkerGroup", _Group)
    monkeypatch.setattr(_Group, "asked", [])
    role = {"target": "", "prepare": "", "arguments": {}, "from_data": (), "each": ()}
    roles: Any = {
        "engine": SimpleNamespace(**role, kind="engine", learner=None),
        "actor": SimpleNamespace(**role, kind="learner", learner=None),
    }
    placement: Any = SimpleNamespace(
        cluster=ClusterSettings(device="cuda", placement="colocated", swap=swap),  # type: ignore[arg-type]
        shared=shared,
        options=lambda name: [{}],
    )
    started = Processes(roles, placement)
    started.start({})
    assert _Group.asked[:2] == ["import engine", "import actor"]
    assert _Group.asked[2 : 2 + len(order)] == order
    names = {span.name for span in started.stopwatch.take()}
    assert names == {"import engine", "load engine", "import actor", "load actor"}
