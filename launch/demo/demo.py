"""`quatuor demo`: SFT, reward model, PPO and GRPO on a small task with verifiable answers, offline,
on two CPU cores.

The same recipes, engines and learners as a cluster run; only the models are tiny. See
launch/tasks/unique_digits.py for the task and launch/recipes/demo_*.yaml for the settings.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray
import yaml
from rich.console import Console
from rich.table import Table

from actors import driver, supervised
from actors.cluster.connection import connect
from actors.rollouts.sampling import sample_responses
from actors.settings import ClusterSettings, GenerationSettings
from launch.demo.page import write_page
from launch.recipe.document import flat
from launch.recipe.read import load_recipe
from launch.tasks import unique_digits as task

RECIPES = Path(__file__).parents[1] / "recipes"


class Rows(NamedTuple):
    """Numbers of rows of data."""

    examples: int = 20_000
    pair_prompts: int = 5_000
    prompts: int = 8_000
    validation: int = 300
    test: int = 1_000
    calibration: int = 1_000


def run_demo(folder: Path, seed: int) -> dict[str, Any]:
    """Run all four phases into `folder` (replaced), print the table, write summary.json and
    index.html.
    """
    if folder.exists():
        shutil.rmtree(folder)
    (folder / "data").mkdir(parents=True)
    (folder / ".quatuor-demo").touch()  # says that the next demo may replace this folder
    # Transformers looks for DeepSpeed when it saves a model
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    connect(None, cpus=8)  # one cluster for all phases
    try:
        return Demo(folder, seed).run()
    finally:
        ray.shutdown()


class Demo:
    """The four phases, one after the other, and how long each took. `cluster` is where the SFT
    model is sampled.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        rows: Rows = Rows(),  # noqa: B008  it never changes
        cluster: ClusterSettings | None = None,
    ) -> None:
        self.folder = folder
        self.rows = rows
        self.cluster = cluster
        self.data = folder / "data"
        self.seed = seed
        self.seconds: dict[str, float] = {}
        self.console = Console()

    def run(self) -> dict[str, Any]:
        self.make_data()
        with self.phase("sft", "supervised fine-tuning, deliberately partial"):
            supervised.run(self.recipe("sft"))
        with self.phase("rm", "reward model on pairs of right and sampled wrong answers"):
            self.make_pairs()
            rm = supervised.run(self.recipe("rm"))
        with self.phase(
            "ppo", "PPO: Actor, Critic, Reference, Reward; the reward model's score alone"
        ):
            ppo = driver.run(self.recipe("ppo"))
        with self.phase("grpo", "GRPO from the same SFT model, on the verifiable reward"):
            grpo = driver.run(self.recipe("grpo"))
        summary = {
            "seed": self.seed,
            "sft_accuracy": grpo["before"]["test/accuracy_sampled"],
            "rm_pair_accuracy": rm["held_out/accuracy"],
            "ppo_accuracy": ppo["after"]["test/accuracy_sampled"],
            "grpo_accuracy": grpo["after"]["test/accuracy_sampled"],
            "sft_accuracy_greedy": grpo["before"]["test/accuracy_greedy"],
            "ppo_accuracy_greedy": ppo["after"]["test/accuracy_greedy"],
            "grpo_accuracy_greedy": grpo["after"]["test/accuracy_greedy"],
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
        }
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        self.report(summary)
        return summary

    def make_data(self) -> None:
        """Write tokenizer, untrained model, demonstrations and prompts; three disjoint sets of
        prompts.
        """
        task.make_tokenizer(self.folder / "base")
        task.make_model(self.folder / "base", self.seed)
        rows = self.rows
        task.write_rows(self.data / "sft.jsonl", task.make_demonstrations(rows.examples, self.seed))
        task.write_rows(
            self.data / "prompts.jsonl", task.make_prompts(rows.prompts, self.seed, "train")
        )
        task.write_rows(
            self.data / "validation.jsonl",
            task.make_prompts(rows.validation, self.seed, "validation"),
        )
        task.write_rows(self.data / "test.jsonl", task.make_prompts(rows.test, self.seed, "test"))

    def make_pairs(self) -> None:
        """Sample the SFT model once per prompt: pairs to learn from, pairs to test on, responses to
        calibrate on.
        """
        rows = self.rows
        made = task.make_prompts(rows.pair_prompts, self.seed + 1, "train")
        train = [row["prompt"] for row in made]
        test = [row["prompt"] for row in task.make_prompts(rows.test, self.seed + 1, "test")]
        model = str(self.folder / "sft" / "model")
        generation = GenerationSettings(max_new_tokens=14, max_concurrent=512)
        responses = sample_responses(model, train + test, generation, self.seed, self.cluster)
        sampled, sampled_test = (
            [[r] for r in part] for part in (responses[: len(train)], responses[len(train) :])
        )
        task.write_rows(self.data / "pairs.jsonl", task.make_pairs(train, sampled, self.seed))
        task.write_rows(self.data / "pairs_test.jsonl", task.make_sampled_pairs(test, sampled_test))
        answered = [
            {"prompt": p, "response": r} for p, (r,) in zip(train, sampled, strict=True) if r
        ]
        task.write_rows(self.data / "calibration.jsonl", answered[: rows.calibration])

    def recipe(self, phase: str) -> Any:
        """Return the phase's recipe with this demo's folder and seed."""
        path = RECIPES / f"demo_{phase}.yaml"
        return load_recipe(path, self.moved(path), phase)

    def moved(self, recipe: Path) -> list[str]:
        """Return overrides of a recipe of the demo: this demo's folder and seed."""
        moved = [
            f"{key}={self.folder / Path(value).relative_to('runs/demo')!s}"
            for key, value in flat(yaml.safe_load(recipe.read_text())).items()
            if isinstance(value, str) and value.startswith("runs/demo/")
        ]
        return [*moved, f"run.seed={self.seed}"]

    @contextmanager
    def phase(self, name: str, what: str) -> Iterator[None]:
        self.console.print(f"[bold]{name}[/bold]  {what}")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def report(self, summary: dict[str, Any]) -> None:
        """Print the table, and write the page with the curves."""
        rows = table_rows(summary)
        table = Table(*rows[0], title="True accuracy on test prompts that nothing was tuned on")
        for row in rows[1:]:
            table.add_row(*row)
        self.console.print(table)
        runs = {name: self.folder / name / "metrics.jsonl" for name in ("ppo", "grpo")}
        write_page(self.folder / "index.html", rows, runs)
        self.console.print(f"curves: {self.folder / 'index.html'}")


def table_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    seconds = summary["seconds"]
    pairs = summary["rm_pair_accuracy"]
    rows: list[tuple[str, ...]] = [("phase", "sampled", "greedy", "seconds")]
    for name, label in (("sft", "SFT"), ("ppo", "PPO"), ("grpo", "GRPO")):
        sampled = summary[f"{name}_accuracy"]
        greedy = summary[f"{name}_accuracy_greedy"]
        rows.append((label, f"{sampled:.3f}", f"{greedy:.3f}", f"{seconds[name]:.0f}"))
    rows.insert(2, ("reward model (pairs won)", f"{pairs:.3f}", "", f"{seconds['rm']:.0f}"))
    return rows
