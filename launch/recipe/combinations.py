"""What types cannot say about a recipe by itself: combinations that make no sense. Nothing but the
recipe is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from actors.cluster.layout import demands, layout, nodes_needed, sharing_problems
from actors.settings import (
    GRPORecipe,
    PPORecipe,
    RewardSettings,
    RLRecipe,
    RMRecipe,
    SFTRecipe,
)
from learners.settings import LearnerSettings, ModelSettings

Recipe = SFTRecipe | RMRecipe | PPORecipe | GRPORecipe

LEAST_GRPO_TEMPERATURE = 0.7
USUAL_GROUP = 8


@dataclass(frozen=True)
class Problem:
    """Something wrong: the keys it comes from (the first is the one to name) and what would be
    right.
    """

    keys: tuple[str, ...]
    message: str


def combination_problems(recipe: Recipe) -> Iterator[Problem]:
    """Keys that are fine one by one and impossible together."""
    for key, model in models_of(recipe):
        yield from _attention(key, model, recipe.cluster.device)
    for key, learner in _learners(recipe):
        yield from _offload(key, learner, recipe.cluster.device)
        if learner.model.dtype == "bfloat16" and learner.zero_stage == 0:
            message = (
                "bfloat16 needs zero_stage 1, 2 or 3, which keep float32 master weights; else "
                "small steps vanish"
            )
            yield Problem((f"{key}.zero_stage", f"{key}.model.dtype"), message)
    if isinstance(recipe, RLRecipe):
        yield from _batches(recipe)
        yield from _rewards(recipe)
        yield from _evaluation(recipe)
        yield from _generation(recipe)
    if isinstance(recipe, PPORecipe | GRPORecipe):
        yield from _distortions(recipe)
        yield from (Problem(keys, message) for keys, message in sharing_problems(recipe))
    if (
        isinstance(recipe, PPORecipe)
        and recipe.algorithm.kl_target is not None
        and recipe.algorithm.kl_beta == 0
    ):
        keys = ("algorithm.kl_target", "algorithm.kl_beta")
        yield Problem(keys, "adapts kl_beta by factors, so kl_beta must start above 0")
    if isinstance(recipe, SFTRecipe) and recipe.train.evaluate_every and recipe.held_out is None:
        yield Problem(
            ("train.evaluate_every", "held_out"), "needs held-out examples: set held_out.path"
        )


def _attention(key: str, model: ModelSettings, device: str) -> Iterator[Problem]:
    if model.attention != "flash_attention_2":
        return
    if device == "cpu":
        keys = (f"{key}.attention", "cluster.device")
        yield Problem(keys, "flash_attention_2 needs cluster.device cuda; on cpu use sdpa")
    elif model.dtype != "bfloat16":
        yield Problem(
            (f"{key}.attention", f"{key}.dtype"),
            f"flash_attention_2 needs dtype bfloat16, not {model.dtype}",
        )


def _offload(key: str, learner: LearnerSettings, device: str) -> Iterator[Problem]:
    for name in ("offload_optimizer", "offload_parameters"):
        if getattr(learner, name) and device == "cpu":
            yield Problem(
                (f"{key}.{name}", "cluster.device"),
                "needs cluster.device cuda: on cpu all is in CPU memory",
            )
    if learner.offload_optimizer and learner.zero_stage == 0:
        yield Problem(
            (f"{key}.offload_optimizer", f"{key}.zero_stage"), "needs zero_stage 1, 2 or 3, not 0"
        )
    if learner.offload_parameters and learner.zero_stage != 3:
        keys = (f"{key}.offload_parameters", f"{key}.zero_stage")
        yield Problem(keys, f"needs zero_stage 3, not {learner.zero_stage}")


def _batches(recipe: RLRecipe) -> Iterator[Problem]:
    step = recipe.step
    prompts = step.prompts_per_step
    group = step.group_size
    mini = step.mini_batch_size
    if isinstance(recipe, GRPORecipe) and group < 2:
        message = (
            f"1 leaves nothing to compare a response with; GRPO needs 2 or more ({USUAL_GROUP} "
            "is usual)"
        )
        yield Problem(("step.group_size",), message)
        group = USUAL_GROUP  # what follows is judged as if this were put right
    sequences = prompts * group
    if sequences % mini:
        around = (n for d in range(mini) for n in (mini - d, mini + d))
        nearest = sequences if mini > sequences else next(n for n in around if sequences % n == 0)
        yield Problem(
            ("step.mini_batch_size", "step.prompts_per_step", "step.group_size"),
            f"{mini} does not divide prompts_per_step {prompts} * group_size {group} = "
            f"{sequences}; nearest: {nearest}",
        )
    if (
        isinstance(recipe, PPORecipe)
        and recipe.algorithm.kl_target
        and recipe.algorithm.kl_horizon < sequences
    ):
        message = (
            f"{recipe.algorithm.kl_horizon} is less than one step of {sequences} sequences; "
            "take several steps"
        )
        yield Problem(("algorithm.kl_horizon",), message)


def _rewards(recipe: RLRecipe) -> Iterator[Problem]:
    if not recipe.rewards:
        yield Problem(("rewards",), "needs at least one source of scores")
    elif all(r.weight == 0 for r in recipe.rewards):
        keys = tuple(f"rewards.{i}.weight" for i in range(len(recipe.rewards)))
        yield Problem(keys, "every weight is 0, so every score would be 0")
    for name, count in Counter(r.name for r in recipe.rewards).items():
        if count > 1:
            keys = tuple(
                f"rewards.{i}.name" for i, r in enumerate(recipe.rewards) if r.name == name
            )
            yield Problem(
                keys[::-1], f"{name!r} names {count} sources; each needs a name of its own"
            )
    for i, reward in enumerate(recipe.rewards):
        yield from _source(f"rewards.{i}", reward)


def _source(key: str, reward: RewardSettings) -> Iterator[Problem]:
    """A source of scores has the key that is named like its kind, and not the other."""
    hint = {"model": f"set {key}.model.path", "function": "set it to module:function"}
    for name in hint:
        given = getattr(reward, name) is not None
        if given != (name == reward.kind):
            what = (
                f"is for kind {name}, not {reward.kind}"
                if given
                else f"missing: kind {name} needs it: {hint[name]}"
            )
            yield Problem((f"{key}.{name}", f"{key}.kind"), what)
    yield from _function_name(f"{key}.function", reward.function)


def _function_name(key: str, name: str | None) -> Iterator[Problem]:
    if name is not None and name.count(":") != 1:
        yield Problem((key,), f"must read module:function, not {name!r}")


def _evaluation(recipe: RLRecipe) -> Iterator[Problem]:
    settings = recipe.evaluation
    prompts = [k for k in ("prompts", "test_prompts") if getattr(settings, k) is not None]
    if settings.every_steps and settings.prompts is None:
        keys = ("evaluation.every_steps", "evaluation.prompts")
        yield Problem(keys, "needs held-out prompts: set evaluation.prompts.path")
    if prompts and settings.function is None:
        named = (f"evaluation.{prompts[0]}", "evaluation.function")
        yield Problem(
            named, "needs the true score of a response: set evaluation.function to module:function"
        )
    yield from _function_name("evaluation.function", settings.function)
    if settings.function is not None and not prompts:
        unset = ("evaluation.function", "evaluation.prompts", "evaluation.test_prompts")
        yield Problem(
            unset,
            "has nothing to judge: set evaluation.prompts.path or evaluation.test_prompts.path",
        )


def _generation(recipe: RLRecipe) -> Iterator[Problem]:
    settings = recipe.generation
    if settings.tensor_parallel > 1 and recipe.cluster.device == "cpu":
        keys = ("generation.tensor_parallel", "cluster.device")
        yield Problem(keys, "needs cluster.device cuda; on cpu use more engines or threads")
    if (
        settings.max_model_tokens is not None
        and settings.max_new_tokens >= settings.max_model_tokens
    ):
        keys = ("generation.max_model_tokens", "generation.max_new_tokens")
        total = settings.max_model_tokens
        yield Problem(
            keys,
            f"{total} leaves no room for a prompt beside max_new_tokens {settings.max_new_tokens}",
        )
    if isinstance(recipe, GRPORecipe) and settings.temperature <= LEAST_GRPO_TEMPERATURE:
        message = (
            f"{settings.temperature:g} makes groups of near copies; GRPO needs above "
            f"{LEAST_GRPO_TEMPERATURE}"
        )
        yield Problem(("generation.temperature",), message)


def _distortions(recipe: PPORecipe | GRPORecipe) -> Iterator[Problem]:
    """Sampling that is not the policy's own breaks the ratio new / old, unless its tokens are
    weighed.
    """
    correction = recipe.algorithm.rollout_correction
    engine = recipe.algorithm.old_logprobs == "engine"
    for name, value in recipe.generation.off_policy_sampling.items():
        if correction is None:
            way_out = "" if engine else ", or set algorithm.rollout_correction to weigh the tokens"
            message = (
                f"{value:g} samples from another distribution than the policy the ratio is "
                "computed with; "
            )
            keys = (f"generation.{name}", "algorithm.rollout_correction")
            yield Problem(keys, f"{message}leave it out{way_out}")
    if engine and correction is not None:
        keys = ("algorithm.old_logprobs", "algorithm.rollout_correction")
        yield Problem(
            keys,
            "engine leaves nothing to correct: use actor, or remove algorithm.rollout_correction",
        )


def _learners(recipe: Recipe) -> Iterator[tuple[str, LearnerSettings]]:
    for key in ("learner", "actor", "critic"):
        if hasattr(recipe, key):
            yield key, getattr(recipe, key)


def models_of(recipe: Recipe) -> Iterator[tuple[str, ModelSettings]]:
    """Every model of the recipe with its key."""
    for key, learner in _learners(recipe):
        yield f"{key}.model", learner.model
    if isinstance(recipe, RLRecipe):
        if recipe.reference.model is not None:
            yield "reference.model", recipe.reference.model
        for i, reward in enumerate(recipe.rewards):
            if reward.model is not None:
                yield f"rewards.{i}.model", reward.model


def lacking_gpus(recipe: Recipe) -> str | None:
    """Why the recipe's nodes have too few GPUs for its processes, and what would be enough; None
    when they have.
    """
    cluster = recipe.cluster
    bundles = layout(recipe.cluster, demands(recipe)).bundles
    enough = nodes_needed(bundles, cluster.gpus_per_node)
    sizes = [int(bundle.get("GPU", 0)) for bundle in bundles]
    if enough is not None and enough <= cluster.nodes:
        return None
    one = f"{max(sizes)} of them must be on one node: raise cluster.gpus_per_node"
    has = f"the cluster has {cluster.nodes} x {cluster.gpus_per_node}"
    return f"{sum(sizes)} GPUs are needed, {has}: {f'ask for {enough} nodes' if enough else one}"
