"""The settings of processes, and the kinds of recipe composed of these and the learners' settings.

Pydantic only: imports in milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

from pydantic import Field, create_model, model_validator

from learners.algorithms.base import AlgorithmSettings, find_algorithm
from learners.errors import Problem, Rule, problems_of
from learners.settings import (
    Count,
    DeviceType,
    DiskPath,
    Few,
    Fraction,
    LearnerSettings,
    ModelSettings,
    PairData,
    PositiveInt,
    PromptData,
    RewardModelSettings,
    RMTrainSettings,
    Settings,
    SFTData,
    Sources,
    TrainSettings,
)


class ClusterSettings(Settings):
    device: DeviceType = Field("cpu", description="what the models run on")
    placement: Literal["separate", "colocated"] = Field(
        "separate",
        description="on GPUs: every process its own, or all roles share them (engines sleep "
        "meanwhile)",
    )
    swap: Literal["auto", "never", "kv_cache", "optimizer", "always"] = Field(
        "auto",
        description="what roles that share GPUs take off them for each other: nothing, the KV "
        "cache, Adam states and master weights too, or everything; auto: as little as plan's "
        "arithmetic allows",
    )
    nodes: Count = Field(
        1, description="machines, for plan and slurm; on CPU, above 1 spreads processes"
    )
    gpus_per_node: Few = Field(
        8, description="GPUs of a machine, for plan, slurm and runs without an address"
    )
    gpu_memory_gib: float = Field(
        80, gt=0, le=1e6, description="memory of one GPU, GiB, for plan and swap"
    )
    node_memory_gib: float | None = Field(
        None, gt=0, le=1e6, description="CPU memory of a machine, GiB; null: unknown"
    )
    address: str | None = Field(
        None, description="Ray cluster to join, such as auto; null starts one here"
    )
    cache: str | None = Field(
        None,
        description="folder for what vLLM, Triton and Inductor compile, on every machine; null: "
        "their own",
    )
    start_deadline_s: float = Field(
        600, gt=0, description="seconds for all processes to load and answer"
    )
    call_deadline_s: float = Field(
        1800, gt=0, description="seconds any single call to a worker may take"
    )

    @property
    def tier(self) -> str:
        """Tier by which roles that share GPUs leave them: `swap`, always if nobody has counted."""
        return "always" if self.swap == "auto" else self.swap


class GenerationSettings(Settings):
    engines: Count = Field(1, description="vLLM engines")
    tensor_parallel: Few = Field(1, description="devices per engine")
    threads: PositiveInt = Field(2, description="CPU threads of each engine")
    temperature: float = Field(
        1.0, gt=0, description="sampling temperature; divides Actor and Reference logits alike"
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="nucleus sampling; below 1 needs algorithm.rollout_correction"
    )
    top_k: int = Field(
        0,
        ge=0,
        description="choose from this many, 0: all; else needs algorithm.rollout_correction",
    )
    min_p: Fraction = Field(
        0.0, description="least share of the likeliest; needs algorithm.rollout_correction"
    )
    repetition_penalty: float = Field(
        1.0, gt=0, description="1: none; else needs algorithm.rollout_correction"
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="0: none; else needs algorithm.rollout_correction"
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="0: none; else needs algorithm.rollout_correction"
    )
    model_sampling: Literal["refuse", "ignore"] = Field(
        "refuse",
        description="a generation_config.json that asks for other sampling: refuse it, or "
        "ignore it",
    )
    max_new_tokens: PositiveInt = Field(256, description="longest response, tokens")
    max_model_tokens: PositiveInt | None = Field(
        None, description="longest prompt + response; null: what data allows"
    )
    max_concurrent: PositiveInt = Field(256, description="sequences one engine decodes at once")
    kv_cache_gib: float = Field(1.0, gt=0, le=1e6, description="KV cache of an engine on CPU, GiB")
    kv_cache_bytes: PositiveInt | None = Field(
        None,
        description="KV cache of an engine on each of its GPUs, bytes; null: what it can use where "
        "roles share them, else all that fits",
    )
    gpu_memory_fraction: Fraction = Field(
        0.85, description="share of a GPU one engine takes at most, weights included"
    )
    seeded: bool = Field(
        True, description="seed each request from run, step, prompt and sample: reproducible"
    )

    def on_policy(self) -> GenerationSettings:
        """Return the settings without truncation and penalties, which sample from the policy
        itself.
        """
        return self.model_copy(
            update={
                name: GenerationSettings.model_fields[name].default for name in OFF_POLICY_SAMPLING
            }
        )

    @property
    def off_policy_sampling(self) -> dict[str, float]:
        """Settings that take the sampling away from the policy, with their values."""
        return {
            name: getattr(self, name)
            for name in OFF_POLICY_SAMPLING
            if getattr(self, name) != getattr(self.on_policy(), name)
        }


OFF_POLICY_SAMPLING = (
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def asked_by_model(defaults: Mapping[str, Any], generation: GenerationSettings) -> str:
    """List the settings in a model's generation_config.json that would break the ratio, in words;
    empty when there are none.
    """
    off = {name: (None, getattr(generation.on_policy(), name)) for name in OFF_POLICY_SAMPLING} | {
        "top_k": (None, 0, -1)
    }
    return ", ".join(
        f"{name} {defaults[name]}"
        for name in OFF_POLICY_SAMPLING
        if defaults.get(name) not in off[name]
    )


def model_sampling_problems(
    path: str, defaults: Mapping[str, Any], generation: GenerationSettings
) -> list[Problem]:
    """Return why the generation_config.json of the Actor at `path` cannot be left unmentioned,
    unless the recipe ignores it.
    """
    asked = asked_by_model(defaults, generation)
    message = (
        f"{path}: generation_config.json asks for {asked}, which would break the ratio; "
        "set generation.model_sampling: ignore to sample from the plain policy"
    )
    refused = asked and generation.model_sampling == "refuse"
    keys = ("actor.model.path", "generation.model_sampling")
    return [Problem(keys, message)] if refused else []


def position_problems(
    key: str, positions: int | None, generation: GenerationSettings
) -> list[Problem]:
    """Return which lengths of a recipe are more than the `positions` of the model at `key` allow
    (None: any), as soon as those are known: with the model's files, or for a plan from the table of
    shapes.

    The engine has room for `max_model_tokens`, whatever the data; other models read what there is.
    """
    if positions is None:
        return []
    new = generation.max_new_tokens
    most = generation.max_model_tokens or 0
    actor = key == "actor.model"
    rules: list[Rule] = [
        (
            actor and most > positions,
            ("generation.max_model_tokens", "actor.model.path"),
            f"{most} is more than the model's {positions} positions",
        ),
        (
            actor and new >= positions,
            ("generation.max_new_tokens", "actor.model.path"),
            f"{new} leaves no room for a prompt in the model's {positions} positions",
        ),
        (
            not actor and new >= positions,
            (f"{key}.path", "generation.max_new_tokens"),
            f"its {positions} positions leave no room for a prompt beside "
            f"generation.max_new_tokens {new}",
        ),
    ]
    return list(problems_of(rules))


ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can make room for


class SyncSettings(Settings):
    """The sync of the Actor's weights, and the agreement of engines and Actor that it needs."""

    probe_tokens: int = Field(
        32, ge=2, description="length of the fixed probe that proves a weight sync"
    )
    max_logprob_diff: float | None = Field(
        None,
        gt=0,
        description="largest difference of engine and Actor log-probs, nats, on the probe of "
        "every sync and on sampled "
        "responses before step 1; null: 1e-4 in float32 (2e-2 on cuda), 1.0 in bfloat16",
    )
    mean_logprob_diff: float | None = Field(
        None,
        gt=0,
        description="the same on average; null: max_logprob_diff in float32 (at most 2e-3 on "
        "cuda), 0.1 in bfloat16",
    )
    agreement_prompts: PositiveInt = Field(
        8, description="prompts sampled for the comparison before step 1"
    )
    deadline_s: float = Field(600, gt=0, description="seconds one sync may take")
    lora: Literal["merged", "adapter"] = Field(
        "merged",
        description="what an Actor with LoRA sends: weights with the adapter merged in, or the "
        "adapter alone",
    )


class Differences(NamedTuple):
    """Bounds on the difference of engine and Actor log-probs, nats, where a recipe names none: the
    largest, the mean (which is no more than that), and the largest of a whole step.
    """

    most: float
    mean: float
    alarm: float


# docs/gpu.md says what sound runs have shown
DIFFERENCES = {
    "exact": Differences(1e-4, math.inf, 1e-3),  # float32 on CPUs
    "float32": Differences(2e-2, 2e-3, 2e-2),
    "bfloat16": Differences(1.0, 0.1, 1.0),
}


class RewardSettings(Settings):
    """One source of scores. The step's score is the weighted sum over all sources."""

    name: str = Field(description="name of the source in metrics")
    kind: Literal["model", "function"] = Field(description="a reward model, or a Python function")
    model: ModelSettings | None = Field(None, description="the reward model (kind: model)")
    function: str | None = Field(
        None, description="the function, as module:function (kind: function)"
    )
    weight: float = Field(1.0, description="factor of this source in the sum")
    workers: Count = Field(1, description="processes that score")
    threads: PositiveInt = Field(1, description="CPU threads of each process")
    micro_batch_tokens: PositiveInt = Field(
        8192, description="padded tokens in one forward (kind: model)"
    )


class ReferenceSettings(Settings):
    model: ModelSettings | None = Field(
        None, description="the frozen reference; null: the Actor's starting model"
    )
    share: bool | None = Field(
        None,
        description="the Actor without its adapter is the Reference; null: where the Actor has "
        "LoRA and model is null",
    )
    workers: Count = Field(1, description="processes that score")
    threads: PositiveInt = Field(1, description="CPU threads of each process")
    micro_batch_tokens: PositiveInt = Field(8192, description="padded tokens in one forward")


USUAL_GROUP = 8
MINI_BATCH = 128


class StepSettings(Settings):
    """The batch arithmetic of one step."""

    steps: PositiveInt = Field(100, description="steps of the run")
    prompts_per_step: PositiveInt = Field(128, description="prompts generated for in one step")
    group_size: PositiveInt = Field(
        1,
        description=f"responses per prompt; {USUAL_GROUP} by default where groups are compared",
    )
    mini_batch_size: PositiveInt = Field(
        MINI_BATCH,
        description="sequences per optimizer step; by default at most a whole step",
    )
    ppo_epochs: PositiveInt = Field(1, description="passes over the step's experience")

    @model_validator(mode="before")
    @classmethod
    def _small_step(cls, values: Any) -> Any:
        """Take a step with fewer sequences than the usual mini-batch as one mini-batch."""
        if not isinstance(values, dict) or "mini_batch_size" in values:
            return values
        names = ("prompts_per_step", "group_size")
        sizes = [values.get(name, cls.model_fields[name].default) for name in names]
        if not all(type(size) is int and size > 0 for size in sizes):
            return values  # which is said of them
        return {**values, "mini_batch_size": min(MINI_BATCH, math.prod(sizes))}


class GroupStepSettings(StepSettings):
    """The same where responses to one prompt are compared with each other."""

    group_size: PositiveInt = Field(USUAL_GROUP, description="responses per prompt")


class AlarmSettings(Settings):
    """Bounds of what is normal. Outside them a step raises an alarm; it goes on unless a value is
    not finite.
    """

    mismatch: float | None = Field(
        None,
        gt=0,
        description="largest engine-Actor log-prob difference of a step, nats; null: "
        "sync.max_logprob_diff, and without that 1e-3 in float32 on cpu, else its default",
    )
    mean_mismatch: float | None = Field(
        None, gt=0, description="the same on average; null: sync.mean_logprob_diff"
    )
    unscorable: Fraction = Field(0.1, description="largest share of responses without a score")
    clip_fraction: Fraction = Field(
        0.5, description="largest share of tokens held by the ratio clip"
    )
    least_entropy: float = Field(
        1e-3, ge=0, description="smallest estimated entropy per token, nats"
    )
    most_entropy: float = Field(9.0, gt=0, description="largest estimated entropy per token, nats")


class EvaluationSettings(Settings):
    prompts: Sources[PromptData] | None = Field(
        None, description="held-out prompts for the curve; null: no curve"
    )
    test_prompts: Sources[PromptData] | None = Field(
        None, description="prompts evaluated before and after the run only"
    )
    function: str | None = Field(
        None,
        description="true score of a response, as module:function; null: the sum of the rewards",
    )
    every_steps: int = Field(
        0, ge=0, description="steps between evaluations; 0: only before and after"
    )
    greedy: bool = Field(True, description="also evaluate greedy decoding beside sampling")


class RunSettings(Settings):
    folder: DiskPath = Field(description="the run folder; must not exist unless the run resumes")
    seed: int = Field(0, ge=0, description="every source of randomness derives from it")
    checkpoint_every_steps: int = Field(0, ge=0, description="steps between checkpoints; 0: none")
    max_skipped_steps: PositiveInt = Field(
        3, description="stop, with a checkpoint, at this many steps skipped for NaN"
    )
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints to keep")
    final_checkpoint: bool = Field(
        True, description="save a checkpoint at the end too, from which --resume goes on"
    )
    keep_best: str | None = Field(
        None,
        description="metric of the evaluations by which the best model is kept and becomes model/, "
        "such as evaluation/score or held_out/loss; null: off",
    )
    patience: PositiveInt | None = Field(
        None,
        description="stop after so many evaluations without a better run.keep_best; null: never",
    )
    samples_every_steps: int = Field(
        1, ge=0, description="steps between saved samples; 0: none, also of evaluations"
    )
    samples_per_step: PositiveInt = Field(
        8, description="rollouts saved each time, spread over the step's prompts"
    )
    tensorboard: bool = Field(True, description="write TensorBoard event files")
    wandb_project: str | None = Field(None, description="Weights & Biases project; null: off")
    progress: bool = Field(True, description="show progress bars")


class SupervisedRecipe(Settings):
    """The sections that SFT and reward-model training share."""

    run: RunSettings
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)
    learner: LearnerSettings
    train: TrainSettings = Field(default_factory=TrainSettings)

    @property
    def evaluates(self) -> bool:
        """True when the run is evaluated between its steps, not only at its end."""
        return self.train.evaluate_every != 0


class SFTRecipe(SupervisedRecipe):
    kind: Literal["sft"] = "sft"
    data: Sources[SFTData] = Field(description="examples to learn; a list of sections: a mixture")
    held_out: Sources[SFTData] | None = Field(
        None, description="examples to measure on; null: none"
    )


class RMRunSettings(RunSettings):
    """A reward model is best before it knows its pairs by heart."""

    keep_best: str | None = Field(
        "held_out/accuracy",
        description="metric of the evaluations by which the best model is kept and becomes model/; "
        "null: off",
    )


class RMRecipe(SupervisedRecipe):
    kind: Literal["rm"] = "rm"
    run: RMRunSettings
    train: RMTrainSettings = Field(default_factory=RMTrainSettings)
    data: Sources[PairData] = Field(description="pairs to learn; a list of sections: a mixture")
    held_out: Sources[PairData] = Field(description="pairs to measure on")
    reward_model: RewardModelSettings = Field(default_factory=RewardModelSettings)


class RLRecipe(Settings):
    """Learning from scores by any algorithm. `rl_recipe` makes the class with its settings."""

    kind: str = "rl"
    run: RunSettings
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)
    step: StepSettings = Field(default_factory=StepSettings)
    actor: LearnerSettings
    critic: LearnerSettings | None = None
    reference: ReferenceSettings = Field(default_factory=ReferenceSettings)
    rewards: tuple[RewardSettings, ...]
    prompts: Sources[PromptData] = Field(
        description="prompts to answer; a list of sections: a mixture"
    )
    generation: GenerationSettings = Field(default_factory=GenerationSettings)
    algorithm: AlgorithmSettings
    sync: SyncSettings = Field(default_factory=SyncSettings)
    alarms: AlarmSettings = Field(default_factory=AlarmSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)

    @property
    def evaluates(self) -> bool:
        """True when the run is evaluated between its steps, not only before and after."""
        return self.evaluation.every_steps > 0

    @property
    def sequences_per_step(self) -> int:
        return self.step.prompts_per_step * self.step.group_size

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of one step."""
        mini_batches = math.ceil(self.sequences_per_step / self.step.mini_batch_size)
        return self.step.ppo_epochs * mini_batches

    @property
    def updates(self) -> int:
        """Optimizer steps of the whole run."""
        return self.step.steps * self.updates_per_step

    @property
    def shares_reference(self) -> bool:
        """True when the Actor without its adapter is the Reference: no process of its own."""
        share = self.reference.share
        possible = self.actor.model.lora is not None and self.reference.model is None
        return self.algorithm.needs_reference and (possible if share is None else share)

    @property
    def max_logprob_diff(self) -> float:
        """Largest log-prob difference between engine and Actor, nats."""
        return self.sync.max_logprob_diff or self._usual.most

    @property
    def mean_logprob_diff(self) -> float:
        """The same on average: rounding moves single tokens of bfloat16 models far, so there the
        mean decides.
        """
        return self.sync.mean_logprob_diff or min(self._usual.mean, self.max_logprob_diff)

    @property
    def alarming_logprob_diff(self) -> float:
        """Largest difference of a whole step, nats, unless `alarms` says another: a step has many
        more tokens than the comparisons without which a run does not go on.
        """
        return self.sync.max_logprob_diff or self._usual.alarm

    @property
    def _usual(self) -> Differences:
        model = self.actor.model
        exact = model.dtype == "float32" and self.cluster.device == "cpu"
        return DIFFERENCES["exact" if exact else model.dtype]


Recipe = SFTRecipe | RMRecipe | RLRecipe


@cache
def rl_recipe(algorithm: str, kind: str = "rl") -> type[RLRecipe]:
    """Return the recipe class of an algorithm: its own settings, its defaults of a step, and a
    critic if it needs one.

    `kind` is the recipes' own `kind`. Raises UserError when there is no such algorithm.
    """
    settings = find_algorithm(algorithm).Settings
    step = GroupStepSettings if settings.compares_groups else StepSettings
    this_kind: Any = Literal.__getitem__(kind)
    return create_model(
        f"RLRecipe[{algorithm}]",
        __base__=RLRecipe,
        kind=(this_kind, kind),
        step=(step, Field(default_factory=step)),
        critic=(LearnerSettings, ...) if settings.needs_critic else (None, None),
        algorithm=(settings, Field(default_factory=lambda: settings(kind=algorithm))),
    )
