"""`quatuor export`: the model of a checkpoint, in one process, without Ray and without a GPU."""

from __future__ import annotations

import json
import os
from pathlib import Path

from actors.run.folder import MODEL_FILES, complete_or_absent, finished_checkpoints
from actors.run.room import no_room
from learners.errors import UserError, first_wrong, in_a_line
from learners.launchers import clear_foreign_launchers
from learners.settings import ADAPTER_FOLDER

EXPORTED = ("actor", "learner")  # folders of the trained roles whose model leaves a run


def export_model(source: Path, folder: Path) -> None:
    """Write the model of `source`, a run (its newest checkpoint) or one checkpoint, to `folder`,
    with the weights that the run would have exported at that step.

    Raises UserError when there is no such checkpoint, or when `folder` cannot be made.
    """
    checkpoint = find_checkpoint(source)
    learner = next(checkpoint / name for name in EXPORTED if (checkpoint / name).is_dir())
    if wrong := _taken(folder):
        raise UserError(f"{folder}: {wrong}")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    clear_foreign_launchers()  # before DeepSpeed is imported, which believes them
    from learners.export import export_saved
    from learners.weights import export_adapter, read_saved

    try:
        saved = read_saved(learner)
    except UserError:  # of the base that an adapter was trained on
        raise
    except Exception as error:
        raise RuntimeError(f"{learner}: cannot be read: {in_a_line(error)}") from error
    if wrong := no_room(folder, sum(tensor.nbytes for tensor in saved.values())):
        raise UserError(f"{wrong}: make room, or choose another folder")
    try:
        with complete_or_absent(folder) as draft:
            export_saved(saved, checkpoint / MODEL_FILES, draft)
            export_adapter(learner, draft / ADAPTER_FOLDER)
    except OSError as error:
        reason = error.strerror or in_a_line(error)
        raise UserError(
            f"{folder}: cannot be written: {reason}: make room, or choose another folder"
        ) from error
    _say(checkpoint, folder)


def find_checkpoint(source: Path) -> Path:
    """Return the checkpoint that a run's or a checkpoint's folder stands for. Raises UserError."""
    run = (source / "checkpoints").is_dir()
    finished = finished_checkpoints(source)
    checkpoint = finished[-1][1] if finished else source
    trained = any((checkpoint / name / "layout.json").is_file() for name in EXPORTED)
    started = run or (source / "config.yaml").is_file()
    wrong = first_wrong(
        (not source.is_dir(), "no such folder"),
        (
            started and not finished,
            "the run has no finished checkpoint (run.checkpoint_every_steps)",
        ),
        (not trained, "neither a run nor a checkpoint of one"),
        (
            not (checkpoint / "run_folder.json").is_file(),
            "the checkpoint is not complete: the run ended while it was written",
        ),
        (
            not (checkpoint / MODEL_FILES / "config.json").is_file(),
            f"{checkpoint.name} has no {MODEL_FILES}, as those of an earlier version: resume the "
            "run, which then exports its model",
        ),
    )
    if wrong:
        raise UserError(f"{source}: {wrong}")
    return checkpoint


def _taken(folder: Path) -> str:
    """Return what is in the way of a new folder; nothing if nothing is."""
    draft = folder.with_name(f"{folder.name}.tmp")
    above = next(p for p in folder.absolute().parents if os.path.lexists(p))
    return first_wrong(
        (os.path.lexists(folder), "exists: choose another folder"),
        (os.path.lexists(draft), f"{draft} is in the way: remove it, or choose another folder"),
        (not above.is_dir(), f"cannot be made: {above} is no folder"),
    )


def _say(checkpoint: Path, folder: Path) -> None:
    """Print where the model is, what a reward model lacks, and who loads it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    print(f"the model of {checkpoint} is in {folder}")
    if (adapter := folder / ADAPTER_FOLDER).is_dir():
        print(f"its adapter, for PEFT, is in {adapter}")
    scores = any(
        str(name).endswith("ForSequenceClassification") for name in config["architectures"]
    )
    if (folder / "README.md").is_file():
        print(
            f"Transformers has no {config['architectures'][0]}: its README.md says how to read it"
        )
    if scores and "score_std" not in config:
        print("its scores are not calibrated: that is done at the end of a run")
