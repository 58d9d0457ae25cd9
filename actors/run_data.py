"""The data of an RL run, read and checked before a model loads: tokenizer, prompts, functions,
models' files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.functions import load_function
from actors.roles import Head, roles_of
from actors.seeds import rows_of_step
from actors.settings import RLRecipe, model_sampling_problems
from learners.checkpoints import (
    length_problems,
    load_config,
    load_tokenizer,
    sampling_defaults,
    vocabulary_problems,
)
from learners.errors import UserError
from learners.rows import Prompt, Rows, load_prompts
from learners.settings import ModelSettings, PromptData
from learners.tokenise import tokenizer_digest


@dataclass(frozen=True)
class RunData:
    """The tokenizer, and the prompts of training, of the curve and of the test."""

    tokenizer: Any
    prompts: Rows[Prompt]
    held_out: list[Prompt]
    test: list[Prompt]

    @property
    def sets(self) -> dict[str, Sequence[Prompt]]:
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

        def read(data: PromptData | None) -> list[Prompt]:
            return load_prompts(data, tokenizer) if data else []

        prompts = load_prompts(recipe.prompts, tokenizer)
        evaluation = recipe.evaluation
        data = cls(tokenizer, prompts, read(evaluation.prompts), read(evaluation.test_prompts))
        if problems := data.model_problems(recipe):
            raise UserError(problems)
        return data

    def model_problems(self, recipe: RLRecipe) -> list[str]:
        """Return the problems of the recipe's models, one line each.

        Every model must be there and have positions enough; those that read the Actor's ids must
        know them; the Actor may bring no sampling defaults that would break the ratio; a reward
        model, which may have a vocabulary of its own, must have the tokenizer it was trained with.
        """
        path = recipe.actor.model.path
        if asked := model_sampling_problems(path, sampling_defaults(path), recipe.generation):
            return [str(problem) for problem in asked]
        models = {r.model_key: (r.model, r.head) for r in roles_of(recipe).values() if r.model}
        needed = self.longest_prompt() + recipe.generation.max_new_tokens
        too_short = [p for key, (m, _) in models.items() for p in length_problems(key, m, needed)]
        return too_short or [
            problem
            for key, (model, head) in models.items()
            for problem in self._id_problems(key, model, head, path)
        ]

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
        prompts = (p.ids for p in [*self.prompts, *self.held_out, *self.test])
        return vocabulary_problems(key, model, [[] if eos is None else [eos], *prompts])

    def facts(self, recipe: RLRecipe) -> dict[str, Any]:
        """Return the facts about the data that constructors of workers take (`Role.from_data`)."""
        generation = recipe.generation
        longest = self.longest_prompt() + generation.max_new_tokens
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

    def longest_prompt(self) -> int:
        """Return the tokens of the longest prompt."""
        return max(len(p.ids) for p in [*self.prompts, *self.held_out, *self.test])


def scores_as_trained(model: ModelSettings) -> bool:
    """Tell whether a reward model's tokenizer is the one it was trained with; true when its config
    has no digest of that.
    """
    digest = getattr(load_config(model), "tokenizer_digest", None)
    return digest is None or digest == tokenizer_digest(load_tokenizer(model))
