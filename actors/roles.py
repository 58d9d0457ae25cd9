"""The table of roles: the processes a recipe needs, and everything about each of them.

Placement, start, model checks, `plan` and the learners are loops over it. Nothing heavy is
imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from actors.cluster.layout import Demand, shares_gpus
from actors.seeds import derive_seed
from actors.settings import (
    ClusterSettings,
    GenerationSettings,
    Recipe,
    RewardSettings,
    RLRecipe,
    RMRecipe,
    SFTRecipe,
)
from learners.algorithms.base import find_algorithm
from learners.settings import LearnerSettings, ModelSettings

Head = Literal["lm", "score", "value"]
"""The output of a model: log-probs of tokens, one score a sequence, or one value a token."""


@dataclass(frozen=True, kw_only=True)
class Role(Demand):
    """One role of a recipe: its processes (see Demand), its model, and how a process is built.

    `section` is the recipe's key that describes it, and `count` the key in it of the number of
    processes. `target` names the class as "module:Class"; its constructor gets `arguments`, those
    of `each` process, and the facts about the data named in `from_data`. `prepare` names a
    function that imports, given the device, what the target's module does not.
    """

    name: str
    section: str
    count: str
    target: str
    model: ModelSettings | None = None
    model_key: str = ""
    head: Head = "lm"
    learner: LearnerSettings | None = None
    micro_batch_tokens: int = 0
    rows_per_unit: int = 1
    arguments: Mapping[str, Any] = field(default_factory=dict)
    each: tuple[Mapping[str, Any], ...] = ()
    from_data: tuple[str, ...] = ()
    prepare: str = ""

    @property
    def count_key(self) -> str:
        """The recipe's key of the number of processes."""
        return f"{self.section}.{self.count}"

    @property
    def kind(self) -> Literal["engine", "learner", "frozen", "function"]:
        """The use its processes make of a model: generate, train it, only read it, or none."""
        if self.name == "engine":
            return "engine"
        if self.learner is not None:
            return "learner"
        return "function" if self.model is None else "frozen"

    @property
    def fingerprint(self) -> str:
        """The method that proves its frozen weights unchanged; empty where it has none."""
        if self.kind == "learner" and self.model is not None and self.model.lora is not None:
            return "base_fingerprint"
        return "fingerprint" if self.kind == "frozen" else ""


def roles_of(recipe: Recipe) -> dict[str, Role]:
    """Return every role the recipe needs, by name, in the order in which processes are placed."""
    found = _rl_roles(recipe) if isinstance(recipe, RLRecipe) else [_supervised_role(recipe)]
    return {role.name: role for role in found}


def _supervised_role(recipe: SFTRecipe | RMRecipe) -> Role:
    if isinstance(recipe, SFTRecipe):
        return _learner(
            recipe.kind,
            "learner",
            recipe.learner,
            "lm",
            "learners.sft:SFTLearner",
            arguments={"seed": derive_seed(recipe.run.seed, "adapter")},
            from_data=("total_steps",),
        )
    seed = derive_seed(recipe.run.seed, "head")
    return _learner(
        recipe.kind,
        "learner",
        recipe.learner,
        "score",
        "learners.reward_model:RewardModelLearner",
        arguments={"reward_model": recipe.reward_model, "seed": seed},
        from_data=("total_steps", "pad_token_id"),
        rows_per_unit=2,
    )


def _rl_roles(recipe: RLRecipe) -> Iterator[Role]:
    generation = recipe.generation
    algorithm = recipe.algorithm
    lora = recipe.actor.model.lora if recipe.sync.lora == "adapter" else None
    rank = lora.rank if lora else None
    yield engine_role(recipe.actor.model, generation, recipe.cluster, recipe.run.seed, rank)
    arguments: dict[str, Any] = {
        "algorithm": find_algorithm(algorithm.kind)(algorithm, recipe.step.group_size),
        "temperature": generation.temperature,
        "max_response_tokens": generation.max_new_tokens,
        "total_steps": recipe.updates,
        "seed": derive_seed(recipe.run.seed, "adapter", "actor"),
    }
    target = "actors.weights.senders:SyncedActor"
    yield _learner("actor", "actor", recipe.actor, "lm", target, arguments)
    if recipe.critic is not None:
        arguments = {
            "total_steps": recipe.updates,
            "seed": derive_seed(recipe.run.seed, "adapter", "critic"),
            **algorithm.critic_arguments(),
        }
        target = "learners.critic:CriticLearner"
        yield _learner("critic", "critic", recipe.critic, "value", target, arguments)
    if algorithm.needs_reference and not recipe.shares_reference:
        yield _reference(recipe)
    for i, reward in enumerate(recipe.rewards):
        yield _reward(f"rewards.{i}", reward, recipe)
    if recipe.evaluation.function is not None:
        yield Role(
            name="evaluator",
            section="evaluation",
            count="",
            target="actors.rewards.function:FunctionReward",
            processes=1,
            threads=1,
            gpus=0,
            arguments={
                "function": recipe.evaluation.function,
                "deadline_s": recipe.cluster.call_deadline_s,
            },
        )


def engine_role(
    model: ModelSettings,
    generation: GenerationSettings,
    cluster: ClusterSettings,
    seed: int,
    adapter_rank: int | None = None,
) -> Role:
    """Return the role that generates; also used where a model is only sampled. With an
    `adapter_rank` it takes adapters in place of weights.
    """
    return Role(
        name="engine",
        section="generation",
        count="engines",
        target="actors.engine.engine:GenerationEngine",
        processes=generation.engines,
        threads=generation.threads,
        gpus=generation.tensor_parallel,
        model=model,
        model_key="actor.model",
        head="lm",
        arguments={
            "model": model,
            "generation": generation,
            "device": cluster.device,
            "shared": shares_gpus(cluster),
            "adapter_rank": adapter_rank,
            "swap": cluster.tier,
        },
        each=tuple({"seed": derive_seed(seed, "engine", i)} for i in range(generation.engines)),
        from_data=("max_model_tokens", "stop_token_ids"),
        prepare="actors.engine.arguments:prepare",
    )


def _learner(
    name: str,
    section: str,
    settings: LearnerSettings,
    head: Head,
    target: str,
    arguments: Mapping[str, Any] | None = None,
    from_data: tuple[str, ...] = (),
    rows_per_unit: int = 1,
) -> Role:
    return Role(
        name=name,
        section=section,
        count="ranks",
        target=target,
        processes=settings.ranks,
        threads=settings.threads,
        model=settings.model,
        model_key=f"{section}.model",
        head=head,
        learner=settings,
        micro_batch_tokens=settings.micro_batch_tokens,
        rows_per_unit=rows_per_unit,
        arguments={"settings": settings, **(arguments or {})},
        from_data=from_data,
    )


def _reference(recipe: RLRecipe) -> Role:
    settings = recipe.reference
    model = settings.model or recipe.actor.model
    return Role(
        name="reference",
        section="reference",
        count="workers",
        target="actors.reference:ReferenceWorker",
        processes=settings.workers,
        threads=settings.threads,
        model=model,
        model_key="reference.model" if settings.model else "actor.model",
        head="lm",
        micro_batch_tokens=settings.micro_batch_tokens,
        arguments={
            "model": model,
            "temperature": recipe.generation.temperature,
            "micro_batch_tokens": settings.micro_batch_tokens,
            "device": recipe.cluster.device,
        },
    )


def _reward(section: str, reward: RewardSettings, recipe: RLRecipe) -> Role:
    shared: dict[str, Any] = {
        "name": f"reward {reward.name}",
        "section": section,
        "count": "workers",
        "processes": reward.workers,
        "threads": reward.threads,
    }
    if reward.model is None:
        target = "actors.rewards.function:FunctionReward"
        deadline_s = recipe.cluster.call_deadline_s
        arguments = {"function": reward.function, "deadline_s": deadline_s}
        return Role(**shared, target=target, gpus=0, arguments=arguments)
    return Role(
        **shared,
        target="actors.rewards.model:RewardWorker",
        model=reward.model,
        model_key=f"{section}.model",
        head="score",
        micro_batch_tokens=reward.micro_batch_tokens,
        arguments={
            "model": reward.model,
            "actor_model": recipe.actor.model,
            "micro_batch_tokens": reward.micro_batch_tokens,
            "device": recipe.cluster.device,
            "measures_noise": recipe.algorithm.compares_groups,
        },
        from_data=("today",),
    )
