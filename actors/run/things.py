"""Things: all that a recipe's paths named when a run read it. Every checkpoint has a table of them,
so that a resumed run can tell what lies there now from what it was made of.

The table says, by the recipe's key of the path and part by part, what was found: digests, with
words beside them for a person.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from functools import reduce
from hashlib import blake2b
from pathlib import Path
from typing import Any

from actors.roles import Role, roles_of
from actors.run.folder import THINGS_FILE, finished_checkpoints
from actors.run.progress import say
from actors.run.resume import Resume, differing
from actors.settings import Recipe, RLRecipe
from learners.data.files import read_json
from learners.data.store import Rows, by_source
from learners.errors import UserError

Found = Mapping[str, Mapping[str, Any]]
"""Parts by the recipe's key: words with a digest, or a section of plain values."""

NAMED = "named"  # the part that says what of the recipe's words the others were found under
READ = "read"  # the part that says by which other words rows were read
CODE = "code"  # the part that may differ: most changes of a source file change no number
TODAY = "today"  # the key of the date that templates print: the day on which the run began
LONGEST = 60  # of a value in a message, characters


class Things:
    """The things of one run, compared with those of the checkpoint that it goes on from."""

    def __init__(self, folder: Path, resume: Resume | None) -> None:
        """Read the newest checkpoint's table if the run resumes. Raises UserError when it is
        broken.
        """
        self.table: dict[str, dict[str, Any]] = {}
        self.before: Found = {}
        self.accept = resume.accept if resume else ()
        self.differ: set[str] = set()
        self.step = 0
        self.checkpoint: Path | None = None
        if resume:
            self.step, self.checkpoint = finished_checkpoints(folder)[-1]
            self.before = _read(self.checkpoint / THINGS_FILE)
        self.table[TODAY] = {"date": self.today.isoformat()}

    @property
    def today(self) -> date:
        """The date that templates print: that on which the run began."""
        written = self.before.get(TODAY, {}).get("date")
        return date.fromisoformat(written) if written else date.today()

    def add(self, found: Found) -> None:
        """Enter what was found into the table. Raises UserError for what differs from the
        checkpoint's and is not accepted; says what is.

        What another path names is not compared: the path is, with the recipe. Rows that other
        words read are, but for the evaluation's, whose words may change.
        """
        refused: dict[str, str] = {}
        for key, parts in found.items():
            self.table.setdefault(key, {}).update(parts)
            before = self.before.get(key)
            if before is None or _named_otherwise(parts, before):  # new here, or under this path
                self.differ.add(key)
            elif differences := list(_differences(parts, before, self.step)):
                self.differ.add(key)
                more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
                self._judge(key, f"{parts[NAMED]['path']}: {differences[0]}{more}", refused)
        if refused:
            raise UserError([f"{key}: {message}" for key, message in differing(refused)])

    def _judge(self, key: str, difference: str, refused: dict[str, str]) -> None:
        read_otherwise = self.table[key].get(READ) != self.before[key].get(READ)
        if key.startswith("evaluation.") and read_otherwise:
            say(f"notice: {key}: {difference}; its keys have changed, so the rows may have")
        elif CODE in self.table[key]:
            say(f"warning: {key}: {difference}; from here on the new one counts")
        elif key in self.accept:
            say(f"accepted: {key}: {difference}")
        else:
            refused[key] = (
                f"{difference}; put back what was there, or go on with what is there now: "
                f"--accept {key}"
            )

    def check_accepted(self, loaded: bool = True) -> None:
        """Raise UserError if something was to be accepted under whose key nothing differs. Until
        the models have `loaded`, their weights still may.
        """
        if not self.before:
            return
        compared = [key for key in self.table if loaded or not key.endswith("model.path")]
        if unneeded := [key for key in self.accept if key in compared and key not in self.differ]:
            there = ", ".join(sorted(self.differ)) or "nothing does"
            raise UserError(
                f"--accept {unneeded[0]}: nothing differs there from the checkpoint of step "
                f"{self.step}; leave it out (what differs: {there})"
            )


def _read(file: Path) -> Found:
    if not file.exists():
        say(
            f"{file.parent}: saved by a version that kept no digests; whether data and models are "
            "what they were cannot be compared"
        )
        return {}
    if (table := read_json(file)) is None:
        raise UserError(f"run.folder: {file} cannot be read: it is no JSON object")
    return table


def _named_otherwise(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Tell whether other things are named than before, as far as they were written down."""
    named = before.get(NAMED, {})
    return any(named.get(name) != value for name, value in now[NAMED].items())


def _differences(now: Mapping[str, Any], before: Mapping[str, Any], step: int) -> Iterator[str]:
    """Yield what differs among the parts that both have, each with both values."""
    for part in now:
        if part in (NAMED, READ) or part not in before or now[part] == before[part]:
            continue
        if isinstance(now[part], dict) and isinstance(before[part], dict):
            for name in dict.fromkeys([*now[part], *before[part]]):
                values = [_short(of[part].get(name)) for of in (now, before)]
                if now[part].get(name) != before[part].get(name):
                    yield f"{part}: {name} is {values[0]} now, {values[1]} at step {step}"
        else:
            yield f"{part}: {_short(now[part])} now, {_short(before[part])} at step {step}"


def _short(value: Any) -> str:
    plain = isinstance(value, str) and value.isprintable()
    text = value if plain else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


# --- what the paths name --------------------------------------------------------------------------


def found_by(recipe: Recipe, tokenizer: Any, sets: Mapping[str, Rows[Any]]) -> Found:
    """Return everything that can be known before a model loads: the rows of the data `sets` as they
    were loaded, by the recipe's key of their source; models' configs and tokenizers; the source of
    functions.

    `tokenizer` is the trained model's.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, rows in sets.items():
        written: Any = reduce(getattr, key.split("."), recipe)
        for name, data, _, places in by_source(key, written, rows):
            read = data.model_dump(mode="json")
            named = {word: read.pop(word) for word in ("path", "split")}
            found[f"{name}.path"] = {NAMED: named, READ: read, "rows": _rows(rows, places)}
    for role in roles_of(recipe).values():
        if role.model is not None:
            parts = found.setdefault(f"{role.model_key}.path", {NAMED: {"path": role.model.path}})
            parts.update(_model(role, tokenizer))
    return found | dict(_code(recipe))


def weights_of(recipe: Recipe, fingerprints: Mapping[str, Sequence[str]]) -> Found:
    """Return the weights that are not trained, of whole models and of those below an adapter, from
    their processes' fingerprints by role.
    """
    roles = roles_of(recipe)
    found: dict[str, dict[str, Any]] = {}
    for name, prints in fingerprints.items():
        role = roles[name]
        if role.model is not None:
            parts = found.setdefault(f"{role.model_key}.path", {NAMED: {"path": role.model.path}})
            parts[f"{_frozen_part(role)} of the {name}"] = " ".join(sorted(set(prints)))
    return found


def _frozen_part(role: Role) -> str:
    return "frozen weights" if role.learner else "weights"


def _rows(rows: Rows[Any], places: range) -> str:
    """Return how many rows there are at these places, and a digest of every one in order."""
    whole = blake2b(digest_size=8)
    for i in places:
        whole.update(json.dumps(rows[i].compared, default=_words).encode() + b"\n")
    return f"{len(places)} ({whole.hexdigest()})"


def _model(role: Role, tokenizer: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a model's folder that a role reads besides the weights."""
    from learners.checkpoints import load_config, load_tokenizer
    from learners.data.tokenise import tokenizer_digest
    from learners.generation import sampling_defaults

    model = role.model
    assert model is not None
    yield "config.json", _plain(load_config(model).to_diff_dict())
    if model.trust_remote_code:
        yield "Python files", python_files(model.path)
    learner = role.kind == "learner" and role.head != "value"
    if learner:
        template = json.dumps(tokenizer.chat_template or "", ensure_ascii=False)
        yield "chat template", f"{len(template) - 2} characters ({_digest(template)})"
        yield "generation_config.json", _plain(sampling_defaults(model.path))
    if learner or role.head == "score":
        own = tokenizer if learner else load_tokenizer(model)
        yield "tokenizer", f"{len(own)} tokens ({tokenizer_digest(own)})"


def python_files(path: str) -> str:
    """Return how many Python files come with a model, and a digest of them. Those of a model on the
    hub are brought into its cache.
    """
    folder = path
    if not os.path.isdir(path):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(path, allow_patterns="*.py")
    files = sorted(Path(folder).glob("*.py"))
    return f"{len(files)} files ({_digest(*(file.read_bytes() for file in files))})"


def _code(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the source files of functions and classes that the recipe names as module:name; they
    have been imported.
    """
    if not isinstance(recipe, RLRecipe):
        return
    names = {f"rewards.{i}.function": reward.function for i, reward in enumerate(recipe.rewards)}
    names |= {
        "evaluation.function": recipe.evaluation.function,
        "algorithm.kind": recipe.algorithm.kind if ":" in recipe.algorithm.kind else None,
    }
    for key, name in names.items():
        if name is None:
            continue
        module, _, attribute = name.partition(":")
        value = getattr(sys.modules[module], attribute)
        modules = {module, getattr(value, "__module__", module)}  # named in one, written in another
        files = {getattr(sys.modules.get(name), "__file__", None) for name in modules}
        sources = [Path(file).read_bytes() for file in sorted(filter(None, files))]
        lines = sum(source.count(b"\n") for source in sources)
        yield key, {NAMED: {"path": name}, CODE: f"{lines} lines ({_digest(*sources)})"}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as JSON would hold it, without what only says who saved it and from where."""
    names = ("transformers_version", "_name_or_path", "_from_model_config")
    kept = {name: value for name, value in values.items() if name not in names}
    plain: dict[str, Any] = json.loads(
        json.dumps(kept, default=_words, sort_keys=True), parse_constant=str
    )
    return plain


def _words(value: Any) -> str:
    """Return a value that JSON does not know in words that are the same in every process."""
    text = repr(value)
    return type(value).__name__ if " at 0x" in text else text


def _digest(*parts: str | bytes) -> str:
    whole = blake2b(digest_size=8)
    for part in parts:
        whole.update(part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass"))
    return whole.hexdigest()
