"""What an RL run reads and checks before a model loads: tokenizer, prompts, functions, models'
files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actors.functions import load_function
from actors.roles import Role, roles_of
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
        """Return what speaks against the recipe's models.

        Every model must be there and have positions enough; those that read the Actor's ids must
        know them; the Actor may bring no sampling defaults that would break the ratio; a reward
        model, which may have a vocabulary of its own, must have the tokenizer it was trained with.
        """
        path = recipe.actor.model.path
        if asked := model_sampling_problems(path, sampling_defaults(path), recipe.generation):
            return [str(problem) for problem in asked]
        roles = {r.model_key: r for r in roles_of(recipe).values() if r.model is not None}
        needed = self.longest_prompt() + recipe.generation.max_new_tokens
        problems = []
        for key, role in roles.items():
            assert role.model is not None
            problems += length_problems(key, role.model, needed)
        if problems:
            return problems
        return [p for key, role in roles.items() for p in self._id_problems(key, role, path)]

    def _id_problems(self, key: str, role: Role, actor: str) -> list[str]:
        """Return what keeps a model from reading what it will be given."""
        assert role.model is not None
        path = role.model.path
        if role.head == "score":
            if scores_as_trained(role.model):
                return []
            message = "was trained with another tokenizer than lies beside it"
            return [f"{key}.path: {path} {message}, so its scores would mean nothing"]
        vocabulary = self.tokenizer.get_vocab()
        if path != actor and load_tokenizer(role.model).get_vocab() != vocabulary:
            return [f"{key}: {path} has another vocabulary than the Actor, whose ids it reads"]
        eos = self.tokenizer.eos_token_id
        prompts = (p.ids for p in [*self.prompts, *self.held_out, *self.test])
        return vocabulary_problems(key, role.model, [[] if eos is None else [eos], *prompts])

    def facts(self, recipe: RLRecipe) -> dict[str, Any]:
        """Return what constructors of workers need to know of the data (`Role.from_data`)."""
        generation = recipe.generation
        longest = self.longest_prompt() + generation.max_new_tokens
        return {
            "max_model_tokens": generation.max_model_tokens or longest,
            "eos_token_id": self.tokenizer.eos_token_id,
        }

    def prompts_of(self, step: int, count: int, seed: int) -> list[Prompt]:
        """Return the prompts of a step, from 1: a function of (seed, step)."""
        rows = rows_of_step(step, count, len(self.prompts), seed, "prompts")
        return [self.prompts[i] for i in rows]

    def longest_prompt(self) -> int:
        """Return the tokens of the longest prompt."""
        return max(len(p.ids) for p in [*self.prompts, *self.held_out, *self.test])


def scores_as_trained(model: ModelSettings) -> bool:
    """Tell whether a reward model's tokenizer is the one it was trained with, as far as its config
    remembers.
    """
    digest = getattr(load_config(model), "tokenizer_digest", None)
    return digest is None or digest == tokenizer_digest(load_tokenizer(model))
