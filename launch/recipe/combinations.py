"""Combinations of keys that make no sense, which types cannot say. Nothing but the recipe
is read.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from actors.cluster.layout import layout, nodes_needed, shares_gpus
from actors.roles import Role, roles_of
from actors.run.metrics import BY_NAME
from actors.settings import (
    USUAL_GROUP,
    Recipe,
    RewardSettings,
    RLRecipe,
    RMRecipe,
    SFTRecipe,
)
from launch.recipe.adapters import adapter_rules, adapter_uses
from learners.errors import Problem, Rule, problems_of
from learners.settings import (
    DataSettings,
    LearnerSettings,
    ModelSettings,
    PairData,
    PromptData,
    SFTData,
)

LEAST_GROUP_TEMPERATURE = 0.7
UNWRITABLE = "{name!r} has control characters; use letters, digits, _ and -"
# columns that are called like their keys unless the recipe names others
SAID = ("prompt", "response", "chosen", "rejected")
# what a reward function is given beside the answer columns
OWN_COLUMNS = (
    "prompts",
    "responses",
    "finish_reasons",
    "messages",
    "prompt_ids",
    "response_ids",
)


def combination_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what is wrong with keys that are fine one by one and impossible in combination."""
    for key, model in models_of(recipe).items():
        yield from problems_of(_attention(key, model, recipe.cluster.device))
    for role in roles_of(recipe).values():
        yield from problems_of(_output_layer(role))
    yield from problems_of(adapter_rules(recipe))
    for role in roles_of(recipe).values():
        if role.learner is not None:
            yield from problems_of(_learner(role.section, role.learner, recipe.cluster.device))
    if isinstance(recipe, RLRecipe):
        yield from recipe.algorithm.problems(recipe.sequences_per_step)
        for part in (_batches, _rewards, _columns, _evaluation, _generation, _off_policy_sampling):
            yield from problems_of(part(recipe))
        yield from problems_of(adapter_uses(recipe))
        yield from sharing_problems(recipe)
    if isinstance(recipe, SFTRecipe) and recipe.train.evaluate_every and recipe.held_out is None:
        keys = ("train.evaluate_every", "held_out")
        yield Problem(keys, "needs held-out examples: set held_out.path")
    if not isinstance(recipe, RLRecipe):
        yield from problems_of(_distinct_columns(recipe))
    for key, sources in mixtures_of(recipe).items():
        yield from problems_of(_mixture(key, sources))
    yield from problems_of(_best(recipe))


def _attention(key: str, model: ModelSettings, device: str) -> list[Rule]:
    flash = model.attention == "flash_attention_2"
    named = f"{key}.attention"
    return [
        (
            flash and device == "cpu",
            (named, "cluster.device"),
            "flash_attention_2 needs cluster.device cuda; on cpu use auto",
        ),
        (
            flash and device == "cuda" and model.dtype != "bfloat16",
            (named, f"{key}.dtype"),
            f"flash_attention_2 needs dtype bfloat16, not {model.dtype}",
        ),
    ]


def _output_layer(role: Role) -> list[Rule]:
    asked = role.model is not None and role.model.head_dtype is not None
    return [
        (
            asked and role.head != "lm",
            (f"{role.model_key}.head_dtype",),
            "is of language models; a reward model and a Critic have another head",
        )
    ]


def _learner(key: str, learner: LearnerSettings, device: str) -> list[Rule]:
    zero = f"{key}.zero_stage"
    stage = learner.zero_stage
    return [
        (
            learner.model.dtype == "bfloat16" and stage == 0,
            (zero, f"{key}.model.dtype"),
            "bfloat16 needs zero_stage 1, 2 or 3, which keep float32 master weights; else small "
            "steps vanish",
        ),
        *(
            (
                getattr(learner, name) and device == "cpu",
                (f"{key}.{name}", "cluster.device"),
                "needs cluster.device cuda: on cpu all is in CPU memory",
            )
            for name in ("offload_optimizer", "offload_parameters")
        ),
        (
            learner.offload_optimizer and stage == 0,
            (f"{key}.offload_optimizer", zero),
            "needs zero_stage 1, 2 or 3, not 0",
        ),
        (
            learner.offload_parameters and stage != 3,
            (f"{key}.offload_parameters", zero),
            f"needs zero_stage 3, not {stage}",
        ),
    ]


def _batches(recipe: RLRecipe) -> list[Rule]:
    step = recipe.step
    mini = step.mini_batch_size
    alone = recipe.algorithm.compares_groups and step.group_size < 2
    # what follows is checked as if a group of one were put right
    group = USUAL_GROUP if alone else step.group_size
    sequences = step.prompts_per_step * group
    around = (n for d in range(mini) for n in (mini - d, mini + d))
    nearest = sequences if mini > sequences else next(n for n in around if sequences % n == 0)
    return [
        (
            alone,
            ("step.group_size",),
            f"1 leaves nothing to compare a response with; {_name(recipe)} needs 2 or more "
            f"({USUAL_GROUP} is usual)",
        ),
        (
            nearest != mini,
            ("step.mini_batch_size", "step.prompts_per_step", "step.group_size"),
            f"{mini} does not divide prompts_per_step {step.prompts_per_step} * group_size "
            f"{group} = {sequences}; nearest: {nearest}",
        ),
    ]


def _name(recipe: RLRecipe) -> str:
    """Return the algorithm's name as texts write it."""
    kind = recipe.algorithm.kind
    return kind if ":" in kind else kind.upper()


def _rewards(recipe: RLRecipe) -> list[Rule]:
    sources = list(enumerate(recipe.rewards))
    weights = tuple(f"rewards.{i}.weight" for i, _ in sources)
    idle = sources and all(reward.weight == 0 for _, reward in sources)
    return [
        (not sources, ("rewards",), "needs at least one source of scores"),
        (idle, weights, "every weight is 0, so every score would be 0"),
        *(
            (
                count > 1,
                tuple(f"rewards.{i}.name" for i, r in reversed(sources) if r.name == name),
                f"{name!r} names {count} sources; each needs a name of its own",
            )
            for name, count in Counter(r.name for _, r in sources).items()
        ),
        *(rule for i, reward in sources for rule in _source(f"rewards.{i}", reward)),
    ]


def _name_rules(key: str, name: str) -> list[Rule]:
    """Require a name that makes a metric of its own, `score/{name}`, and fits on a line."""
    taken = [metric.removeprefix("score/") for metric in BY_NAME if metric.startswith("score/")]
    return [
        (not name.strip(), (key,), "is empty; its scores are logged as score/<name>"),
        (unwritable(name), (key,), UNWRITABLE.format(name=name)),
        (
            name in taken,
            (key,),
            f"{name!r} is taken: score/{name} is a metric of the whole step; choose another name",
        ),
    ]


def unwritable(name: str) -> bool:
    """Tell whether a name would break the line or the metric it stands in."""
    return any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)


def _columns(recipe: RLRecipe) -> Iterator[Rule]:
    """Require that a reward function is given every column, and each once."""
    for section, data in data_of(recipe):
        columns = data.answer_columns if isinstance(data, PromptData) else ()
        for i, name in enumerate(columns):
            key = (f"{section}.answer_columns.{i}",)
            own = f"{name!r} is what a function is given beside the columns; rename the data's"
            yield name in OWN_COLUMNS, key, own
            yield name in columns[:i], key, f"{name!r} is listed twice"


def _mixture(key: str, sources: Sequence[DataSettings]) -> Iterator[Rule]:
    """Require of several sources names of their own, and weights of all of them or of none."""
    named = [one.name or str(i) for i, one in enumerate(sources)]
    weighed = [f"{key}.{i}.weight" for i, one in enumerate(sources) if one.weight is not None]
    for i, name in enumerate(named):
        own = f"{key}.{i}.name"
        before = named[:i].index(name) if name in named[:i] else i
        taken = f"{name!r} is the name of {key}.{before} too; each source needs a name of its own"
        yield before != i, (own, f"{key}.{before}.name"), taken
        yield not name.strip(), (own,), "is empty; it stands in the names of metrics"
        yield unwritable(name), (own,), UNWRITABLE.format(name=name)
    missing = [i for i, one in enumerate(sources) if one.weight is None]
    if weighed and missing:
        key_missing = f"{key}.{missing[0]}.weight"
        message = "missing: give every source of the mixture a weight, or none of them"
        yield True, (key_missing, *weighed), message
    if weighed and key not in ("prompts", "data"):
        yield True, tuple(weighed), f"is for training data; of {key} every row is used"


def _source(key: str, reward: RewardSettings) -> list[Rule]:
    """Require of a source of scores the key that is named like its kind, and not the other."""
    hints = {"model": f"set {key}.model.path", "function": "set it to module:function"}
    rules = [*_name_rules(f"{key}.name", reward.name)]
    rules.append(_function_name(f"{key}.function", reward.function))
    for name, hint in hints.items():
        given = getattr(reward, name) is not None
        keys = (f"{key}.{name}", f"{key}.kind")
        wanted = name == reward.kind
        rules += [
            (given and not wanted, keys, f"is for kind {name}, not {reward.kind}"),
            (wanted and not given, keys, f"missing: kind {name} needs it: {hint}"),
        ]
    return rules


def _function_name(key: str, name: str | None) -> Rule:
    wrong = name is not None and name.count(":") != 1
    return wrong, (key,), f"must read module:function, not {name!r}"


def _distinct_columns(recipe: SFTRecipe | RMRecipe) -> Iterator[Rule]:
    """Require that prompts and answers do not come from the same column."""
    for section, data in data_of(recipe):
        users: dict[str, str] = {}
        columns = dict(data.columns)
        own = {name: name for name in SAID if columns.get(name, "") is None}
        for name, column in [*own.items(), *columns.items()]:
            if column is not None:
                key = f"{section}.columns.{name}"
                other = users.setdefault(column, key)
                yield other != key, (key, other), f"{column!r} is {other} too; they must differ"


def _evaluation(recipe: RLRecipe) -> list[Rule]:
    settings = recipe.evaluation
    function = "evaluation.function"
    prompts = [k for k in ("prompts", "test_prompts") if getattr(settings, k) is not None]
    return [
        (
            settings.every_steps and settings.prompts is None,
            ("evaluation.every_steps", "evaluation.prompts"),
            "needs held-out prompts: set evaluation.prompts.path",
        ),
        _function_name(function, settings.function),
        (
            settings.function is not None and not prompts,
            (function, "evaluation.prompts", "evaluation.test_prompts"),
            "has nothing to score: set evaluation.prompts.path or evaluation.test_prompts.path",
        ),
    ]


def _best(recipe: Recipe) -> list[Rule]:
    """Require evaluations by which a model can be the best, where one is to be kept."""
    every = "evaluation.every_steps" if isinstance(recipe, RLRecipe) else "train.evaluate_every"
    best = recipe.run.keep_best
    patience = recipe.run.patience
    asked = best is not None and best != type(recipe.run).model_fields["keep_best"].default
    there = _comparable(recipe)
    between = f"needs evaluations between the steps: set {every}"
    return [
        (
            best is not None and best not in there,
            ("run.keep_best",),
            f"{best!r} is no metric by which this recipe's evaluations tell the better model; "
            f"there are {', '.join(there)}",
        ),
        (asked and not recipe.evaluates, ("run.keep_best", every), between),
        (
            patience is not None and best is None,
            ("run.patience", "run.keep_best"),
            "needs a metric that must get better: set run.keep_best",
        ),
        (
            patience is not None and best is not None and not asked and not recipe.evaluates,
            ("run.patience", every),
            between,
        ),
    ]


def _comparable(recipe: Recipe) -> list[str]:
    """Return the metrics of the recipe's evaluations of which a better value is known."""
    if isinstance(recipe, SFTRecipe):
        return ["held_out/loss"]
    found = [name for name, metric in BY_NAME.items() if metric.better]
    if isinstance(recipe, RMRecipe):
        return [name for name in found if name.startswith("held_out/")]
    left_out = [
        *(["accuracy"] if recipe.evaluation.function is None else []),
        *([] if recipe.evaluation.greedy else ["greedy"]),
    ]
    return [
        name
        for name in found
        if name.startswith("evaluation/") and not any(word in name for word in left_out)
    ]


def _generation(recipe: RLRecipe) -> list[Rule]:
    settings = recipe.generation
    most = settings.max_model_tokens
    return [
        (
            settings.tensor_parallel > 1 and recipe.cluster.device == "cpu",
            ("generation.tensor_parallel", "cluster.device"),
            "needs cluster.device cuda; on cpu use more engines or threads",
        ),
        (
            most is not None and settings.max_new_tokens >= most,
            ("generation.max_model_tokens", "generation.max_new_tokens"),
            f"{most} leaves no room for a prompt beside max_new_tokens {settings.max_new_tokens}",
        ),
        (
            recipe.algorithm.compares_groups and settings.temperature <= LEAST_GROUP_TEMPERATURE,
            ("generation.temperature",),
            f"{settings.temperature:g} makes groups of near copies; {_name(recipe)} needs above "
            f"{LEAST_GROUP_TEMPERATURE}",
        ),
    ]


def _off_policy_sampling(recipe: RLRecipe) -> list[Rule]:
    """Require sampling from the policy itself, which the ratio new / old is computed with, or a
    weight for its tokens.
    """
    correction = recipe.algorithm.rollout_correction
    engine = recipe.algorithm.old_logprobs == "engine"
    way_out = "" if engine else ", or set algorithm.rollout_correction to weigh the tokens"
    return [
        *(
            (
                correction is None,
                (f"generation.{name}", "algorithm.rollout_correction"),
                f"{value:g} samples from another distribution than the policy the ratio is "
                f"computed with; leave it out{way_out}",
            )
            for name, value in recipe.generation.off_policy_sampling.items()
        ),
        (
            engine and correction is not None,
            ("algorithm.old_logprobs", "algorithm.rollout_correction"),
            "engine leaves nothing to correct: use actor, or remove algorithm.rollout_correction",
        ),
    ]


def sharing_problems(recipe: RLRecipe) -> Iterator[Problem]:
    """Yield what keeps a recipe's roles from sharing their GPUs, if they are to share them."""
    roles = roles_of(recipe)
    engines = roles["engine"].processes * roles["engine"].gpus
    rules: list[Rule] = [
        (
            engines > recipe.actor.ranks,  # weights pass inside the memory of a GPU
            ("actor.ranks", "generation.engines", "generation.tensor_parallel"),
            f"colocated needs an Actor rank on each of the engines' {engines} GPUs, not "
            f"{recipe.actor.ranks}",
        ),
    ]
    for key, learner in ((role.section, role.learner) for role in roles.values() if role.learner):
        rules += [
            (
                learner.zero_stage == 1 and learner.model.dtype == "bfloat16",
                (f"{key}.zero_stage", f"{key}.model.dtype", "cluster.placement"),
                "DeepSpeed cannot take ZeRO 1 in bfloat16 off the GPUs; colocated needs 2 or 3",
            ),
            (
                learner.offload_parameters and not learner.offload_optimizer,
                (f"{key}.offload_optimizer", f"{key}.offload_parameters", "cluster.placement"),
                "colocated needs this too: beside offloaded parameters, optimizer states would "
                "stay on the GPUs",
            ),
        ]
    return problems_of(rules if shares_gpus(recipe.cluster) else [])


def models_of(recipe: Recipe) -> dict[str, ModelSettings]:
    """Return every model of the recipe by the key that names it."""
    return {r.model_key: r.model for r in roles_of(recipe).values() if r.model is not None}


def data_of(recipe: Recipe) -> Iterator[tuple[str, PromptData | SFTData | PairData]]:
    """Yield every source of the recipe's data sets with its key: data or, in a mixture, data.0."""
    for key, data in _data_sets(recipe).items():
        if isinstance(data, tuple):
            yield from ((f"{key}.{i}", one) for i, one in enumerate(data))
        elif data is not None:
            yield key, data


def mixtures_of(recipe: Recipe) -> dict[str, tuple[DataSettings, ...]]:
    """Return the sources of every data set of several, by its key."""
    return {key: data for key, data in _data_sets(recipe).items() if isinstance(data, tuple)}


def _data_sets(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's data sets, each one source, several or none, by key."""
    written: dict[str, Any]
    if isinstance(recipe, RLRecipe):
        evaluation = recipe.evaluation
        written = {"prompts": recipe.prompts, "evaluation.prompts": evaluation.prompts}
        written["evaluation.test_prompts"] = evaluation.test_prompts
    else:
        written = {"data": recipe.data, "held_out": recipe.held_out}
    if isinstance(recipe, RMRecipe):
        written["reward_model.calibration"] = recipe.reward_model.calibration
    return written


def lacking_gpus(recipe: Recipe) -> str | None:
    """Return why the recipe's nodes have too few GPUs for its processes, and what would be enough;
    None when they have enough. Ray is asked for its GPUs, and its CPUs, by the placement.
    """
    cluster = recipe.cluster
    bundles = layout(cluster, roles_of(recipe)).bundles
    enough = nodes_needed(bundles, cluster.gpus_per_node)
    if enough is not None and enough <= cluster.nodes:
        return None
    sizes = [int(bundle.get("GPU", 0)) for bundle in bundles]
    one = f"{max(sizes)} of them must be on one node: raise cluster.gpus_per_node"
    has = f"the cluster has {cluster.nodes} x {cluster.gpus_per_node}"
    return f"{sum(sizes)} GPUs are needed, {has}: {f'ask for {enough} nodes' if enough else one}"
