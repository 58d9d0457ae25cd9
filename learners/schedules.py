"""The learning rate of every optimizer step, as a share of its peak. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Callable

from learners.settings import OptimizerSettings


def schedule(settings: OptimizerSettings, total_steps: int) -> Callable[[int], float]:
    """Return a function from optimizer step i, from 0, to a factor of the peak learning rate:
    linear warm-up, then constant, linear or cosine decay.
    """

    def factor(i: int) -> float:
        warm = min(1.0, (i + 1) / (settings.warmup_steps + 1))
        if settings.schedule == "constant" or i < settings.warmup_steps:
            return warm
        done = min(1.0, (i - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps))
        left = 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return settings.final_fraction + (1 - settings.final_fraction) * left

    return factor
