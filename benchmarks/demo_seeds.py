"""The README's table: the demo with several seeds, and the median of each figure.

.venv/bin/python benchmarks/demo_seeds.py 0 1 2
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

FIGURES = (
    ("SFT", "sft_accuracy", "sft"),
    ("reward model, pairs won", "rm_pair_accuracy", "rm"),
    ("PPO", "ppo_accuracy", "ppo"),
    ("GRPO", "grpo_accuracy", "grpo"),
)


def main(seeds: list[int]) -> None:
    summaries = []
    for seed in seeds:
        folder = Path("runs") / f"demo_seed_{seed}"
        demo = [sys.executable, "-m", "launch", "demo"]
        subprocess.run([*demo, "--seed", str(seed), "--folder", str(folder)], check=True)
        summaries.append(json.loads((folder / "summary.json").read_text()))
    print("| |" + "".join(f" seed {seed} |" for seed in seeds) + " median | seconds (median) |")
    print("|---|" + "---:|" * (len(seeds) + 2))
    for label, figure, phase in FIGURES:
        values = [summary[figure] for summary in summaries]
        seconds = median(summary["seconds"][phase] for summary in summaries)
        cells = "".join(f" {value:.3f} |" for value in values)
        print(f"| {label} |{cells} **{median(values):.3f}** | {seconds:.0f} |")


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [0, 1, 2])
