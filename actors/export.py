"""The model that leaves a run: the small files of it, which are tried before the first step and
kept in every checkpoint, and the whole of it at the end.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.exceptions import RayTaskError

from actors.cluster.groups import WorkerError, WorkerGroup
from actors.roles import roles_of
from actors.run.folder import MODEL_FILES, complete_or_absent
from actors.run.progress import say
from actors.settings import Recipe
from learners.errors import UserError, in_a_line
from learners.generation import generation_config
from learners.settings import ADAPTER_FOLDER

LATE_S = 30.0  # a shared file system may show a new file to other machines so late


class Export:
    """The trained role whose model leaves the run (the Actor, or the only one that there is), and
    what plain Transformers needs beside its weights. A response of it ends with one of `stops`.
    """

    def __init__(
        self,
        recipe: Recipe,
        groups: Mapping[str, WorkerGroup],
        tokenizer: Any,
        stops: Sequence[int] = (),
    ) -> None:
        learners = {name: role for name, role in roles_of(recipe).items() if role.learner}
        self.name, self.role = next(iter(learners.items()))
        self.groups = {name: groups[name] for name in learners}
        self.adapted = [name for name, role in learners.items() if role.model and role.model.lora]
        self.tokenizer = tokenizer
        self.stops = stops
        self.deadline_s = recipe.cluster.call_deadline_s
        self.generation: dict[str, Any] = {}  # a reward model generates nothing

    def rehearse(self, run: Path) -> None:
        """Write the small files as the end will write them, into the run folder. Raises UserError
        where the end would fail.
        """
        model = self.role.model
        assert model is not None
        try:
            if self.role.head == "lm":
                self.generation = generation_config(model, self.tokenizer, self.stops)
            self.write_files(run / MODEL_FILES)
            self._say_unadapted()
        except UserError:
            raise
        except Exception as error:
            if isinstance(error, WorkerError) and not isinstance(error.__cause__, RayTaskError):
                raise  # a process died or is stuck
            raise UserError(
                f"{self.role.model_key}: a model trained from {model.path} could not be exported: "
                f"{in_a_line(error)}"
            ) from error

    def write_files(self, folder: Path) -> None:
        """Write all but the weights: config, generation config and tokenizer."""
        group = self.groups[self.name]
        group.call_without_swap(
            "export_config", str(folder), phase="export", deadline_s=self.deadline_s
        )
        self._written(folder, "config.json")
        self._write_beside_config(folder)

    def _say_unadapted(self) -> None:
        """Say which parts of models with LoRA get no adapter."""
        for name in self.adapted:
            group = self.groups[name]
            lines = group.call("unadapted", phase="export", deadline_s=self.deadline_s)
            if line := lines[0]:
                say(f"notice: {name}: model.lora: {line}")

    def write_model(self, folder: Path) -> None:
        """Write the whole model. At `folder` it appears complete, or not at all."""
        group = self.groups[self.name]
        with complete_or_absent(folder) as draft:
            group.call("export", str(draft), phase="export", deadline_s=self.deadline_s)
            self._written(draft, "*.safetensors")
            self._write_beside_config(draft)

    def _written(self, folder: Path, name: str) -> None:
        """Raise UserError unless the driver, too, sees what the learner has written."""
        until = time.monotonic() + LATE_S
        while not any(folder.glob(name)):
            if time.monotonic() > until:
                worker = self.groups[self.name].names()[0]
                raise UserError(
                    f"run.folder: {folder} is another folder for {worker}: it must lie on a file "
                    "system that all nodes share"
                )
            time.sleep(0.1)

    def _write_beside_config(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        if self.generation:
            text = json.dumps(self.generation, indent=2, ensure_ascii=False) + "\n"
            (folder / "generation_config.json").write_text(text, encoding="utf-8")

    def disk_bytes(self) -> tuple[int, int]:
        """Return the bytes that the model and that one checkpoint take at least."""
        sizes = {
            name: group.call("disk_bytes", phase="export", deadline_s=self.deadline_s)[0]
            for name, group in self.groups.items()
        }
        return sizes[self.name][0], sum(checkpoint for _, checkpoint in sizes.values())


def show_adapter(model: Path) -> None:
    """Link the adapter that lies in an exported model, if one does, beside it."""
    link = model.with_name(ADAPTER_FOLDER)
    if (model / ADAPTER_FOLDER).is_dir() and not os.path.lexists(link):
        link.symlink_to(Path(model.name, ADAPTER_FOLDER))
