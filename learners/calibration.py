"""Calibrations of scores that can be meant. Imports nothing heavy: recipes are checked by it."""

from __future__ import annotations

from typing import Any

from learners.errors import first_wrong

LARGEST = 3.4e38  # scores are float32 when they are calibrated
SMALLEST = 1.2e-38
ROUNDING = 1e-6  # of float32, a few units in the last place


def calibration_problem(mean: Any, std: Any) -> str:
    """Return what is wrong with a config's `score_mean` and `score_std`; nothing if scores can be
    calibrated by them.
    """
    sound = _is_number(mean) and _is_number(std)
    return first_wrong(
        (not _is_number(mean), f"score_mean must be a finite number, not {_shown(mean)}"),
        (
            not (_is_number(std) and std > SMALLEST),
            f"score_std must be a finite number above 0, not {_shown(std)}",
        ),
        (
            sound and std <= ROUNDING * abs(mean),
            f"score_std {_shown(std)} is only the rounding of score_mean {_shown(mean)}: the "
            "calibration's scores were all equal",
        ),
    )


def _is_number(value: Any) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and abs(value) <= LARGEST  # False for NaN


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a section" if isinstance(value, dict) else "a list"
    return "null" if value is None else repr(value)[:40]
