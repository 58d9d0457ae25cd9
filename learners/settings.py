"""Recipe keys about models, optimisation and data. Pydantic only: imports in milliseconds."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
)

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=1, le=4096)]  # of processes or machines
Few = Annotated[int, Field(ge=1, le=128)]  # of GPUs in one machine
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Column = Annotated[str, Field(min_length=1)]
ADAPTER_FOLDER = "adapter"  # of an exported model
VARIABLE = re.compile(r"\$(?:(?P<bare>[A-Za-z_]\w*)|\{(?P<braced>[A-Za-z_]\w*)\})")


def on_disk(path: str) -> str:
    """Return a path with its `~` and its variables ($NAME, ${NAME}) replaced, as a shell would,
    unless it is there as it is written. Raises ValueError for a variable that is not set and a
    user who is not known.
    """
    if os.path.lexists(path):
        return path
    names = (found[1] or found[2] for found in VARIABLE.finditer(path))
    if unset := next((name for name in names if not os.environ.get(name)), None):
        raise ValueError(f"{path}: the variable {unset} is not set: set it, or write the path out")
    expanded = VARIABLE.sub(lambda found: os.environ[found[1] or found[2]], path)
    if not path.startswith("~"):
        return expanded
    home = os.path.expanduser(expanded)
    if home.startswith("~"):
        user = home.partition("/")[0]
        raise ValueError(f"{path}: there is no user {user.removeprefix('~')}: write the path out")
    return home


DiskPath = Annotated[str, Field(min_length=1), AfterValidator(on_disk)]


class Settings(BaseModel):
    """Base of every settings class: unknown keys are errors, values never change after
    validation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def to_yaml(self) -> str:
        """Return all values as YAML, defaults included: every key on a line of its own, with the
        whole of its value.
        """
        import yaml

        class Dumper(yaml.SafeDumper):
            pass

        def text(dumper: Any, value: str) -> Any:
            # in quotes if it has line breaks, or YAML 1.2 may see a number
            plain = value.isprintable() and not re.match(r"[-+.]*[0-9]", value)
            return dumper.represent_scalar(
                "tag:yaml.org,2002:str", value, style=None if plain else '"'
            )

        Dumper.add_representer(str, text)
        return yaml.dump(
            self.model_dump(mode="json"),
            Dumper=Dumper,
            sort_keys=False,
            allow_unicode=True,
            width=sys.maxsize,
        )


DeviceType = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Rank:
    """Process among the ranks of its role, and where they meet. Passed explicitly, never guessed
    from the environment.
    """

    index: int
    world_size: int
    address: str
    port: int
    device: DeviceType = "cpu"
    timeout_s: float = 1800.0


SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def full_dtype(name: Any) -> Any:
    """Return the name that torch has for a dtype."""
    return SHORT_DTYPES.get(name, name) if isinstance(name, str) else name


DType = Annotated[Literal["float32", "bfloat16"], BeforeValidator(full_dtype)]


class LoraSettings(Settings):
    """An adapter of low rank that is trained in place of the weights, which stay as they are."""

    rank: PositiveInt = Field(description="rank of the adapter's matrices")
    alpha: float | None = Field(
        None, gt=0, description="the adapter counts alpha / rank; null: twice the rank"
    )
    targets: Literal["all-linear"] | Annotated[tuple[Column, ...], Field(min_length=1)] = Field(
        "all-linear",
        description="names of the linear layers that get one, such as [q_proj, v_proj]; "
        "all-linear: every one but the output layer",
    )
    dropout: Decay = Field(0.0, description="dropout before the adapter, in training")

    @property
    def scaled_alpha(self) -> float:
        """Alpha as it is used."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


class ModelSettings(Settings):
    path: DiskPath = Field(description="folder of a Hugging Face model, or a hub name")
    like: DiskPath | None = Field(
        None,
        description="folder or hub name of a model of the same shape, for plan while there is "
        "none at path yet",
    )
    dtype: DType = Field("float32", description="dtype of the weights (fp32, bf16)")
    head_dtype: Annotated[Literal["float32"] | None, BeforeValidator(full_dtype)] = Field(
        None,
        description="dtype in which the output layer of a language model computes, in the engine "
        "too (fp32); null: the model's",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="attention kernel; auto: sdpa, or eager where sdpa would leave out what the "
        "model was trained with",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in backward to save memory"
    )
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the model (auto_map)"
    )
    template: DiskPath | None = Field(
        None,
        description="chat template: a Jinja file, or a name where the tokenizer has several; null: "
        "the tokenizer's own",
    )
    lora: LoraSettings | None = Field(
        None, description="train an adapter in place of the weights; null: all weights"
    )


S = TypeVar("S", bound=Settings)


def located(settings: S) -> S:
    """Return the settings with local model folders and template files as absolute paths, for
    processes that run in another folder. Names, of the hub or of a tokenizer's templates, stay.
    """
    changes: dict[str, Any] = {
        name: located(value) for name, value in settings if isinstance(value, Settings)
    }
    if isinstance(settings, ModelSettings) and Path(settings.path).is_dir():
        changes["path"] = str(Path(settings.path).absolute())
    if (
        isinstance(settings, ModelSettings)
        and settings.template
        and os.path.isfile(settings.template)
    ):
        changes["template"] = os.path.abspath(settings.template)
    return settings.model_copy(update=changes)


class OptimizerSettings(Settings):
    kind: Literal["adamw", "sgd"] = Field("adamw", description="torch optimizer")
    learning_rate: float = Field(1e-6, ge=0, description="peak learning rate")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW moment decays")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: float = Field(
        1.0, ge=0, description="clip the global gradient norm here; 0 turns clipping off"
    )
    warmup_steps: int = Field(0, ge=0, description="optimizer steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="after the warm-up"
    )
    final_fraction: Fraction = Field(
        0.1, description="share of the peak learning rate a decay ends at"
    )


class LearnerSettings(Settings):
    """One trained role: its model, its ranks, how its memory is split and how it steps."""

    model: ModelSettings
    ranks: Count = Field(1, description="data-parallel processes")
    threads: PositiveInt = Field(1, description="CPU threads of each rank")
    zero_stage: int = Field(2, ge=0, le=3, description="DeepSpeed ZeRO stage")
    offload_optimizer: bool = Field(False, description="keep optimizer states in CPU memory")
    offload_parameters: bool = Field(False, description="keep parameters in CPU memory (ZeRO-3)")
    micro_batch_tokens: PositiveInt = Field(
        8192, description="padded tokens in one forward/backward of one rank"
    )
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)


class TrainSettings(Settings):
    """A supervised phase (SFT or reward model): batches and length."""

    batch_size: PositiveInt = Field(
        64, description="examples (SFT) or pairs (reward model) per optimizer step"
    )
    epochs: float = Field(1.0, gt=0, description="passes over the data; ignored when steps is set")
    steps: PositiveInt | None = Field(None, description="optimizer steps, instead of epochs")
    evaluate_every: int = Field(
        0, ge=0, description="steps between evaluations on held-out data; 0: only at the end"
    )


class RMTrainSettings(TrainSettings):
    """The same of a reward model, whose best is kept: it is evaluated without being told."""

    evaluate_every: int | None = Field(  # type: ignore[assignment]
        None,
        ge=0,
        description="steps between evaluations on held-out data; null: ten times in the run, 0: "
        "only at the end",
    )


Scalar = bool | int | float | str


class DataSettings(Settings):
    """Source of rows, and how they become conversations."""

    path: DiskPath = Field(description="file, folder, or hub name of the data set")
    split: str = Field("train", description="split to read, such as train or train[:1000]")
    configuration: str | None = Field(
        None, description="configuration of a data set of the hub, or of a folder that has several"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub data set")
    field: str | None = Field(
        None, description="key of a JSON file under which its list of rows lies"
    )
    where: dict[str, Scalar | list[Scalar] | None] = Field(
        default_factory=dict,
        description="use only rows whose columns have these values (a list: one of them)",
    )
    shuffle: int | None = Field(
        None, ge=0, description="seed of a random order of the rows, which limit then cuts"
    )
    limit: PositiveInt | None = Field(None, description="use only the first rows")
    name: str | None = Field(
        None, description="name of the source in metrics; null: its place in the list"
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="share among several sources, relative to the others'; null: by rows",
    )
    apply_template: bool = Field(
        False, description="render text prompts with the chat template, as a user's turn"
    )
    system_prompt: str | None = Field(
        None, description="system message of conversations that have none"
    )
    template_arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of the chat template, such as enable_thinking: false",
    )
    tools: DiskPath | None = Field(
        None, description="JSON file with the list of tools of rows that name none"
    )
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field(
        default_factory=dict, description="the data's names of roles, with what they mean"
    )


class PromptColumns(Settings):
    prompt: Column | None = Field(
        None, description="column with text or messages; null: prompt, or messages"
    )
    system: Column | None = Field(None, description="column with a system message; null: system")
    tools: str | None = Field(None, description="column with tools; null: tools; '': none")


class PromptData(DataSettings):
    columns: PromptColumns = Field(default_factory=PromptColumns)
    answer_columns: tuple[str, ...] = Field(
        (), description="columns handed to reward functions under their own names"
    )
    trailing_assistant: Literal["refuse", "strip", "continue"] = Field(
        "refuse", description="what to do with prompts whose last turn is the assistant's"
    )
    max_prompt_tokens: PositiveInt = Field(
        1024, description="longer prompts are dropped or refused, see long_prompts"
    )
    long_prompts: Literal["drop", "refuse"] = Field(
        "drop", description="what to do with prompts that are too long"
    )
    max_dropped: Fraction = Field(
        0.05, description="largest share of prompts dropped as too long; more are refused"
    )


class SFTColumns(Settings):
    messages: Column | None = Field(
        None, description="column with conversations; null: messages, or conversations"
    )
    prompt: Column | None = Field(None, description="column with text or messages; null: prompt")
    response: Column | None = Field(
        None, description="column with the answer to learn; null: response, or completion"
    )
    system: Column | None = Field(None, description="column with a system message; null: system")
    tools: str | None = Field(None, description="column with tools; null: tools; '': none")


class SFTData(DataSettings):
    columns: SFTColumns = Field(default_factory=SFTColumns)
    train_on: Literal["all", "last"] = Field(
        "all", description="assistant turns of a conversation to learn: all, or the last"
    )
    rewritten_turns: Literal["split", "refuse"] = Field(
        "split",
        description="where the template changes earlier turns: one example per turn, or refuse",
    )
    max_tokens: PositiveInt = Field(
        2048, description="longest example; longer ones are dropped and counted"
    )


class PairColumns(Settings):
    prompt: Column | None = Field(
        None, description="column with text or messages; null: prompt, if there is one"
    )
    chosen: Column | None = Field(None, description="column with the better answer; null: chosen")
    rejected: Column | None = Field(
        None, description="column with the worse answer; null: rejected"
    )
    margin: Column | None = Field(
        None, description="column with the margin the chosen score must win by"
    )
    system: Column | None = Field(None, description="column with a system message; null: system")
    tools: str | None = Field(None, description="column with tools; null: tools; '': none")


class PairData(DataSettings):
    columns: PairColumns = Field(default_factory=PairColumns)
    max_tokens: PositiveInt = Field(
        2048, description="longest prompt + answer; longer pairs are dropped and counted"
    )


def _shape(value: Any) -> str:
    return SEVERAL if isinstance(value, list | tuple) else ONE


ONE = "<one source>"
SEVERAL = "<several sources>"
D = TypeVar("D", bound=DataSettings)
Sources = Annotated[
    Annotated[D, Tag(ONE)] | Annotated[tuple[D, ...], Field(min_length=1), Tag(SEVERAL)],
    Discriminator(_shape),
]
"""One data set, or a mixture of several. The tags stand in pydantic's locations of errors."""


def sources_of(data: D | tuple[D, ...]) -> tuple[D, ...]:
    """Return the sources of a data set, one or several."""
    return data if isinstance(data, tuple) else (data,)


class RewardModelSettings(Settings):
    """Settings particular to training a reward model."""

    padding_side: Literal["right", "left"] = Field(
        "right", description="side of the padding in training and scoring"
    )
    centring: float = Field(
        0.0, ge=0, description="weight of mean((chosen + rejected)^2), keeping scores around 0"
    )
    calibration: Sources[SFTData] | None = Field(
        None,
        description="prompt/response rows whose scores set the mean and std of calibrated "
        "scores; null: none",
    )
