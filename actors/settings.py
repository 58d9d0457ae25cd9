"""What a recipe may say about processes, and the four kinds of recipe composed of both packages' settings.

Pydantic only: imports in milliseconds.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from learners.settings import (
    Device,
    Fraction,
    GRPOSettings,
    LearnerSettings,
    ModelSettings,
    PairData,
    PositiveInt,
    PPOSettings,
    PromptData,
    RewardModelSettings,
    Settings,
    SFTData,
    TrainSettings,
)


class ClusterSettings(Settings):
    device: Device = Field("cpu", description="what the models run on")
    address: str | None = Field(None, description="Ray cluster to join, such as auto; null starts one here")
    start_deadline_s: float = Field(600, gt=0, description="seconds for all processes to load and answer")
    call_deadline_s: float = Field(1800, gt=0, description="seconds any single call to a worker may take")


class GenerationSettings(Settings):
    engines: PositiveInt = Field(1, description="vLLM engines")
    tensor_parallel: PositiveInt = Field(1, description="devices per engine")
    threads: PositiveInt = Field(2, description="CPU threads of each engine")
    temperature: float = Field(1.0, gt=0, description="sampling temperature; divides Actor and Reference logits alike")
    max_new_tokens: PositiveInt = Field(256, description="longest response, tokens")
    max_model_tokens: PositiveInt | None = Field(None, description="longest prompt + response; null: what data allows")
    max_concurrent: PositiveInt = Field(256, description="sequences one engine decodes at once")
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache of an engine on CPU, GiB")
    gpu_memory_fraction: Fraction = Field(0.85, description="share of a GPU one engine takes, weights included")
    seeded: bool = Field(True, description="seed each request from run, step, prompt and sample: reproducible")


class SyncSettings(Settings):
    probe_tokens: int = Field(32, ge=2, description="length of the fixed probe that proves a weight sync")
    gate: float | None = Field(
        None, gt=0, description="largest probe log-prob difference; null: 1e-4 in float32, 0.1 in bfloat16"
    )
    deadline_s: float = Field(600, gt=0, description="seconds one sync may take")


class RewardSettings(Settings):
    """One source of scores. The step's score is the weighted sum over all sources."""

    name: str = Field(description="name of the source in metrics")
    kind: Literal["model", "function"] = Field(description="a reward model, or a Python function")
    model: ModelSettings | None = Field(None, description="the reward model (kind: model)")
    function: str | None = Field(None, description="the function, as module:function (kind: function)")
    weight: float = Field(1.0, description="factor of this source in the sum")
    workers: PositiveInt = Field(1, description="processes that score")
    threads: PositiveInt = Field(1, description="CPU threads of each process")
    micro_batch_tokens: PositiveInt = Field(8192, description="padded tokens in one forward (kind: model)")

    @model_validator(mode="after")
    def _kind_has_its_source(self) -> RewardSettings:
        if self.kind == "model" and (self.model is None or self.function is not None):
            raise ValueError("kind: model needs the key model (and no function)")
        if self.kind == "function" and (self.function is None or self.model is not None):
            raise ValueError("kind: function needs the key function, as module:function (and no model)")
        if self.function is not None and self.function.count(":") != 1:
            raise ValueError(f"function must read module:function, not {self.function!r}")
        return self


class ReferenceSettings(Settings):
    model: ModelSettings | None = Field(None, description="the frozen reference; null: the Actor's starting model")
    workers: PositiveInt = Field(1, description="processes that score")
    threads: PositiveInt = Field(1, description="CPU threads of each process")
    micro_batch_tokens: PositiveInt = Field(8192, description="padded tokens in one forward")


class StepSettings(Settings):
    """The batch arithmetic of one step."""

    steps: PositiveInt = Field(100, description="steps of the run")
    prompts_per_step: PositiveInt = Field(128, description="prompts generated for in one step")
    group_size: PositiveInt = Field(1, description="responses per prompt")
    mini_batch_size: PositiveInt = Field(128, description="sequences per optimizer step")
    ppo_epochs: PositiveInt = Field(1, description="passes over the step's experience")


class EvaluationSettings(Settings):
    prompts: PromptData | None = Field(None, description="held-out prompts for the curve; null: no curve")
    test_prompts: PromptData | None = Field(None, description="prompts evaluated before and after the run only")
    function: str | None = Field(None, description="true score of a response, as module:function")
    every_steps: int = Field(0, ge=0, description="steps between evaluations; 0: only before and after")
    greedy: bool = Field(True, description="also evaluate greedy decoding beside sampling")


class RunSettings(Settings):
    folder: str = Field(description="the run folder; must not exist unless the run resumes")
    seed: int = Field(0, ge=0, description="every source of randomness derives from it")
    checkpoint_every_steps: int = Field(0, ge=0, description="steps between checkpoints; 0: none")
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints to keep")
    samples_every_steps: int = Field(1, ge=0, description="steps between saved samples; 0: none")
    samples_per_step: PositiveInt = Field(8, description="rollouts saved each time")
    tensorboard: bool = Field(True, description="write TensorBoard event files")
    wandb_project: str | None = Field(None, description="Weights & Biases project; null: off")
    progress: bool = Field(True, description="show progress bars")


class SFTRecipe(Settings):
    kind: Literal["sft"] = "sft"
    run: RunSettings
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)
    learner: LearnerSettings
    data: SFTData
    held_out: SFTData | None = Field(None, description="examples to measure on; null: none")
    train: TrainSettings = Field(default_factory=TrainSettings)


class RMRecipe(Settings):
    kind: Literal["rm"] = "rm"
    run: RunSettings
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)
    learner: LearnerSettings
    data: PairData
    held_out: PairData
    reward_model: RewardModelSettings = Field(default_factory=RewardModelSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)


class RLRecipe(Settings):
    """What PPO and GRPO share."""

    run: RunSettings
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)
    step: StepSettings
    actor: LearnerSettings
    reference: ReferenceSettings = Field(default_factory=ReferenceSettings)
    rewards: tuple[RewardSettings, ...]
    prompts: PromptData
    generation: GenerationSettings = Field(default_factory=GenerationSettings)
    sync: SyncSettings = Field(default_factory=SyncSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)


class PPORecipe(RLRecipe):
    kind: Literal["ppo"] = "ppo"
    critic: LearnerSettings
    algorithm: PPOSettings = Field(default_factory=PPOSettings)


class GRPORecipe(RLRecipe):
    kind: Literal["grpo"] = "grpo"
    algorithm: GRPOSettings = Field(default_factory=GRPOSettings)
