"""What leaves a run, by reports of people whose runs trained to the end and left nothing, or
something other than it said.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from actors import supervised
from actors.cluster.groups import WorkerError
from actors.export import Export
from actors.loop import Loop
from actors.run.alarms import AlarmLog
from actors.run.folder import RunFolder, complete_or_absent, finished_checkpoints
from actors.run.outcome import accounted_for
from actors.run.resume import Resume
from actors.run.room import bytes_needed, no_room
from actors.run.stop import Left
from actors.settings import RunSettings
from launch import cli
from launch.demo.demo import RECIPES
from launch.recipe.read import load_recipe
from launch.tasks import unique_digits as task
from learners.checkpoints import (
    Calibration,
    load_causal_lm,
    load_config,
    load_reward_model,
    read_calibration,
    write_calibration,
)
from learners.errors import UserError
from learners.export import save_config, save_weights
from learners.generation import ends_of_generation, generation_config
from learners.settings import ModelSettings
from tests.e2e.conftest import make_encoder
from tests.learners.test_checkpoints import OWN

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
QWEN = {**SMALL, "num_key_value_heads": 1, "head_dim": 16}
TOKENIZER = SimpleNamespace(eos_token_id=5, pad_token_id=0)


def gemma3() -> Any:
    text = {**QWEN, "attention_dropout": 0.25, "sliding_window": 8}
    image = {**SMALL, "image_size": 28, "patch_size": 14, "attention_dropout": 0.125}
    del image["vocab_size"]
    tokens = {"image_token_index": 39, "boi_token_index": 37, "eoi_token_index": 38}
    config = Gemma3Config(text_config=text, vision_config=image, mm_tokens_per_image=4, **tokens)
    return Gemma3ForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**QWEN, attention_dropout=0.5, eos_token_id=1)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, eos_token_id=1, bos_token_id=1)
    ),
    "gemma3": gemma3,
    "bert": lambda: BertModel(BertConfig(**SMALL)),
}


def made(name: str, folder: Path) -> ModelSettings:
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(folder)
    return ModelSettings(path=str(folder))


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def dropout_in(config: dict[str, Any]) -> dict[str, Any]:
    """Every value about dropout of a config.json, also of those inside it."""
    found = {name: value for name, value in config.items() if "drop" in str(name)}
    for name, inner in config.items():
        if isinstance(inner, dict):
            found |= {f"{name}.{key}": value for key, value in dropout_in(inner).items()}
    return found


# --- the config as it came ------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_exported_with_the_dropout_it_came_with(name: str, tmp_path: Path) -> None:
    """hiyouga/LlamaFactory#10779: what switches dropout off for training must leave the config
    alone, or exported checkpoints lose what the base model says. Values inside nested configs
    (gemma3), and those that were absent (classifier_dropout), too.
    """
    settings = made(name, tmp_path / "base")
    model = load_reward_model(settings, 0) if name == "bert" else load_causal_lm(settings)
    save_config(model, tmp_path / "export")
    came = dropout_in(config_of(tmp_path / "base"))
    assert came and dropout_in(config_of(tmp_path / "export")) == came
    running = dropout_in(model.config.to_dict())
    assert not any(running.values()) and "classifier_dropout" in running


def test_a_reward_model_trained_on_forgets_the_calibration_of_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenRLHF/OpenRLHF#693 asks where mean and std of a reward model come from: from the weights
    they were measured with, and from no others.
    """
    from learners import reward_model

    settings = made("qwen3", tmp_path / "base")
    model = load_reward_model(settings, 0)
    write_calibration(model.config, Calibration(3.0, 2.0))
    model.save_pretrained(tmp_path / "calibrated")

    def load_alone(self: Any, load: Callable[[], Any], *_: Any) -> None:
        self.model = load()

    monkeypatch.setattr(reward_model.Learner, "__init__", load_alone)
    again = ModelSettings(path=str(tmp_path / "calibrated"))
    learner: Any = reward_model.RewardModelLearner(
        SimpleNamespace(model=again),
        None,
        0,
        0,
        1,
        None,  # type: ignore[arg-type]
    )
    save_config(learner.model, tmp_path / "export")
    assert "score_std" not in config_of(tmp_path / "export")
    assert read_calibration(learner.model.config) == (0.0, 1.0)


# --- generation_config.json -----------------------------------------------------------------------

SAMPLING = {"temperature": 0.6, "top_p": 0.95, "eos_token_id": [1, 7]}
BEAMS = {"num_beams": 1, "length_penalty": 2.0, "early_stopping": True, "eos_token_id": 1}
PENALTY = {"repetition_penalty": 1.05, "do_sample": False, "top_k": 20, "made_up": {"a": 1}}


@pytest.mark.parametrize(
    ("file", "ends"),
    [(SAMPLING, [1, 7, 5]), (BEAMS, [1, 5]), (PENALTY, 5), ({"eos_token_id": [5, 1]}, [5, 1])],
    ids=["temperature", "beams", "no_eos", "named_already"],
)
def test_a_generation_config_that_transformers_refuses_to_save_is_exported(
    tmp_path: Path, file: dict[str, Any], ends: Any
) -> None:
    """OpenRLHF/OpenRLHF#212, huggingface/transformers#29988, QwenLM/Qwen3-ASR#210: a shipped
    generation_config.json with a temperature and no do_sample fails in save_pretrained after the
    last step.
    """
    settings = made("qwen3", tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(file))
    export = tmp_path / "export"
    model = load_causal_lm(settings)
    save_weights(model, dict(model.state_dict()), export)
    assert generation_config(settings, TOKENIZER) == file | {"eos_token_id": ends}
    again = load_file(export / "model.safetensors")
    assert again and all(torch.equal(model.state_dict()[name], t) for name, t in again.items())


def test_the_end_of_a_templates_turns_ends_answers_of_the_export_too(tmp_path: Path) -> None:
    """Gemma, Phi-3: turns end with another token than the tokenizer's EOS, and were trained so."""
    settings = made("qwen3", tmp_path / "base")
    file = tmp_path / "base" / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": 1}))
    assert ends_of_generation(settings) == [1]
    stops = [9, 5, 1]
    assert generation_config(settings, TOKENIZER, stops)["eos_token_id"] == [1, 5, 9]
    file.unlink()
    assert ends_of_generation(settings) == [1]  # the config.json's
    written = generation_config(settings, TOKENIZER, stops)
    assert written["eos_token_id"] == [1, 5, 9] and written["pad_token_id"] == 0


@pytest.mark.parametrize("with_file", [True, False])
def test_generate_on_the_export_stops_where_answers_were_taught_to_end(
    tmp_path: Path, with_file: bool
) -> None:
    """modelscope/ms-swift#3113, hiyouga/LlamaFactory#7454, huggingface/open-r1#663: SFT teaches the
    tokenizer's EOS, the generation config names another one, and answers never end.
    """
    settings = made("qwen3", tmp_path / "base")
    if not with_file:
        (tmp_path / "base" / "generation_config.json").unlink()
    plain = AutoModelForCausalLM.from_pretrained(settings.path)
    prompt = torch.tensor([[3, 4, 8]])

    def answer(model: Any) -> list[int]:
        out = model.generate(prompt, do_sample=False, max_new_tokens=12)
        ids: list[int] = out[0, prompt.shape[1] :].tolist()
        return ids

    written = answer(plain)
    taught = next(token for token in written[1:] if token != written[0])
    end = written.index(taught) + 1
    assert len(written) > end, "this model would end by itself"

    tokenizer = SimpleNamespace(eos_token_id=taught, pad_token_id=0)
    generation = generation_config(settings, tokenizer)
    assert generation["eos_token_id"] == [1, taught]
    assert with_file or generation["pad_token_id"] == 0
    export = tmp_path / "export"
    model = load_causal_lm(settings)
    save_weights(model, dict(model.state_dict()), export)
    save_config(model, export)
    (export / "generation_config.json").write_text(json.dumps(generation))
    assert answer(AutoModelForCausalLM.from_pretrained(export)) == written[:end]


# --- tried before the first step ------------------------------------------------------------------


class Here:
    """Stands for a group of processes: an object in this one."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker

    def call(self, method: str, *args: Any, phase: str, deadline_s: float) -> list[Any]:
        return [getattr(self.worker, method)(*args)]

    call_without_swap = call

    def names(self) -> list[str]:
        return ["sft[0]"]


def export_of(folder: Path, tokenizer: Any) -> Export:
    settings = made("qwen3", folder)
    recipe = load_recipe(
        RECIPES / "demo_sft.yaml", [f"learner.model.path={folder}", f"run.folder={folder}-run"]
    )
    model = load_causal_lm(settings)

    def export(to: str) -> None:
        save_weights(model, dict(model.state_dict()), Path(to))
        save_config(model, Path(to))

    worker = SimpleNamespace(export_config=lambda to: save_config(model, Path(to)), export=export)
    groups: Any = {"sft": Here(worker)}
    return Export(recipe, groups, tokenizer)


def test_a_tokenizer_that_cannot_be_saved_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """huggingface/transformers#33304, huggingface/tokenizers#613: a tokenizer that loads and cannot
    be saved ends a training at its first or last save.
    """
    task.make_tokenizer(tmp_path / "tokens")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokens")
    tokenizer.init_kwargs["unserializable"] = torch.float32
    export = export_of(tmp_path / "base", tokenizer)
    with pytest.raises(UserError, match=r"learner\.model: .* could not be exported: ") as error:
        export.rehearse(tmp_path)
    assert "\n" not in str(error.value)


def test_what_the_end_will_write_lies_in_the_run_folder_before(tmp_path: Path) -> None:
    """No public report known to us of a dry export; OpenRLHF/OpenRLHF#212 is what it prevents."""
    task.make_tokenizer(tmp_path / "tokens")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokens")
    export = export_of(tmp_path / "base", tokenizer)
    export.rehearse(tmp_path)
    export.write_model(tmp_path / "model")

    def files(folder: Path) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".safetensors"}

    rehearsed = files(tmp_path / "model_files")
    assert rehearsed == files(tmp_path / "model")
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= set(rehearsed)
    # again, where there is one, as after a resume; and where the folder has vanished meanwhile
    export.write_model(tmp_path / "model")
    shutil.rmtree(tmp_path / "model_files")
    export.write_model(tmp_path / "vanished" / "model")
    assert rehearsed == files(tmp_path / "model") == files(tmp_path / "vanished" / "model")
    assert not list(tmp_path.glob("model.*"))


def supervised_data(tmp_path: Path, rows: list[dict[str, str]], ids: int = 64) -> Any:
    """The data of a reward model's recipe with these rows for its calibration, read and checked;
    the model knows `ids` of its tokenizer's, unless there is one at `base` already.
    """
    base = tmp_path / "base"
    if not base.exists():
        task.make_tokenizer(base)
        config = Qwen3Config(**{**QWEN, "vocab_size": ids}, max_position_embeddings=24)
        config.save_pretrained(base)
    pair = {"prompt": "1=", "chosen": "1", "rejected": "2"}
    task.write_rows(tmp_path / "pairs.jsonl", [pair])
    task.write_rows(tmp_path / "calibration.jsonl", rows)
    paths = [f"{key}.path={tmp_path / 'pairs.jsonl'}" for key in ("data", "held_out")]
    paths.append(f"reward_model.calibration.path={tmp_path / 'calibration.jsonl'}")
    where = [f"learner.model.path={base}", f"run.folder={tmp_path / 'run'}"]
    recipe: Any = load_recipe(RECIPES / "demo_rm.yaml", [*where, *paths])
    return supervised.SupervisedData.load(recipe)


ROW = {"prompt": "12=", "response": "12"}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([ROW], "1 row.* of one and the same text"),
        ([ROW, ROW, ROW], "3 row.* of one and the same text"),
        ([ROW, {**ROW, "response": "1234567890" * 3}], "has 24 positions"),
    ],
    ids=["one_row", "equal_rows", "too_long"],
)
def test_rows_that_cannot_calibrate_are_refused_with_the_data(
    tmp_path: Path, rows: list[dict[str, str]], told: str
) -> None:
    """OpenRLHF/OpenRLHF#693: mean and std are to be filled in by hand. Here rows give them, and it
    was found after the last step that they could not (no public report of that known to us).
    """
    with pytest.raises(UserError, match=rf"^reward_model\.calibration: .*{told}"):
        supervised_data(tmp_path, rows)


def test_rows_with_ids_that_the_model_lacks_are_refused_with_the_data(tmp_path: Path) -> None:
    """No public report known to us: the tokenizer knows more than the model has embeddings for, and
    calibration alone uses it.
    """
    beyond = [ROW, {**ROW, "response": "1+2"}]
    assert len(supervised_data(tmp_path / "sound", beyond).calibration) == 2
    with pytest.raises(UserError, match=r"^reward_model\.calibration: .* knows 42 ids"):
        supervised_data(tmp_path / "small", beyond, ids=42)


def test_an_encoder_is_calibrated_on_texts_that_end_as_its_own_do(tmp_path: Path) -> None:
    """No public report known to us: calibration rows were given an EOS, which a BERT has not."""
    make_encoder(tmp_path / "base")
    data = supervised_data(tmp_path, [ROW, {**ROW, "response": "21"}])
    ends = {row.response_ids[-1] for row in data.calibration}
    assert ends == {data.tokenizer.sep_token_id} == {data.rows[0].chosen.ids[-1]}


# --- room on the disk -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "keep", "steps", "there", "needed"),
    [
        (0, 2, range(1, 11), 0, 10),  # no checkpoint is sure to be written
        (20, 2, range(1, 11), 0, 10),
        (5, 1, range(1, 6), 0, 50),  # one checkpoint, then the model beside it
        (5, 2, range(1, 11), 0, 90),
        (1, 2, range(1, 11), 0, 120),  # the third is complete before the first goes
        (1, 2, range(6, 11), 2, 40),  # resumed: two are there and one more comes for a while
        (1, 2, range(6, 11), 4, 40),
        (1, 3, range(6, 7), 1, 50),
        (1, 2, range(11, 11), 2, 10),  # nothing is left to do but the export
    ],
)
def test_the_room_that_a_run_surely_needs(
    every: int, keep: int, steps: range, there: int, needed: int
) -> None:
    """mlfoundations/open_lm#154: an error early when the disk lacks room for the checkpoints."""
    settings = RunSettings(folder="run", checkpoint_every_steps=every, keep_checkpoints=keep)
    assert bytes_needed(10, 40, settings, steps, there) == needed


def test_a_disk_without_room_is_told_and_one_that_cannot_be_known_is_not(tmp_path: Path) -> None:
    """hiyouga/LlamaFactory#5155, bghira/SimpleTuner#2353: StorageFull at the last save."""
    assert not no_room(tmp_path / "new" / "run", 1)
    told = no_room(tmp_path / "new", 2**60)
    assert told.endswith("GiB are free, 1073741824.00 GiB are needed") and "\n" not in told
    assert not no_room(Path("/proc/self"), 2**60)  # counts no blocks


# --- the end --------------------------------------------------------------------------------------


class Trained:
    """Stands for a training of three steps; `broken` names what fails of its end, with `error`."""

    total_steps = 3

    def __init__(self, broken: set[str], needed: int = 0, error: Exception | None = None) -> None:
        self.broken = broken
        self.error = error
        self.done: list[str] = []
        self.groups: dict[str, Any] = {}
        self.export: Any = SimpleNamespace(
            rehearse=lambda run: None,
            disk_bytes=lambda: (needed, 0),
            write_files=lambda folder: folder.mkdir(),
            write_model=lambda folder: self.do("export") or folder.mkdir(),
        )

    def do(self, what: str) -> None:
        self.done.append(what)
        if what in self.broken:
            raise self.error or ValueError(f"{what} broke\nat length")

    def begin(self, first: int) -> dict[str, Any]:
        return {}

    def step(self, step: int) -> tuple[dict[str, float], int]:
        return {"loss": 1.0}, 8

    def evaluation_due(self, step: int) -> bool:
        return False

    def evaluate(self, step: int) -> dict[str, float]:
        return {}

    def save(self, folder: Path, step: int) -> None:
        self.do("save")
        (folder / "learner").mkdir()

    def load(self, folder: Path) -> None:
        """Nothing to load."""

    def complete_model(self) -> dict[str, float]:
        self.do("calibrate")
        return {}

    def end(self, step: int) -> dict[str, Any]:
        self.do("evaluate")
        return {"held_out/loss": 1.0}


def run_to_the_end(tmp_path: Path, training: Trained, **settings: Any) -> dict[str, Any]:
    overrides = [f"run.folder={tmp_path / 'run'}", "run.tensorboard=false", "run.progress=false"]
    overrides += [f"run.{name}={value}" for name, value in settings.items()]
    recipe = load_recipe(RECIPES / "demo_sft.yaml", overrides)
    with accounted_for(recipe.run.folder), RunFolder.open(recipe.run, "") as folder:
        return Loop(recipe, training, folder, AlarmLog(folder, 3), clock=0.0).run(resume=False)


def test_the_model_is_written_before_what_may_fail(tmp_path: Path) -> None:
    """ACEsuit/mace#847, karpathy/autoresearch#107: the last evaluation fails before the save."""
    assert run_to_the_end(tmp_path, sound := Trained(set())) == {"steps": 3, "held_out/loss": 1.0}
    assert sound.done == ["calibrate", "export", "evaluate", "save"]
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(WorkerError, match=r"^evaluate broke: the model is complete, in .*/model$"):
        run_to_the_end(tmp_path, Trained({"evaluate"}))
    assert (tmp_path / "run" / "model").is_dir()


def test_a_model_is_exported_though_its_calibration_fails(tmp_path: Path) -> None:
    """No public report known to us: scores that are all equal, or not finite, at the end."""
    with pytest.raises(
        WorkerError, match=r"^calibrate broke: .* exported uncalibrated, to .*/model$"
    ):
        run_to_the_end(tmp_path, Trained({"calibrate"}))
    assert (tmp_path / "run" / "model").is_dir()
    assert [step for step, _ in finished_checkpoints(tmp_path / "run")] == [3]


@pytest.mark.parametrize("every", [0, 3])
def test_an_export_that_fails_leaves_the_weights_and_says_where(tmp_path: Path, every: int) -> None:
    """OpenRLHF/OpenRLHF#212, hiyouga/LlamaFactory#5162: the save after the last step fails, and
    nothing is left, as no checkpoint was asked for.
    """
    training = Trained({"export"})
    with pytest.raises(WorkerError) as error:
        run_to_the_end(tmp_path, training, checkpoint_every_steps=every)
    ((step, path),) = finished_checkpoints(tmp_path / "run")
    assert step == 3 and training.done.count("save") == 1
    assert str(error.value) == (
        "the model was not exported: export broke; "
        f"the weights of step 3 are safe: quatuor export {path} OUT"
    )


def test_weights_that_cannot_be_saved_either_are_not_said_to_be_safe(tmp_path: Path) -> None:
    """bghira/SimpleTuner#2353: the disk is full at the last save, whatever is written."""
    with pytest.raises(WorkerError, match=r"save broke.*there is no earlier one.* lost$"):
        run_to_the_end(tmp_path, Trained({"export", "save"}))


def test_a_run_without_room_does_not_begin_and_leaves_no_folder(tmp_path: Path) -> None:
    """mlfoundations/open_lm#154: better than to find out while the first checkpoint is written."""
    with pytest.raises(UserError, match=r"^run\.folder: .* lower run\.keep_checkpoints$"):
        run_to_the_end(tmp_path, training := Trained(set(), needed=2**60))
    assert not training.done and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("broken", "left"),
    [
        ("evaluate", "the model is complete, in "),
        ("export", "the weights of step 3 are safe: quatuor export "),
    ],
)
def test_a_full_disk_at_the_end_says_what_is_left(tmp_path: Path, broken: str, left: str) -> None:
    """bghira/SimpleTuner#2353: the disk is full at the last save. The line keeps where the weights
    are beside the remedy.
    """
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run" / "model.tmp"))
    with pytest.raises(WorkerError, match=f"No space left .* free some space there.*{left}") as end:
        run_to_the_end(tmp_path, Trained({broken}, error=full))
    assert "no checkpoint was saved" not in str(end.value)


def test_a_signal_after_the_last_step_leaves_with_the_model(tmp_path: Path) -> None:
    """No public report known to us: SIGTERM in the last step, and SIGKILL in a long evaluation."""
    training = Trained(set())
    training.complete_model = lambda: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore
    with pytest.raises(Left, match=r"SIGTERM; the model is complete, in .*/model") as end:
        run_to_the_end(tmp_path, training)
    assert end.value.code == 128 + signal.SIGTERM and training.done == ["export"]


def test_a_run_folder_that_workers_do_not_share_is_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No public report known to us: on each node the run folder is a local one, and `model/` would
    appear without weights.
    """
    monkeypatch.setattr("actors.export.LATE_S", 0.0)
    task.make_tokenizer(tmp_path / "tokens")
    export = export_of(tmp_path / "base", AutoTokenizer.from_pretrained(tmp_path / "tokens"))
    elsewhere: Any = SimpleNamespace(export_config=lambda to: None, export=lambda to: None)
    group: Any = Here(elsewhere)
    export.groups = {"sft": group}
    with pytest.raises(UserError, match=r"^run\.folder: .* another folder for sft\[0\]"):
        export.rehearse(tmp_path / "run")
    with pytest.raises(UserError, match=r"^run\.folder: "):
        export.write_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_model_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    """huggingface/transformers#10789: a folder that looks like a model and lacks its weights."""
    with pytest.raises(ValueError), complete_or_absent(tmp_path / "model") as draft:
        (draft / "config.json").write_text("{}")
        raise ValueError
    assert not list(tmp_path.iterdir())
    for text in ("one", "two"):
        with complete_or_absent(tmp_path / "model") as draft:
            (draft / "config.json").write_text(text)
            assert (tmp_path / "model").exists() == (text == "two")
        assert (tmp_path / "model" / "config.json").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- quatuor export -------------------------------------------------------------------------------


def make_checkpoint(run: Path, step: int, *left_out: str) -> Path:
    path = run / "checkpoints" / f"step-{step:06d}"
    files = ("learner/layout.json", "model_files/config.json", "run_folder.json")
    for name in set(files) - set(left_out):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("{}")
    return path


def test_what_cannot_be_exported_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """verl-project/verl#2493: a merger that stumbles over the checkpoint it is given."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    young = tmp_path / "young"
    young.mkdir()
    (young / "config.yaml").write_text("kind: sft\n")
    old = make_checkpoint(tmp_path / "old", 1, "model_files/config.json")
    draft = make_checkpoint(tmp_path / "draft", 1, "run_folder.json")
    sound = make_checkpoint(tmp_path / "sound", 1)
    out = tmp_path / "out"
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "half.tmp").mkdir()
    for source, folder, told in (
        (tmp_path / "none", out, "no such folder"),
        (tmp_path / "there", out, "neither a run nor a checkpoint of one"),
        (run, out, "no finished checkpoint (run.checkpoint_every_steps)"),
        (young, out, "no finished checkpoint"),
        (old, out, "has no model_files, as those of an earlier version"),
        (draft, out, "is not complete"),
        (sound, tmp_path / "there", "exists: choose another folder"),
        (sound, tmp_path / "file" / "out", "is no folder"),
        (sound, tmp_path / "half", "half.tmp is in the way"),
    ):
        assert cli.main(["export", str(source), str(folder)]) == 2
        line = capsys.readouterr().err
        assert told in line and line.startswith("error: ") and line.count("\n") == 1, line
    assert not out.exists()


def test_a_checkpoint_that_cannot_be_read_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No public report known to us: files of a checkpoint that were lost when it was copied."""
    sound = make_checkpoint(tmp_path / "run", 1)
    (sound / "learner" / "layout.json").write_text('{"ranks": 2, "zero_stage": 2}')
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err
    assert f"{sound / 'learner'}: cannot be read: " in line and line.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def saved_as(model: Any, run: Path) -> Path:
    """A checkpoint with the model's weights, as ZeRO 0 to 2 write them."""
    checkpoint = make_checkpoint(run, 1)
    (checkpoint / "learner" / "layout.json").write_text('{"ranks": 1, "zero_stage": 2}')
    (checkpoint / "learner" / "state").mkdir()
    module = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    file = checkpoint / "learner" / "state" / "mp_rank_00_model_states.pt"
    torch.save({"module": module}, file)
    save_config(model, checkpoint / "model_files")
    return checkpoint


def test_the_export_of_a_reward_model_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """OpenRLHF/OpenRLHF#693: without mean and std nothing is normalised, and nothing says so."""
    model = load_reward_model(made("qwen3", tmp_path / "base"), 0)
    saved_as(model, tmp_path / "raw")
    write_calibration(model.config, Calibration(3.0, 2.0))
    saved_as(model, tmp_path / "calibrated")
    for name in ("raw", "calibrated"):
        assert cli.main(["export", str(tmp_path / name), str(tmp_path / f"{name}-out")]) == 0
        assert ("not calibrated" in capsys.readouterr().out) == (name == "raw")
        again = load_reward_model(ModelSettings(path=str(tmp_path / f"{name}-out")), None)
        assert torch.equal(again.score.weight, model.score.weight)
    assert read_calibration(again.config) == (3.0, 2.0)


def test_a_checkpoint_with_weights_of_another_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """verl-project/verl#2493: a config that does not belong to the weights beside it."""
    checkpoint = saved_as(load_causal_lm(made("qwen3", tmp_path / "base")), tmp_path / "run")
    save_config(load_causal_lm(made("gpt2", tmp_path / "other")), checkpoint / "model_files")
    assert cli.main(["export", str(checkpoint), str(tmp_path / "out")]) == 2
    assert "the weights beside it lack transformer." in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_a_disk_that_fills_while_it_is_written_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """hiyouga/LlamaFactory#5155: safetensors has an error of its own for a full disk. A limit on
    the size of files stands for the disk.
    """
    config = Qwen3Config(**{**QWEN, "vocab_size": 9000})
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "base")
    model = load_causal_lm(ModelSettings(path=str(tmp_path / "base")))
    saved_as(model, tmp_path / "run")
    capsys.readouterr()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
    try:
        assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    line = capsys.readouterr().err
    assert line.startswith(f"error: {tmp_path / 'out'}: cannot be written: ")
    assert line.endswith("File too large (os error 27): make room, or choose another folder\n")
    assert line.count("\n") == 1 and not list(tmp_path.glob("out*"))


def test_code_that_came_with_a_model_leaves_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No public report known to us: a model of its own code, exported without that code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    base = tmp_path / "base"
    settings = made("qwen3", base).model_copy(update={"trust_remote_code": True})
    (base / "own.py").write_text(OWN)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    written = config_of(base) | {"model_type": "own", "auto_map": classes}
    (base / "config.json").write_text(json.dumps(written))
    model = load_causal_lm(settings)
    saved_as(model, tmp_path / "run")
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(again).__name__ == "OwnForCausalLM"
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_load_config_still_turns_dropout_off(tmp_path: Path) -> None:
    """hiyouga/LlamaFactory#10779, the other half: the forward pass has none."""
    settings = made("gemma3", tmp_path / "base")
    assert not any(dropout_in(load_config(settings).to_dict()).values())


@pytest.mark.engines
def test_a_run_that_used_to_leave_nothing(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """OpenRLHF/OpenRLHF#212 in a real run, and huggingface/transformers#10789: from a checkpoint of
    it the same model again, to the byte. Resumed onto a disk where the model cannot be written, it
    leaves a checkpoint and names the command.
    """
    base = tmp_path / "base [1]"
    run = tmp_path / "run é"
    task.make_tokenizer(base)
    task.make_model(base, 0)
    config = config_of(base) | {"attention_dropout": 0.1}
    (base / "config.json").write_text(json.dumps(config))
    (base / "generation_config.json").write_text(json.dumps({**SAMPLING, "eos_token_id": 7}))
    task.write_rows(tmp_path / "sft.jsonl", task.make_demonstrations(64, 0))
    small = ["learner.ranks=1", "learner.zero_stage=3", "train.batch_size=8", "held_out=null"]
    small += ["run.tensorboard=false", "run.progress=false", "run.checkpoint_every_steps=2"]
    paths = [f"learner.model.path={base}", f"data.path={tmp_path / 'sft.jsonl'}"]
    overrides = [*small, *paths, f"run.folder={run}", "train.evaluate_every=0"]

    def train(steps: int, resume: bool) -> None:
        recipe: Any = load_recipe(
            RECIPES / "demo_sft.yaml", [*overrides, f"train.steps={steps}"], "sft"
        )
        supervised.run(recipe, resume=Resume() if resume else None)

    def files(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    train(2, resume=False)
    assert config_of(run / "model")["attention_dropout"] == 0.1
    generation = json.loads((run / "model" / "generation_config.json").read_text())
    assert generation == {**SAMPLING, "eos_token_id": [7, 2]}
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    assert files(tmp_path / "out") == files(run / "model")

    (run / "model.tmp").symlink_to(tmp_path / "a disk that is gone")
    with pytest.raises(WorkerError, match="^the model was not exported: ") as error:
        train(3, resume=True)
    told = shlex.split(str(error.value).partition("safe: ")[2])
    assert told == ["quatuor", "export", str(run / "checkpoints" / "step-000003"), "OUT"]
    assert files(run / "model") == files(tmp_path / "out"), "that of step 2 is still there"
    assert cli.main([*told[1:3], str(tmp_path / "rescued")]) == 0
    rescued = files(tmp_path / "rescued")
    assert rescued.keys() == files(run / "model").keys()
    assert rescued["model.safetensors"] != files(run / "model")["model.safetensors"]
    assert capsys.readouterr().out.count("the model of ") == 2


def test_a_generation_config_that_is_no_json_is_refused_with_the_data(tmp_path: Path) -> None:
    """No public report known to us: an edited file lacks a word, and the end writes it."""
    task.make_tokenizer(tmp_path / "base")
    Qwen3Config(**QWEN, max_position_embeddings=24).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": }')
    task.write_rows(tmp_path / "rows.jsonl", [ROW])
    paths = [f"{key}.path={tmp_path / 'rows.jsonl'}" for key in ("data", "held_out")]
    where = [f"learner.model.path={tmp_path / 'base'}", f"run.folder={tmp_path / 'run'}"]
    recipe: Any = load_recipe(RECIPES / "demo_sft.yaml", [*where, *paths])
    with pytest.raises(UserError, match="base: generation_config.json is no JSON object"):
        supervised.SupervisedData.load(recipe)
