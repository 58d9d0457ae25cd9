"""Measure how long a run takes to start, against the start of a bare vLLM engine:
`python benchmarks/start.py [--quick] [--model FOLDER] [--data FOLDER] --json FILE [KEY.SUB=VALUE]`.

Ours is the demo's GRPO, from the command to the comparison of engine and Actor before step 1: Ray,
engine, two learners, Reference, two functions. The reference is one process that imports vLLM and
builds an engine of the same model, with the same settings. Both run by turns (benchmarks/measure.py
has the keys); `cpu_ours` and `cpu_reference` are CPU seconds of all their processes, which depend
less on what else the machine does, and `parts` the seconds of a start's parts, as timeline.json has
them. The model and the data are a demo's: `quatuor demo` makes them in runs/demo.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from measure import compare

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "launch" / "recipes" / "demo_grpo.yaml"
LONGEST_S = 300.0

BARE = """
import json, os, sys
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
)
import torch
torch.set_num_threads(2)
from vllm import EngineArgs, LLMEngine
LLMEngine.from_engine_args(EngineArgs(**json.loads(sys.argv[1])))
print("built", flush=True)
sys.stdin.read()
"""


class Starts:
    """Both starts, with the CPU seconds of each round."""

    def __init__(self, model: Path, data: Path, overrides: list[str]) -> None:
        self.model = model
        self.data = data
        self.overrides = overrides
        self.cpu: dict[str, list[float]] = {"ours": [], "reference": []}
        self.parts: dict[str, list[float]] = {}

    def bare(self) -> float:
        """Start a bare engine; return the seconds until it is built."""
        began = time.perf_counter()
        command = [sys.executable, "-c", BARE, json.dumps(self.arguments())]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, env=environment(), text=True, **pipes)
        assert process.stdout is not None
        try:
            lines = iter(process.stdout.readline, "")
            if not any(line.strip() == "built" for line in lines):
                raise SystemExit("error: the bare engine did not start")
            seconds = time.perf_counter() - began
            self.cpu["reference"].append(cpu_seconds(process.pid))
        finally:
            end(process)
        return seconds

    def arguments(self) -> dict[str, Any]:
        """Return what our engine is built with, but for the weight transfer."""
        from actors.engine.arguments import engine_arguments
        from actors.settings import GenerationSettings
        from learners.settings import ModelSettings

        generation = GenerationSettings(max_new_tokens=14, max_concurrent=512)
        model = ModelSettings(path=str(self.model))
        arguments = engine_arguments(model, generation, "cpu", max_model_tokens=64)
        del arguments["weight_transfer_config"]
        return arguments

    def ours(self) -> float:
        """Start a run; return the seconds until its gate has been passed."""
        with tempfile.TemporaryDirectory() as there:
            run = Path(there, "run")
            log = Path(there, "log")
            command = [sys.executable, "-m", "launch", "grpo", str(RECIPE), *self.recipe(run)]
            began = time.perf_counter()
            with log.open("w") as said:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=environment(), stdout=said, stderr=said
                )
            try:
                while not passed(run / "metrics.jsonl"):
                    if process.poll() is not None or time.perf_counter() - began > LONGEST_S:
                        raise SystemExit(f"error: the run did not start:\n{log.read_text()}")
                    time.sleep(0.02)
                seconds = time.perf_counter() - began
                self.cpu["ours"].append(cpu_seconds(process.pid))
                self.keep_parts(run / "timeline.json")
            finally:
                end(process)
                shutil.rmtree(run, ignore_errors=True)
        return seconds

    def recipe(self, run: Path) -> list[str]:
        """Return what is replaced of the recipe."""
        files = {"prompts": "prompts", "evaluation.prompts": "validation"}
        files["evaluation.test_prompts"] = "test"
        return [
            f"run.folder={run}",
            f"actor.model.path={self.model}",
            *(f"{key}.path={self.data / name}.jsonl" for key, name in files.items()),
            *self.overrides,
        ]

    def keep_parts(self, timeline: Path) -> None:
        """Keep the seconds of the parts of a start."""
        for event in json.loads(timeline.read_text()):
            if event["name"].startswith("start"):
                self.parts.setdefault(event["name"], []).append(event["dur"] / 1e6)


def environment() -> dict[str, str]:
    """Return the environment of both: ours is importable, threads are the recipe's."""
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {**kept, "PYTHONPATH": str(ROOT)}


def passed(metrics: Path) -> bool:
    """Tell whether the run has logged its gate."""
    return metrics.exists() and '"phase": "gate"' in metrics.read_text()


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all it has started, youngest first."""
    try:
        first = psutil.Process(pid)
        return [*reversed(first.children(recursive=True)), first]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process and all it has started so far."""
    total = 0.0
    for process in family(pid):
        try:
            total += sum(process.cpu_times()[:4])  # user and system: its own and its children's
        except psutil.NoSuchProcess:
            continue
    return total


def end(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it has started; there is nothing to save."""
    for one in family(process.pid):
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="one round in place of three")
    parser.add_argument("--model", type=Path, default=Path("runs/demo/sft/model"))
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE")
    chosen = parser.parse_args()
    for needed in (chosen.model / "config.json", chosen.data / "prompts.jsonl"):
        if not needed.is_file():
            raise SystemExit(f"error: {needed} is not there: quatuor demo makes it")
    sys.path.insert(0, str(ROOT))
    starts = Starts(chosen.model.resolve(), chosen.data.resolve(), chosen.overrides)
    work = "start of the demo's GRPO up to its gate, against the start of a bare vLLM engine"
    result = compare(starts.ours, starts.bare, work, rounds=1 if chosen.quick else 3)
    cpu = {f"cpu_{name}": round(median(seconds), 2) for name, seconds in starts.cpu.items()}
    parts = {name: round(median(seconds), 2) for name, seconds in starts.parts.items()}
    chosen.json.write_text(json.dumps({**result, **cpu, "parts": parts}, indent=2) + "\n")
    bares = result["ours"] / result["reference"]
    print(
        f"{result['ours']:.1f} s, {bares:.2f} bare starts of {result['reference']:.1f} s; CPU "
        f"{cpu['cpu_ours']:.1f} s, of a bare start {cpu['cpu_reference']:.1f} s"
    )
    for name, seconds in parts.items():
        print(f"{seconds:6.2f} s  {name}")


if __name__ == "__main__":
    main()
