"""Room on the disk for what a run will certainly write."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from actors.settings import RunSettings


def bytes_needed(
    model: int, checkpoint: int, settings: RunSettings, steps: range, there: int
) -> int:
    """Return the most bytes that the run's exported model and its checkpoints take at once, given
    the bytes of one of each, the steps to do, and how many checkpoints are `there` already.

    A checkpoint is complete before the oldest one is removed, and the model comes last.
    """
    every = settings.checkpoint_every_steps
    coming = sum(step % every == 0 for step in steps) if every else 0
    keep = settings.keep_checkpoints
    in_the_end = max(0, min(keep, there + coming) - there) if coming else 0
    while_saving = max(in_the_end, min(coming, max(1, keep + 1 - there)))
    return max(while_saving * checkpoint, in_the_end * checkpoint + model)


def no_room(path: Path, needed: int) -> str:
    """Return in words that the disk of `path`, which need not exist yet, lacks room for `needed`
    bytes; nothing if it has room, or if that cannot be known.
    """
    there = next((p for p in (path, *path.absolute().parents) if os.path.exists(p)), path)
    try:
        disk = shutil.disk_usage(there)
    except OSError:
        return ""
    if not disk.total or disk.free >= needed:
        return ""
    gib = 2**30
    return f"{path}: {disk.free / gib:.2f} GiB are free, {needed / gib:.2f} GiB are needed"
