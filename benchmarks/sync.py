"""A whole verified weight sync, Actor to engine, against one memory copy of the same bytes.

    .venv/bin/python benchmarks/sync.py [--quick] [--device cpu|cuda] [--model NAME] --json FILE

Everything is real: an Actor's rank, a vLLM engine, Ray's object store (on a GPU that both share:
CUDA's own sharing of memory), and all three proofs. The model is drawn at random. Besides the
comparison the file says where the time of a sync goes (`seconds`, medians), and how often bytes are
copied and hashed and workers called (`counts`).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python looks beside it alone

DEADLINE_S = 300.0
TOKENS = 64  # longest sequence of the engine
PROBE = [1, *range(3, 34)]
WARMING = 3  # syncs before the first that counts
STEP_S = 1.5  # between syncs: Ray frees memory once a second, in a run before the next one's turn


# of every byte, and of one Actor's rank and one engine: a sync's own number of times
COUNTS = {
    # into a group, into the object store, into the weights as the engine's kernels want them
    "cpu": {"copies": 3, "hashes": 2, "calls": 7},
    # into the buffer that both processes see, into the parameters
    "cuda": {"copies": 2, "hashes": 2, "calls": 7},
}


def main() -> None:
    from benchmarks.measure import options

    arguments = options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            Path(folder), arguments.model, arguments.device, 3 if arguments.quick else 9
        )
    arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


def measure(folder: Path, shape: str, device: str, rounds: int) -> dict[str, Any]:
    """Start Actor and engine on a model of this shape and return the comparison."""
    from actors.cluster.placement import Placement
    from actors.cluster.processes import start_groups
    from actors.cluster.sharing import GpuSharing
    from actors.roles import roles_of
    from actors.weights.sync import WeightSync
    from benchmarks.measure import compare
    from benchmarks.random_models import save_model

    size = save_model(folder, shape, device)
    recipe = recipe_of(folder, device)
    roles = {name: role for name, role in roles_of(recipe).items() if name in ("engine", "actor")}
    facts = {"max_model_tokens": TOKENS, "stop_token_ids": [2]}
    with Placement(recipe.cluster, roles) as placement:
        groups = start_groups(roles, facts, placement)
        on_gpus = groups if placement.shared else {}
        sharing = GpuSharing(on_gpus, DEADLINE_S)
        sync = WeightSync(groups["actor"], groups["engine"], sharing, PROBE, recipe)
        sync.connect(0)
        ours = Syncs(sync, 0 if shape == "tiny" else STEP_S)
        for _ in range(WARMING):
            ours()
        sync.gpu_sharing.stopwatch.take()
        ours.parts.clear()
        work = f"{shape}: {size / 1e6:.0f} MB, one engine, {device}"
        found = compare(ours, memory_copy(size, device), work, rounds)
    found["seconds"] = {name: round(median(s), 5) for name, s in sorted(ours.parts.items())}
    warm = memory_copy(size, device, warm=True)
    found["copy_into_warm_memory"] = median(warm() for _ in range(rounds))
    return found | {"counts": COUNTS[device], "bytes": size}


class Syncs:
    """Syncs one after the other, each a version; `parts` are the seconds of their parts."""

    def __init__(self, sync: Any, pause_s: float) -> None:
        self.sync = sync
        self.pause_s = pause_s
        self.version = 0
        self.parts: dict[str, list[float]] = {}

    def __call__(self) -> float:
        """Run the next sync and return its seconds, without what waits for shared GPUs."""
        self.sync.gpu_sharing.sync()  # the weights' way alone is compared
        time.sleep(self.pause_s)
        self.sync.gpu_sharing.stopwatch.take()
        self.version += 1
        began = time.perf_counter()
        self.sync.sync(self.version)
        seconds = time.perf_counter() - began
        parts = Counter[str]()
        for span in self.sync.gpu_sharing.stopwatch.take():
            parts[span.name] += span.seconds
        for name, part in parts.items():
            self.parts.setdefault(name, []).append(part)
        return seconds


def memory_copy(size: int, device: str, warm: bool = False) -> Callable[[], float]:
    """Return a copy of `size` bytes inside the device's memory that returns its seconds: with one
    thread, into memory that it makes, as a receiver must, or into `warm` memory that was there.
    """
    import numpy as np
    import torch

    source = torch.ones(size, dtype=torch.uint8).to(device)
    target = torch.zeros_like(source)

    def copy() -> float:
        began = time.perf_counter()
        if device == "cuda":
            target.copy_(source) if warm else source.clone()
            torch.cuda.synchronize()
        elif warm:
            np.copyto(target.numpy(), source.numpy())
        else:
            source.numpy().copy()
        return time.perf_counter() - began

    copy()
    return copy


def recipe_of(folder: Path, device: str) -> Any:
    """Return the recipe of a run with this model; its prompts and rewards are never looked at."""
    from actors.settings import rl_recipe

    cluster = {"device": device, "placement": "colocated", "swap": "never", "gpus_per_node": 1}
    model = {"path": str(folder), "dtype": "float32" if device == "cpu" else "bfloat16"}
    return rl_recipe("grpo", "grpo").model_validate(
        {
            "run": {"folder": "unused"},
            "cluster": cluster,
            "actor": {"model": model, "zero_stage": 2, "threads": 2},
            "rewards": [{"name": "unused", "kind": "model", "model": model}],
            "prompts": {"path": "unused"},
            "generation": {
                "max_new_tokens": TOKENS // 2,
                "kv_cache_gib": 0.25,
                "gpu_memory_fraction": 0.3,
            },
            "sync": {"deadline_s": DEADLINE_S},
        }
    )


if __name__ == "__main__":
    main()
