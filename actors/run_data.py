"""The data of an RL run, read and checked before a model loads: tokenizer, prompts, functions,
models' files.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.functions import load_function
from actors.rewards.reading import Reader
from actors.roles import Head, roles_of
from actors.rollouts.requests import Sample
from actors.seeds import rows_of_step
from actors.settings import RLRecipe, model_sampling_problems, position_problems
from learners.checkpoints import (
    generation_config,
    kernel_problems,
    length_problems,
    load_config,
    load_tokenizer,
    read_calibration,
    sampling_defaults,
    vocabulary_problems,
)
from learners.data.rows import Prompt, Rows, load_prompts, notices_of
from learners.data.tokenise import end_of_response, tokenizer_digest
from learners.errors import DataError, UserError
from learners.positions import positions_of
from learners.settings import ModelSettings, PromptData


@dataclass(frozen=True)
class RunData:
    """The tokenizer, and the prompts of training, of the curve and of the test."""

    tokenizer: Any
    prompts: Rows[Prompt]
    held_out: Rows[Prompt]
    test: Rows[Prompt]

    @property
    def sets(self) -> Mapping[str, Sequence[Prompt]]:
        """The data sets by the recipe's key."""
        evaluation = {"evaluation.prompts": self.held_out, "evaluation.test_prompts": self.test}
        return {"prompts": self.prompts} | {key: rows for key, rows in evaluation.items() if rows}

    @classmethod
    def load(cls, recipe: RLRecipe) -> RunData:
        """Read everything. Raises UserError on data, models or functions that cannot serve."""
        for name in [r.function for r in recipe.rewards] + [recipe.evaluation.function]:
            if name is not None:
                load_function(name)
        tokenizer = load_tokenizer(recipe.actor.model)
        generation_config(recipe.actor.model, tokenizer)  # the end writes it

        def read(key: str, data: PromptData | None) -> Rows[Prompt]:
            rows = load_prompts(data, tokenizer) if data else Rows()
            return with_room(key, data, rows, recipe.generation.max_model_tokens) if data else rows

        evaluation = recipe.evaluation
        data = cls(
            tokenizer,
            read("prompts", recipe.prompts),
            read("evaluation.prompts", evaluation.prompts),
            read("evaluation.test_prompts", evaluation.test_prompts),
        )
        if problems := data.model_problems(recipe):
            raise UserError(problems)
        return data

    @property
    def notices(self) -> list[str]:
        """Return what there is to say about files and texts, once each."""
        return notices_of(self.prompts, self.held_out, self.test)

    def model_problems(self, recipe: RLRecipe) -> list[str]:
        """Return the problems of the recipe's models, one line each.

        Every model must be there, have positions enough and the attention it was trained with;
        those that read the Actor's ids must know them; the Actor may bring no sampling defaults
        that would break the ratio; a reward model, which may have a vocabulary of its own, must
        have the tokenizer it was trained with.
        """
        path = recipe.actor.model.path
        if asked := model_sampling_problems(path, sampling_defaults(path), recipe.generation):
            return [str(problem) for problem in asked]
        models = {r.model_key: (r.model, r.head) for r in roles_of(recipe).values() if r.model}
        settings = {key: model for key, (model, _) in models.items()}
        return (
            self._length_problems(models, recipe)
            or [p for key, model in settings.items() for p in kernel_problems(key, model)]
            or [
                problem
                for key, (model, head) in models.items()
                for problem in self._id_problems(key, model, head, path)
            ]
        )

    def _length_problems(
        self, models: Mapping[str, tuple[ModelSettings, Head]], recipe: RLRecipe
    ) -> list[str]:
        """Return which models have too few positions. The Actor's also hold in the engine, which
        samples for the evaluation too, and has room for `max_model_tokens` from the start; the
        others read what is trained on.
        """
        generation = recipe.generation
        most = generation.max_model_tokens or sys.maxsize
        problems: list[str] = []
        for key, (model, head) in models.items():
            prompts: Sequence[Prompt] = self.prompts
            asked: list[str] = []
            if head == "score" and recipe.evaluation.function is None:
                prompts = self.all_prompts  # which it judges too
            if key == "actor.model":
                prompts = self.all_prompts
                positions = positions_of(load_config(model))
                asked = [str(p) for p in position_problems(key, positions, generation)]
            needed = min(most, longest_of(prompts) + generation.max_new_tokens)
            look = self._unread if head == "score" else length_problems
            problems += asked or look(key, model, needed)
        return problems

    def _unread(self, key: str, model: ModelSettings, tokens: int) -> list[str]:
        """Return what keeps a reward model from reading sequences of `tokens` if it reads the
        Actor's ids, or from reading a prompt and the shortest answer in ids of its own.
        """
        eos = self.tokenizer.eos_token_id
        shortest = [] if eos is None else [eos]
        try:
            reader = Reader.of(model, self.tokenizer)
            read_calibration(load_config(model))
            if reader.same_ids and (too_long := length_problems(key, model, tokens)):
                return too_long
            if not reader.same_ids:
                end_of_response(reader.tokenizer, reader.encoder)
            for i in reader.doubtful([prompt.text for prompt in self.prompts]):
                prompt = self.prompts[i]
                sample = Sample(prompt.ids, shortest, prompt.text, "", "stop", prompt.columns)
                _, wrong = reader.read(sample)
                if wrong:
                    row = f"row {prompt.index + 1} of prompts.path and an empty answer"
                    return [f"{key}: {model.path} cannot read {row}: {wrong}"]
        except UserError as error:
            return [f"{key}: {problem}" for problem in error.problems]
        return []

    def _id_problems(self, key: str, model: ModelSettings, head: Head, actor: str) -> list[str]:
        """Return the problems a model would have with the token ids that it is to read."""
        path = model.path
        if head == "score":
            if scores_as_trained(model):
                return []
            message = "was trained with another tokenizer than the one in its folder"
            return [f"{key}.path: {path} {message}, so its scores would mean nothing"]
        vocabulary = self.tokenizer.get_vocab()
        if path != actor and load_tokenizer(model).get_vocab() != vocabulary:
            return [f"{key}: {path} has another vocabulary than the Actor, whose ids it reads"]
        eos = self.tokenizer.eos_token_id
        prompts = (p.ids for p in self.all_prompts)
        return vocabulary_problems(key, model, [[] if eos is None else [eos], *prompts])

    def facts(self, recipe: RLRecipe) -> dict[str, Any]:
        """Return the facts about the data that constructors of workers take (`Role.from_data`)."""
        generation = recipe.generation
        longest = longest_of(self.all_prompts) + generation.max_new_tokens
        return {
            "max_model_tokens": generation.max_model_tokens or longest,
            "eos_token_id": self.tokenizer.eos_token_id,
        }

    def total_steps(self, recipe: RLRecipe) -> int:
        """Return the steps of the run."""
        return recipe.step.steps

    def prompts_of(self, step: int, count: int, seed: int) -> list[Prompt]:
        """Return the prompts of a step, from 1: a function of (seed, step)."""
        rows = rows_of_step(step, count, len(self.prompts), seed, "prompts")
        return [self.prompts[i] for i in rows]

    @property
    def all_prompts(self) -> list[Prompt]:
        """Prompts of training and of evaluation."""
        return [*self.prompts, *self.held_out, *self.test]


def longest_of(prompts: Sequence[Prompt]) -> int:
    """Return the tokens of the longest prompt."""
    return max(len(prompt.ids) for prompt in prompts)


def with_room(
    key: str, data: PromptData, rows: Rows[Prompt], max_model_tokens: int | None
) -> Rows[Prompt]:
    """Return the prompts that leave room for an answer within `max_model_tokens` (None: all do).

    Raises DataError on one that does not, unless `long_prompts` of the data at `key` is drop, and
    where none is left.
    """
    limit = "generation.max_model_tokens"
    fitting: Rows[Prompt] = Rows()
    fitting.dropped += rows.dropped
    fitting.notices += rows.notices
    for prompt in rows:
        if max_model_tokens is None or len(prompt.ids) < max_model_tokens:
            fitting.append(prompt)
        elif data.long_prompts == "drop":
            fitting.dropped["too long"] += 1
        else:
            raise DataError(
                f"{data.path}: row {prompt.index + 1}: the prompt has {len(prompt.ids)} tokens, "
                f"which leaves no room for an answer in {limit} {max_model_tokens}; raise it, or "
                f"set {key}.long_prompts: drop"
            )
    if not fitting:
        raise DataError(f"{data.path}: no prompt is shorter than {limit} {max_model_tokens}")
    return fitting


def scores_as_trained(model: ModelSettings) -> bool:
    """Tell whether a reward model's tokenizer is the one it was trained with; true when its config
    has no digest of that.
    """
    digest = getattr(load_config(model), "tokenizer_digest", None)
    return digest is None or digest == tokenizer_digest(load_tokenizer(model))
