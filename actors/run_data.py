"""The data of an RL run, read and checked before a model loads: tokenizer, prompts, functions,
models' files.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from itertools import chain
from typing import Any

from actors.functions import load_function
from actors.rewards.reading import Reader
from actors.roles import Head, roles_of
from actors.rollouts.sample import Sample
from actors.seeds import rows_of_mixture
from actors.settings import RLRecipe, model_sampling_problems, position_problems
from learners.checkpoints import embedding_rows, load_config, load_tokenizer, read_calibration
from learners.data.pad import same_words, settle_filler
from learners.data.rows import Prompt, Rows, load_prompts, notices_of
from learners.data.store import by_source
from learners.data.templates import ChatTemplate
from learners.data.tokenise import end_of_response, tokenizer_digest
from learners.errors import UserError
from learners.fits import (
    adapter_problems,
    kernel_notices,
    kernel_problems,
    length_problems,
    vocabulary_problems,
)
from learners.generation import ends_of_generation, generation_config, sampling_defaults
from learners.positions import positions_of
from learners.settings import ModelSettings, PromptData, Sources

ENDLESS = (
    "no response could end: its tokenizer has no EOS token, no chat template ends an assistant's "
    "turn with a token, and generation_config.json names none; give the tokenizer an eos_token"
)


@dataclass(frozen=True)
class RunData:
    """The chat template, the prompts of training, of the curve and of the test, and what there is
    to say about models.
    """

    template: ChatTemplate
    prompts: Rows[Prompt]
    held_out: Rows[Prompt]
    test: Rows[Prompt]
    of_models: Sequence[str] = ()  # what there is to say about them

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the Actor."""
        return self.template.tokenizer

    @property
    def stops(self) -> list[int]:
        """The ids that end a response."""
        return self.template.stops

    @property
    def sets(self) -> Mapping[str, Rows[Prompt]]:
        """The data sets by the recipe's key."""
        evaluation = {"evaluation.prompts": self.held_out, "evaluation.test_prompts": self.test}
        return {"prompts": self.prompts} | {key: rows for key, rows in evaluation.items() if rows}

    @classmethod
    def load(cls, recipe: RLRecipe, today: date | None = None) -> RunData:
        """Read and check everything; templates print `today`. Raises UserError on data, models or
        functions that cannot serve.
        """
        for name in [r.function for r in recipe.rewards] + [recipe.evaluation.function]:
            if name is not None:
                load_function(name)
        data = cls.read(recipe, today)
        if problems := data.model_problems(recipe):
            raise UserError(problems)
        models = {r.model_key: r.model for r in roles_of(recipe).values() if r.model}
        return replace(data, of_models=[*data.of_models, *kernel_notices(models)])

    @classmethod
    def read(cls, recipe: RLRecipe, today: date | None = None) -> RunData:
        """Read the data as the Actor will; templates print `today`. Nothing else needs to be there
        yet. Raises UserError on data that cannot serve.
        """
        model = recipe.actor.model
        tokenizer = load_tokenizer(model)
        generation_config(model, tokenizer)  # the end writes it
        template = ChatTemplate(tokenizer, ends_of_generation(model), today)

        def rows(data: Sources[PromptData] | None) -> Rows[Prompt]:
            most = recipe.generation.max_model_tokens
            return load_prompts(data, tokenizer, template, most) if data else Rows()

        evaluation = recipe.evaluation
        prompts = rows(recipe.prompts)
        held_out = rows(evaluation.prompts)
        test = rows(evaluation.test_prompts)
        if not template.stops:
            raise UserError(f"actor.model.path: {model.path}: {ENDLESS}")
        filler = settle_filler(tokenizer, embedding_rows(load_config(model)))
        return cls(template, prompts, held_out, test, [filler] if filler else [])

    @property
    def notices(self) -> list[str]:
        """Return what there is to say about files, texts and models, once each."""
        return [*notices_of(self.prompts, self.held_out, self.test), *self.of_models]

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
            or [p for key, model in settings.items() for p in adapter_problems(key, model)]
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
        trained = longest_of(self.prompts)
        problems: list[str] = []
        for key, (model, head) in models.items():
            longest = trained
            asked: list[str] = []
            judges = head == "score" and recipe.evaluation.function is None
            if judges or key == "actor.model":
                longest = longest_of(self.all_prompts)
            if key == "actor.model":
                positions = positions_of(load_config(model))
                asked = [str(p) for p in position_problems(key, positions, generation)]
            needed = min(most, longest + generation.max_new_tokens)
            unread = partial(self._unread, recipe.prompts)
            look = unread if head == "score" else length_problems
            problems += asked or look(key, model, needed)
        return problems

    def _unread(
        self, sources: Sources[PromptData], key: str, model: ModelSettings, tokens: int
    ) -> list[str]:
        """Return what keeps a reward model from reading sequences of `tokens` if its own are as
        long as the Actor's, or from reading a prompt and the shortest answer.
        """
        shortest = self.stops[:1]
        try:
            reader = Reader.of(model, self.tokenizer, self.template.today)
            read_calibration(load_config(model))
            if reader.as_long and (too_long := length_problems(key, model, tokens)):
                return too_long
            if reader.template is None and not reader.same_ids:
                end_of_response(reader.tokenizer, reader.encoder)
            for i in reader.unsure_of(self.prompts):
                prompt = self.prompts[i]
                said = (prompt.text, "", "stop", prompt.columns, prompt.conversation)
                if wrong := reader.read(Sample(prompt.ids, shortest, *said))[1]:
                    every = by_source("prompts", sources, self.prompts)
                    source = next(name for name, _, _, places in every if i in places)
                    row = f"row {prompt.row} of {source}.path and an empty answer"
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
        if path != actor and not same_words(load_tokenizer(model), self.tokenizer):
            return [f"{key}: {path} has another vocabulary than the Actor, whose ids it reads"]
        prompts = (p.ids for p in self.all_prompts)
        ends = "responses end (tokenizer, template, generation_config.json) with"
        return vocabulary_problems(key, model, [self.stops], ends) or vocabulary_problems(
            key, model, prompts
        )

    def facts(self, recipe: RLRecipe) -> dict[str, Any]:
        """Return the facts about the data that constructors of workers take (`Role.from_data`)."""
        generation = recipe.generation
        longest = longest_of(self.all_prompts) + generation.max_new_tokens
        return {
            "max_model_tokens": generation.max_model_tokens or longest,
            "stop_token_ids": self.stops,
            "today": self.template.today,
        }

    def total_steps(self, recipe: RLRecipe) -> int:
        """Return the steps of the run."""
        return recipe.step.steps

    def prompts_of(self, step: int, count: int, seed: int) -> list[Prompt]:
        """Return the prompts of a step, from 1: a function of (seed, step). Those of one source are
        neighbours.
        """
        rows = rows_of_mixture(step, count, self.prompts.parts, seed, "prompts")
        return [self.prompts[i] for part in rows for i in part]

    @property
    def all_prompts(self) -> Iterator[Prompt]:
        """Prompts of training and of evaluation."""
        return chain(self.prompts, self.held_out, self.test)


def longest_of(prompts: Iterable[Prompt]) -> int:
    """Return the tokens of the longest prompt."""
    return max(len(prompt.ids) for prompt in prompts)


def scores_as_trained(model: ModelSettings) -> bool:
    """Tell whether a reward model's tokenizer is the one it was trained with; true when its config
    has no digest of that.
    """
    digest = getattr(load_config(model), "tokenizer_digest", None)
    return digest is None or digest == tokenizer_digest(load_tokenizer(model))
