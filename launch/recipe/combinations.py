"""What types cannot say about a recipe by itself: combinations that make no sense. Nothing but the
recipe is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from actors.cluster.layout import layout, nodes_needed, shares_gpus
from actors.roles import roles_of
from actors.settings import Recipe, RewardSettings, RLRecipe, SFTRecipe
from learners.errors import Problem
from learners.settings import LearnerSettings, ModelSettings

LEAST_GROUP_TEMPERATURE = 0.7
USUAL_GROUP = 8


def combination_problems(recipe: Recipe) -> Iterator[Problem]:
    """Keys that are fine one by one and impossible together."""
    for key, model in models_of(recipe).items():
        yield from _attention(key, model, recipe.cluster.device)
    for role in roles_of(recipe).values():
        if role.learner is not None:
            yield from _learner(role.section, role.learner, recipe.cluster.device)
    if isinstance(recipe, RLRecipe):
        yield from _batches(recipe)
        yield from recipe.algorithm.problems(recipe.sequences_per_step)
        yield from _rewards(recipe)
        yield from _evaluation(recipe)
        yield from _generation(recipe)
        yield from _off_policy_sampling(recipe)
        yield from sharing_problems(recipe)
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


def _learner(key: str, learner: LearnerSettings, device: str) -> Iterator[Problem]:
    if learner.model.dtype == "bfloat16" and learner.zero_stage == 0:
        message = (
            "bfloat16 needs zero_stage 1, 2 or 3, which keep float32 master weights; else "
            "small steps vanish"
        )
        yield Problem((f"{key}.zero_stage", f"{key}.model.dtype"), message)
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
    if recipe.algorithm.compares_groups and group < 2:
        message = (
            f"1 leaves nothing to compare a response with; {_name(recipe)} needs 2 or more "
            f"({USUAL_GROUP} "
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


def _name(recipe: RLRecipe) -> str:
    """Return the algorithm's name as texts write it."""
    kind = recipe.algorithm.kind
    return kind if ":" in kind else kind.upper()


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
    if recipe.algorithm.compares_groups and settings.temperature <= LEAST_GROUP_TEMPERATURE:
        message = (
            f"{settings.temperature:g} makes groups of near copies; {_name(recipe)} needs above "
            f"{LEAST_GROUP_TEMPERATURE}"
        )
        yield Problem(("generation.temperature",), message)


def _off_policy_sampling(recipe: RLRecipe) -> Iterator[Problem]:
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


def sharing_problems(recipe: RLRecipe) -> Iterator[Problem]:
    """What keeps a recipe's roles from sharing their GPUs."""
    if not shares_gpus(recipe.cluster):
        return
    roles = roles_of(recipe)
    engines = roles["engine"].processes * roles["engine"].gpus
    if engines > recipe.actor.ranks:  # weights pass inside the memory of a GPU
        keys = ("actor.ranks", "generation.engines", "generation.tensor_parallel")
        message = (
            f"colocated needs an Actor rank on each of the engines' {engines} GPUs, "
            f"not {recipe.actor.ranks}"
        )
        yield Problem(keys, message)
    for role in roles.values():
        key = role.section
        learner = role.learner
        if learner is None:
            continue
        if learner.zero_stage == 1 and learner.model.dtype == "bfloat16":
            message = (
                "DeepSpeed cannot take ZeRO 1 in bfloat16 off the GPUs; colocated needs 2 or 3"
            )
            keys = (f"{key}.zero_stage", f"{key}.model.dtype", "cluster.placement")
            yield Problem(keys, message)
        if learner.offload_parameters and not learner.offload_optimizer:
            message = (
                "colocated needs this too: beside offloaded parameters, optimizer states "
                "would stay "
                "on the GPUs"
            )
            keys = (f"{key}.offload_optimizer", f"{key}.offload_parameters", "cluster.placement")
            yield Problem(keys, message)


def models_of(recipe: Recipe) -> dict[str, ModelSettings]:
    """Return every model of the recipe by the key that names it."""
    return {r.model_key: r.model for r in roles_of(recipe).values() if r.model is not None}


def lacking_gpus(recipe: Recipe) -> str | None:
    """Why the recipe's nodes have too few GPUs for its processes, and what would be enough; None
    when they have.
    """
    cluster = recipe.cluster
    bundles = layout(recipe.cluster, roles_of(recipe)).bundles
    enough = nodes_needed(bundles, cluster.gpus_per_node)
    sizes = [int(bundle.get("GPU", 0)) for bundle in bundles]
    if enough is not None and enough <= cluster.nodes:
        return None
    one = f"{max(sizes)} of them must be on one node: raise cluster.gpus_per_node"
    has = f"the cluster has {cluster.nodes} x {cluster.gpus_per_node}"
    return f"{sum(sizes)} GPUs are needed, {has}: {f'ask for {enough} nodes' if enough else one}"
