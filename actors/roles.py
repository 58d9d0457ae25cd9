"""Which processes a PPO or GRPO recipe needs, and how they come up: checked data first, then all models at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.engines import Engines
from actors.evaluation import evaluate
from actors.functions import load_function
from actors.groups import WorkerGroup
from actors.placement import Demand, Placement
from actors.rewards import Rewards
from actors.seeds import rows_of_step
from actors.settings import GRPORecipe, PPORecipe
from learners.data import Prompt, Rows, load_prompts
from learners.grpo import GRPO
from learners.models import load_tokenizer
from learners.ppo import PPO


@dataclass(frozen=True)
class RunData:
    """Everything that is read and checked before a model loads."""

    tokenizer: Any
    prompts: Rows[Prompt]
    held_out: list[Prompt]
    test: list[Prompt]

    @classmethod
    def load(cls, recipe: PPORecipe | GRPORecipe) -> RunData:
        """Raises UserError on data or reward functions that cannot serve."""
        for name in [r.function for r in recipe.rewards] + [recipe.evaluation.function]:
            if name is not None:
                load_function(name)
        tokenizer = load_tokenizer(recipe.actor.model.path)
        held_out, test = recipe.evaluation.prompts, recipe.evaluation.test_prompts
        return cls(
            tokenizer,
            load_prompts(recipe.prompts, tokenizer),
            load_prompts(held_out, tokenizer) if held_out else [],
            load_prompts(test, tokenizer) if test else [],
        )

    def prompts_of(self, step: int, count: int, seed: int) -> list[Prompt]:
        """The prompts of a step, from 1: a function of (seed, step)."""
        return [self.prompts[i] for i in rows_of_step(step, count, len(self.prompts), seed, "prompts")]

    def longest_prompt(self) -> int:
        return max(len(p.ids) for p in [*self.prompts, *self.held_out, *self.test])


@dataclass
class Roles:
    """The running processes of one run, by role. `reference` and `critic` are None where the recipe has none."""

    recipe: PPORecipe | GRPORecipe
    algorithm: PPO | GRPO
    actor: WorkerGroup
    engines: Engines
    rewards: Rewards
    reference: WorkerGroup | None
    critic: WorkerGroup | None
    judge: WorkerGroup | None
    frozen: list[WorkerGroup]
    probe: list[int]

    def learners(self) -> dict[str, WorkerGroup]:
        return {"actor": self.actor} | ({"critic": self.critic} if self.critic is not None else {})

    def connect_engines(self, version: int) -> None:
        """Open the way from Actor to engines. At version 0 both loaded the same files; later the engines are behind."""
        sync = self.recipe.sync
        where = (self.engines.handles, sync.deadline_s, self.recipe.generation.tensor_parallel)
        self.actor.call("connect", *where, phase="sync", deadline_s=sync.deadline_s)
        if version:
            self.sync(version)
        else:
            self.engines.accept(self.actor, 0, self.probe, sync, self._gate())

    def sync(self, version: int) -> float:
        """The Actor's weights into every engine, proved; returns the largest probe difference in nats."""
        return self.engines.sync(self.actor, version, self.probe, self.recipe.sync, self._gate())

    def fingerprints(self) -> list[str]:
        """Digests of all frozen models."""
        deadline = self.recipe.cluster.call_deadline_s
        return [d for g in self.frozen for d in g.call("fingerprint", phase="fingerprint", deadline_s=deadline)]

    def evaluate(self, prompts: Sequence[Prompt], name: str) -> dict[str, float]:
        """Metrics of held-out prompts under `name`; none without prompts."""
        if self.judge is None or not prompts:
            return {}
        return evaluate(self.engines, self.judge, prompts, self.recipe, name)

    def _gate(self) -> float:
        return self.recipe.sync.gate or (1e-4 if self.recipe.actor.model.dtype == "float32" else 0.1)


def demands(recipe: PPORecipe | GRPORecipe) -> dict[str, Demand]:
    """Processes, threads and GPUs of every role the recipe needs, in placement order."""
    generation, actor = recipe.generation, recipe.actor
    need = {
        "engine": Demand(generation.engines, generation.threads, generation.tensor_parallel),
        "actor": Demand(actor.ranks, actor.threads),
    }
    if isinstance(recipe, PPORecipe):
        need["critic"] = Demand(recipe.critic.ranks, recipe.critic.threads)
    if needs_reference(recipe):
        need["reference"] = Demand(recipe.reference.workers, recipe.reference.threads)
    for reward in recipe.rewards:
        need[f"reward {reward.name}"] = Demand(reward.workers, reward.threads, gpus=int(reward.kind == "model"))
    if recipe.evaluation.function is not None:
        need["judge"] = Demand(1, 1, gpus=0)
    return need


def needs_reference(recipe: PPORecipe | GRPORecipe) -> bool:
    """PPO's KL needs it always (it is also a metric); GRPO only with a KL in the loss."""
    return isinstance(recipe, PPORecipe) or recipe.algorithm.kl_beta > 0


def start_roles(recipe: PPORecipe | GRPORecipe, data: RunData, placement: Placement) -> Roles:
    """Start every process at once and wait until all have loaded, or the start deadline names those that have not."""
    device, deadline = recipe.cluster.device, recipe.cluster.call_deadline_s
    model, step, generation = recipe.actor.model, recipe.step, recipe.generation
    updates = step.steps * step.ppo_epochs * math.ceil(step.prompts_per_step * step.group_size / step.mini_batch_size)
    algorithm = PPO(recipe.algorithm) if isinstance(recipe, PPORecipe) else GRPO(recipe.algorithm, step.group_size)
    groups: dict[str, tuple[WorkerGroup, list[Any]]] = {}

    def begin(role: str, target: str, arguments: dict[str, Any], ranks: bool = False) -> WorkerGroup:
        group = WorkerGroup(role, target, placement.options(role))
        groups[role] = group, group.start(arguments, distributed=(device, deadline) if ranks else None)
        return group

    longest = generation.max_model_tokens or data.longest_prompt() + generation.max_new_tokens
    engines = Engines(placement.options("engine"))
    groups["engine"] = engines, engines.begin(model, generation, device, longest, data.tokenizer.eos_token_id)
    actor = begin(
        "actor", "actors.synced_actor:SyncedActor",
        {"settings": recipe.actor, "algorithm": algorithm, "temperature": generation.temperature,
         "max_response_tokens": generation.max_new_tokens, "total_steps": updates}, ranks=True,
    )  # fmt: skip
    critic = reference = judge = None
    if isinstance(recipe, PPORecipe):
        critic = begin(
            "critic", "learners.critic:CriticLearner",
            {"settings": recipe.critic, "value_clip": recipe.algorithm.value_clip, "total_steps": updates}, ranks=True,
        )  # fmt: skip
    if needs_reference(recipe):
        reference = begin(
            "reference", "actors.scoring:ReferenceWorker",
            {"model": recipe.reference.model or model, "temperature": generation.temperature,
             "micro_batch_tokens": recipe.reference.micro_batch_tokens, "device": device},
        )  # fmt: skip
    for reward in recipe.rewards:
        role, budget = f"reward {reward.name}", reward.micro_batch_tokens
        if reward.kind == "model":
            begin(
                role, "actors.scoring:RewardWorker",
                {"model": reward.model, "actor_model": model.path, "micro_batch_tokens": budget, "device": device},
            )  # fmt: skip
        else:
            begin(role, "actors.rewards:FunctionReward", {"function": reward.function, "actor_model": model.path})
    if recipe.evaluation.function is not None:
        function = {"function": recipe.evaluation.function, "actor_model": model.path}
        judge = begin("judge", "actors.rewards:FunctionReward", function)

    for group, pending in groups.values():
        group.gather(pending, "start", recipe.cluster.start_deadline_s)
    scorers = [groups[f"reward {r.name}"][0] for r in recipe.rewards]
    models = [g for r, g in zip(recipe.rewards, scorers, strict=True) if r.kind == "model"]
    return Roles(
        recipe, algorithm, actor, engines, Rewards(recipe.rewards, scorers, deadline), reference, critic, judge,
        frozen=models + ([reference] if reference else []),
        probe=probe_ids(data.prompts, min(recipe.sync.probe_tokens, longest - 1)),
    )  # fmt: skip


def probe_ids(prompts: Sequence[Prompt], tokens: int) -> list[int]:
    """The fixed sequence that proves a sync: the first prompts' ids, one after the other, repeated if need be."""
    ids = [i for prompt in prompts[:tokens] for i in prompt.ids]
    return (ids * tokens)[:tokens]
