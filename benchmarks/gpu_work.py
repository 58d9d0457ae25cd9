"""What the parts of gpu.py work on: models of random weights, prompts, recipes run through the
command line; and what is read of a run.

Nothing heavy is imported at the top: `spread` is a reward function of the recipes here, whose
process imports this file.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).parent
RECIPES = ROOT / "launch" / "recipes"
PHASES = ("generate", "score", "advantages", "learn", "sync")
SHOWN = ("seconds/", "swap/", "mismatch/", "sync/", "throughput/", "alarm/")
SPREAD = 3.0  # of random embeddings, so that some tokens are likelier than others
SMALL_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
EVERY_RUN = (
    "run.progress=false",
    "run.tensorboard=false",
    "run.final_checkpoint=false",
    "run.checkpoint_every_steps=0",
)
SAMPLE_S = 0.25  # between two looks at the memory in use
GIB = 2**30


def spread(prompts: list[str], responses: list[str], **_: Any) -> list[float]:
    """Return scores without meaning for random models: a function of the text, in [0, 1]."""
    return [zlib.crc32(response.encode()) % 1000 / 1000 for response in responses]


@dataclass(frozen=True)
class Work:
    """The device, whether all is tiny, and the folder where models, data and runs are kept."""

    device: Literal["cpu", "cuda"]
    small: bool
    folder: Path

    def cluster(self, kind: str) -> list[str]:
        """Return overrides of a recipe: all of it on this one device."""
        alone = self.device == "cpu" or kind in ("sft", "rm")
        placement = "separate" if alone else "colocated"
        return [
            f"cluster.device={self.device}",
            f"cluster.placement={placement}",
            "cluster.gpus_per_node=1",
        ]

    def card(self) -> list[str]:
        """Return the override that tells a recipe how much memory this GPU has."""
        if self.device == "cpu":
            return []
        return [f"cluster.gpu_memory_gib={gpu_memory('total') / GIB:.1f}"]

    def model(self, like: str, scores: bool = False) -> str:
        """Return the path of a model with random weights in the shape of a known one, which
        `scores` makes a reward model. It is made where it is not there yet.
        """
        path = self.folder / "models" / f"{like.replace('/', '--')}{'-scores' if scores else ''}"
        if not path.exists():
            half = path.with_name(f"{path.name}.half")  # what was cut off is no model
            arguments = (self.shape(like), half, self.device, scores)
            if self.device == "cpu":
                make_model(*arguments)
            else:  # in another process, which gives the GPU's memory back
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    pool.apply(make_model, arguments)
            half.rename(path)
        return str(path)

    def shape(self, like: str) -> dict[str, Any]:
        """Return the fields of a config.json, from the table of shapes; tiny ones if `small`."""
        import yaml

        table = yaml.safe_load((ROOT / "launch/plan/model_shapes.yaml").read_text())
        shape = table[like]
        while isinstance(shape, str):  # the same as another's
            shape = table[shape]
        return {**shape, **(SMALL_SHAPE if self.small else {})}

    def prompts(self) -> str:
        """Return the path of 2,000 prompts of the demo's task."""
        from launch.tasks import unique_digits as task

        path = self.folder / "prompts.jsonl"
        if not path.exists():
            task.write_rows(path, task.make_prompts(2000, 0, "train"))
        return str(path)

    def found_file(self, part: str) -> Path:
        """Return the file in which a part's findings are kept."""
        return self.folder / "found" / f"{part}.json"

    def found(self, part: str) -> dict[str, Any]:
        """Return what a part found; nothing where it has not run."""
        file = self.found_file(part)
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return found

    def run(
        self,
        name: str,
        kind: str,
        recipe: Path,
        changes: Sequence[str],
        folder: Path | None = None,
        alike: bool = False,
    ) -> dict[str, Any]:
        """Run a recipe as the command line does; return what it reports and the memory it took.
        Raises RuntimeError where it fails, after it has said why.

        If `small`, one that is `alike`, but for sizes, to one that another part runs is only
        checked.
        """
        from launch.cli import main

        folder = folder or self.folder / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        command = [
            kind,
            str(recipe),
            *self.cluster(kind),
            f"run.folder={folder}",
            *EVERY_RUN,
            *changes,
        ]
        checked = self.small and alike
        began = time.time()
        with Memory(self.device) as memory:
            code = main([*command, *(["--check"] if checked else [])])
        if code:
            raise RuntimeError(f"quatuor {kind} {recipe.name} ended with {code}")
        if checked:
            return {"checked": True}
        return report(folder, began) | memory.report() | {"planned_gib": planned(folder)}


def make_model(shape: dict[str, Any], folder: Path, device: str, scores: bool = False) -> None:
    """Write a model of random weights in bfloat16, with the demo's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from launch.tasks import unique_digits as task

    fields = {name: value for name, value in shape.items() if name != "model_type"}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    more = {"num_labels": 1} if scores else {}
    config = AutoConfig.for_model(shape["model_type"], **fields, **ends, **more)
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        model = kind.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(SPREAD)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    task.make_tokenizer(folder)


# --- what is read of a run ------------------------------------------------------------------------


def report(folder: Path, began: float) -> dict[str, Any]:
    """Return what a run left in its folder: seconds from `began` (Unix) to the comparison of engine
    and Actor, the seconds of every step, and what its evaluations found.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["phase"] == "train"]
    gates = [row for row in rows if row["phase"] == "gate"]
    steps = [{k: row[k] for k in row if k == "step" or k.startswith(SHOWN)} for row in train]
    summary = json.loads((folder / "summary.json").read_text())
    found: dict[str, Any] = {"summary": summary, "steps": steps}
    if gates:
        found["start_s"] = gates[0]["time"] - began
        found["gate"] = gates[0]["mismatch/gate"]
        whole = [sum(row[f"seconds/{phase}"] for phase in PHASES) for row in train]
        found["step_s"] = median(whole[1:] or whole)  # the first one warms up
    return found


def planned(folder: Path) -> float:
    """Return the memory that `plan` computes for the fullest device of a run, GiB."""
    from launch.plan.plan import make_plan
    from launch.recipe.read import load_recipe

    memories = make_plan(load_recipe(folder / "config.yaml")).memories
    on_gpus = [memory for memory in memories if memory.is_gpu]
    return max(memory.peak[1] for memory in on_gpus or memories) / GIB


class Memory:
    """Looks at the memory in use while something runs: the GPU's, or on a CPU what this process and
    its children have for themselves.
    """

    def __init__(self, device: str) -> None:
        self.look = gpu_memory if device == "cuda" else own_memory
        self.largest = self.look()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(SAMPLE_S):
            self.largest = max(self.largest, self.look())

    def report(self) -> dict[str, float]:
        """Return the most that was in use, GiB."""
        return {"peak_gib": self.largest / GIB}


def gpu_memory(which: str = "used") -> int:
    """Return bytes in use on the first GPU that may be used, whoever uses them; or `total`."""
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    query = [f"--query-gpu=memory.{which}", "--format=csv,noheader,nounits", f"--id={card}"]
    said = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, check=True)
    return int(said.stdout) * 2**20


def own_memory() -> int:
    """Return bytes that this process and its children share with no other."""
    import psutil

    total = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            used = process.memory_info()
        except psutil.NoSuchProcess:  # it has ended
            continue
        total += used.rss - used.shared
    return total


def benchmark(name: str, *arguments: str) -> dict[str, Any]:
    """Run another benchmark of this folder in a process of its own; return what it wrote. Raises
    RuntimeError where it fails, after it has said why.
    """
    script = HERE / name
    if not script.exists():
        return {"ok": False, "why": f"there is no {script.relative_to(ROOT)}"}
    return run_script(sys.executable, script, *arguments)


def run_script(python: str, script: Path, *arguments: str) -> dict[str, Any]:
    """Run a script that writes its findings to `--json FILE`, and return them."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "found.json")
        command = [python, str(script), *arguments, "--json", str(found)]
        code = subprocess.run(command, cwd=ROOT).returncode
        if code:
            raise RuntimeError(f"{script.name} ended with {code}")
        read: dict[str, Any] = json.loads(found.read_text())
        return read
