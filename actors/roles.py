"""Which processes a PPO or GRPO recipe needs, and how they come up: checked data first, then all
models at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.cluster.groups import WorkerError, WorkerGroup
from actors.cluster.layout import demands, needs_reference, shares_gpus, sharing_problems
from actors.cluster.placement import GpuSharing, Placement
from actors.evaluation import evaluate
from actors.functions import load_function
from actors.rewards.sources import Rewards
from actors.rollouts.generator import Engines
from actors.seeds import derive_seed, rows_of_step
from actors.settings import GRPORecipe, PPORecipe, model_sampling_problem
from actors.weights.transfer import transfer_backend
from learners.algorithms.grpo import GRPO
from learners.algorithms.ppo import PPO
from learners.data import Prompt, Rows, load_prompts, tokenizer_digest
from learners.models import (
    length_problems,
    load_config,
    load_tokenizer,
    sampling_defaults,
    vocabulary_problems,
)
from learners.settings import ModelSettings, UserError, located


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
        tokenizer = load_tokenizer(recipe.actor.model)
        held_out = recipe.evaluation.prompts
        test = recipe.evaluation.test_prompts
        data = cls(
            tokenizer,
            load_prompts(recipe.prompts, tokenizer),
            load_prompts(held_out, tokenizer) if held_out else [],
            load_prompts(test, tokenizer) if test else [],
        )
        data.check_models(recipe)
        return data

    def check_models(self, recipe: PPORecipe | GRPORecipe) -> None:
        """Raise UserError unless every model is there, has enough positions, and knows the token
        ids it will read.

        Nor may the Actor come with sampling defaults that would break the ratio.

        A reward model may have a vocabulary of its own: it is given text then.
        """
        if sharing := [f"{keys[0]}: {message}" for keys, message in sharing_problems(recipe)]:
            raise UserError(sharing)
        if asked := model_sampling_problem(
            sampling_defaults(recipe.actor.model.path), recipe.generation
        ):
            raise UserError(f"actor.model.path: {recipe.actor.model.path}: {asked}")
        needed = self.longest_prompt() + recipe.generation.max_new_tokens
        models = {"actor.model": recipe.actor.model, "reference.model": recipe.reference.model}
        models |= {f"rewards.{i}.model": r.model for i, r in enumerate(recipe.rewards)}
        if isinstance(recipe, PPORecipe):
            models["critic.model"] = recipe.critic.model
        problems = [
            p for key, model in models.items() if model for p in length_problems(key, model, needed)
        ]
        vocabulary = self.tokenizer.get_vocab()
        eos = self.tokenizer.eos_token_id
        ids = [
            [] if eos is None else [eos],
            *(p.ids for p in [*self.prompts, *self.held_out, *self.test]),
        ]
        for key in ("actor.model", "reference.model", "critic.model"):
            if problems or not (model := models.get(key)):
                continue
            if (
                model.path != recipe.actor.model.path
                and load_tokenizer(model).get_vocab() != vocabulary
            ):
                problems.append(
                    f"{key}: {model.path} has another vocabulary than the Actor, whose ids it reads"
                )
            else:
                problems += vocabulary_problems(key, model, ids)
        for i, reward in enumerate(recipe.rewards):
            if reward.model and not problems and not judges_as_trained(reward.model):
                message = (
                    "was trained with another tokenizer than lies beside it, so its scores "
                    "would mean nothing"
                )
                problems.append(f"rewards.{i}.model.path: {reward.model.path} {message}")
        if problems:
            raise UserError(problems)

    def prompts_of(self, step: int, count: int, seed: int) -> list[Prompt]:
        """The prompts of a step, from 1: a function of (seed, step)."""
        return [
            self.prompts[i] for i in rows_of_step(step, count, len(self.prompts), seed, "prompts")
        ]

    def longest_prompt(self) -> int:
        return max(len(p.ids) for p in [*self.prompts, *self.held_out, *self.test])


def judges_as_trained(model: ModelSettings) -> bool:
    """Whether a reward model's tokenizer is the one it was trained with, as far as its config
    remembers.
    """
    digest = getattr(load_config(model), "tokenizer_digest", None)
    return digest is None or digest == tokenizer_digest(load_tokenizer(model))


@dataclass
class Roles:
    """The running processes of one run, by role. `reference` and `critic` are None where the recipe
    has none.
    """

    recipe: PPORecipe | GRPORecipe
    tokenizer: Any
    algorithm: PPO | GRPO
    actor: WorkerGroup
    engines: Engines
    rewards: Rewards
    reference: WorkerGroup | None
    critic: WorkerGroup | None
    evaluator: WorkerGroup | None
    frozen: list[WorkerGroup]
    probe: list[int]
    gpu_sharing: GpuSharing = field(default_factory=GpuSharing)

    def learners(self) -> dict[str, WorkerGroup]:
        return {"actor": self.actor} | ({"critic": self.critic} if self.critic is not None else {})

    def connect_engines(self, version: int) -> None:
        """Open the way from Actor to engines. At version 0 both loaded the same files; later the
        engines are behind.
        """
        cluster = self.recipe.cluster
        deadline = self.recipe.sync.deadline_s
        backend = transfer_backend(cluster.device, shares_gpus(cluster))
        rendezvous = self.actor.free_address(deadline)
        names = self.engines.names()
        where = (deadline, self.recipe.generation.tensor_parallel, backend, rendezvous, names)
        self.actor.call("connect", self.engines.handles, *where, phase="sync", deadline_s=deadline)
        if version:
            self.sync(version)

    def sync(self, version: int) -> float:
        """The Actor's weights into every engine, proved; returns the largest probe difference in
        nats.
        """
        self.gpu_sharing.sync()
        recipe = self.recipe
        gates = recipe.max_logprob_diff, recipe.mean_logprob_diff
        return self.engines.sync(self.actor, version, self.probe, recipe.sync.deadline_s, *gates)

    def fingerprints(self) -> list[str]:
        """Digests of all frozen models."""
        deadline = self.recipe.cluster.call_deadline_s
        return [
            d
            for g in self.frozen
            for d in g.call("fingerprint", phase="fingerprint", deadline_s=deadline)
        ]

    def nodes(self) -> dict[str, list[str]]:
        """Ray's id of the node each process runs on, by role."""
        groups = [
            self.engines,
            self.actor,
            self.critic,
            self.reference,
            self.evaluator,
            *self.rewards.groups,
        ]
        return {
            group.name: [node.id for node in group.nodes] for group in groups if group is not None
        }

    def check_frozen(self, before: list[str]) -> None:
        """Raise WorkerError unless Reference and Reward models are bit by bit what they were."""
        if self.fingerprints() != before:
            raise WorkerError("export: a frozen model (Reference or Reward) changed during the run")

    def evaluate(self, prompts: Sequence[Prompt], name: str) -> tuple[dict[str, float], list[str]]:
        """Metrics of held-out prompts under `name`, none without prompts; and failures of the
        function that judges.
        """
        if self.evaluator is None or not prompts:
            return {}, []
        return evaluate(self.engines, self.evaluator, prompts, self.recipe, self.tokenizer, name)


def start_roles(recipe: PPORecipe | GRPORecipe, data: RunData, placement: Placement) -> Roles:
    """Start every process at once and wait until all have loaded, or the start deadline names those
    that have not.
    """
    device = recipe.cluster.device
    deadline = recipe.cluster.call_deadline_s
    model = located(recipe.actor.model)
    step = recipe.step
    generation = recipe.generation
    updates = (
        step.steps
        * step.ppo_epochs
        * math.ceil(step.prompts_per_step * step.group_size / step.mini_batch_size)
    )
    algorithm = (
        PPO(recipe.algorithm)
        if isinstance(recipe, PPORecipe)
        else GRPO(recipe.algorithm, step.group_size)
    )
    groups = make_groups(recipe, placement)
    engines = groups["engine"]
    assert isinstance(engines, Engines)
    starting: dict[str, list[Any]] = {}

    def begin(
        role: str, ranks: bool = False, each: Sequence[dict[str, Any]] = (), **arguments: Any
    ) -> None:
        distributed = (device, deadline) if ranks else None
        patience = recipe.cluster.start_deadline_s
        starting[role] = groups[role].start(arguments, patience, distributed=distributed, each=each)

    longest = generation.max_model_tokens or data.longest_prompt() + generation.max_new_tokens
    eos = data.tokenizer.eos_token_id
    begin(
        "engine",
        model=model,
        generation=generation,
        device=device,
        max_model_tokens=longest,
        eos_token_id=eos,
        shared=placement.shared,
        each=[{"seed": derive_seed(recipe.run.seed, "engine", i)} for i in range(len(engines))],
    )
    if (
        placement.shared
    ):  # vLLM takes its share of what is free when it starts: it starts alone, and makes room
        engines.gather(starting.pop("engine"), "start", recipe.cluster.start_deadline_s)
        engines.call("sleep", phase="start", deadline_s=deadline)
    begin(
        "actor",
        settings=recipe.actor,
        algorithm=algorithm,
        temperature=generation.temperature,
        max_response_tokens=generation.max_new_tokens,
        total_steps=updates,
        ranks=True,
    )
    if isinstance(recipe, PPORecipe):
        clip = recipe.algorithm.value_clip
        begin("critic", settings=recipe.critic, value_clip=clip, total_steps=updates, ranks=True)
    if needs_reference(recipe):
        budget = recipe.reference.micro_batch_tokens
        begin(
            "reference",
            model=recipe.reference.model or model,
            temperature=generation.temperature,
            micro_batch_tokens=budget,
            device=device,
        )
    for reward in recipe.rewards:
        if reward.kind == "function":
            begin(f"reward {reward.name}", function=reward.function)
        else:
            begin(
                f"reward {reward.name}",
                model=reward.model,
                actor_model=model,
                micro_batch_tokens=reward.micro_batch_tokens,
                device=device,
            )
    if "evaluator" in groups:
        begin("evaluator", function=recipe.evaluation.function)
    for role, pending in starting.items():
        groups[role].gather(pending, "start", recipe.cluster.start_deadline_s)

    scorers = [groups[f"reward {r.name}"] for r in recipe.rewards]
    reference = groups.get("reference")
    sharing = {
        role: groups[role]
        for role, need in demands(recipe).items()
        if need.gpus and placement.shared
    }
    return Roles(
        recipe,
        data.tokenizer,
        algorithm,
        groups["actor"],
        engines,
        Rewards(recipe.rewards, scorers, deadline),
        reference,
        groups.get("critic"),
        groups.get("evaluator"),
        frozen=[g for r, g in zip(recipe.rewards, scorers, strict=True) if r.kind == "model"]
        + ([reference] if reference else []),
        probe=probe_ids(data.prompts, min(recipe.sync.probe_tokens, longest - 1)),
        gpu_sharing=GpuSharing(sharing, deadline),
    )


def make_groups(recipe: PPORecipe | GRPORecipe, placement: Placement) -> dict[str, WorkerGroup]:
    """The processes of every role, empty: all begin at once."""
    targets = {
        "actor": "actors.weights.synced_actor:SyncedActor",
        "critic": "learners.critic:CriticLearner",
        "reference": "actors.rewards.frozen:ReferenceWorker",
        "evaluator": "actors.rewards.sources:FunctionReward",
    }
    for reward in recipe.rewards:
        kind = (
            "actors.rewards.frozen:RewardWorker"
            if reward.kind == "model"
            else "actors.rewards.sources:FunctionReward"
        )
        targets[f"reward {reward.name}"] = kind
    return {
        role: Engines(placement.options(role))
        if role == "engine"
        else WorkerGroup(role, targets[role], placement.options(role))
        for role in demands(recipe)
    }


def probe_ids(prompts: Sequence[Prompt], tokens: int) -> list[int]:
    """The fixed sequence that proves a sync: the first prompts' ids, one after the other, repeated
    if need be.
    """
    ids = [i for prompt in prompts[:tokens] for i in prompt.ids]
    return (ids * tokens)[:tokens]
