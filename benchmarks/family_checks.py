"""What must hold of a model family before it may be called supported: one function per cell of the
matrix of families. Each raises where it does not hold, and AssertionErrors say by how much.

    folder = make_model(SHAPES["qwen3"], seed=0, folder=...)
    check_actor(folder)

Numbers are log-probs in nats. What they are compared with is plain Transformers in eager attention,
one sequence at a time, or the engine.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from actors.engine.engine import GenerationEngine
from actors.engine.limits import sync_problem
from actors.settings import GenerationSettings
from actors.weights.packing import pack_group
from actors.weights.proof import Receipt, verify
from benchmarks.family_shapes import ENDS
from launch.recipe.served import not_served
from learners.checkpoints import (
    Calibration,
    load_causal_lm,
    load_critic,
    load_reward_model,
    read_calibration,
    write_calibration,
)
from learners.errors import UserError, in_a_line
from learners.experience import Experience, PromptRequest, Rollout, map_rows
from learners.forward import response_logprobs, response_values, sequence_scores
from learners.settings import LearnerSettings, ModelSettings, Rank
from learners.weights import TrainedWeights

EXACT = 5e-6  # the same numbers, added up in another order
ENGINE = 1e-4  # the default bound of sync.max_logprob_diff in float32
MOVED = 1.0  # an update that moves less could be taken for none
ROUNDED = 0.05  # on average, of bfloat16 against float32 in models of this size
TEMPERATURE = 1.2
LONGEST = 96  # tokens of prompt and response: more than any sliding window here
MICRO_BATCH = 150  # tokens: several rows together, and several micro-batches
PAD = ENDS["pad_token_id"]


class Impossible(Exception):
    """A cell that says why there can be no yes."""


class Weights(TrainedWeights):
    """A loaded model as a learner's rank holds it, without an optimizer."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.rank = Rank(0, 1, "", 0)
        self.settings = LearnerSettings(model=ModelSettings(path="none"))


def make_model(shape: dict[str, Any], folder: Path, seed: int = 0) -> str:
    """Write a model of this shape, every weight of it random, to the folder; return its path."""
    torch.manual_seed(seed)
    kind = shape["model_type"]
    fields = {name: value for name, value in shape.items() if name != "model_type"}
    config = AutoConfig.for_model(kind, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    move(model, 0.02)
    model.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def move(model: Any, by: float) -> None:
    """Add noise of a standard deviation to every weight, norms and biases too."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * by)


def sequences(vocabulary: int) -> Experience:
    """Return prompts and responses of many lengths, one much longer than any window."""
    draw = torch.Generator().manual_seed(1)
    lengths = ((5, 20), (1, 4), (17, LONGEST - 17), (9, 1), (30, 12), (2, 40))
    rows = [torch.randint(3, vocabulary, (sum(pair),), generator=draw).tolist() for pair in lengths]
    cuts = [prompt for prompt, _ in lengths]
    return Experience.from_ids(
        [row[:cut] for row, cut in zip(rows, cuts, strict=True)],
        [row[cut:] for row, cut in zip(rows, cuts, strict=True)],
    )


def rows_of(batch: Experience) -> list[list[int]]:
    """Return the ids of every row without padding."""
    return [
        ids[:n].tolist() for ids, n in zip(batch.input_ids, batch.lengths.tolist(), strict=True)
    ]


def in_batches(batch: Experience, forward: Callable[[Experience], Tensor]) -> Tensor:
    """Return `forward` of every row, computed in padded micro-batches as a learner does."""
    rounds = len(batch.micro_batches(MICRO_BATCH))
    return map_rows(batch, MICRO_BATCH, forward, "cpu", rounds)


def actor_logprobs(model: Any, batch: Experience, temperature: float = TEMPERATURE) -> Tensor:
    """Return the Actor's log-probs of a batch, [B,T]."""
    return in_batches(batch, lambda part: response_logprobs(model, part, temperature))


@torch.no_grad()
def plain_logprobs(model: Any, batch: Experience, temperature: float = TEMPERATURE) -> Tensor:
    """Return the same by plain Transformers, one row after the other, [B,T]."""
    found = torch.zeros(batch.loss_mask.shape)
    for i, row in enumerate(rows_of(batch)):
        ids = torch.tensor([row])
        logits = model(ids, use_cache=False).logits[0, :-1].float() / temperature
        picked = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        start = int(batch.prompt_lengths[i])
        found[i, : len(row) - start] = picked[start - 1 :]
    return found


def load_plain(path: str) -> Any:
    """Load a causal model as anybody would, with the attention that is written out."""
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def differ(ours: Tensor, theirs: Tensor, bound: float, what: str) -> float:
    """Return the largest difference; raise AssertionError where it is above the bound."""
    worst = float((ours - theirs).abs().nan_to_num(torch.inf).max())
    assert worst <= bound, f"{what} differ by {worst:.1e} (bound {bound:.0e})"
    return worst


# --- the Actor ------------------------------------------------------------------------------------


def check_actor(path: str) -> None:
    """Log-probs in padded batches are those of plain Transformers, one by one."""
    model = load_causal_lm(ModelSettings(path=path))
    batch = sequences(model.config.vocab_size)
    differ(
        actor_logprobs(model, batch), plain_logprobs(load_plain(path), batch), EXACT, "log-probs"
    )


def check_export(path: str, folder: Path) -> None:
    """What a run leaves behind loads in plain Transformers and computes the same."""
    model = load_causal_lm(ModelSettings(path=path))
    move(model, 0.02)
    batch = sequences(model.config.vocab_size)
    Weights(model).export(str(folder))
    reloaded = load_plain(str(folder))
    differ(actor_logprobs(model, batch), plain_logprobs(reloaded, batch), EXACT, "log-probs")


def check_bfloat16(path: str) -> None:
    """Rounding to bfloat16 moves log-probs by little on average."""
    batch = sequences(load_plain(path).config.vocab_size)
    exact, rounded = (
        actor_logprobs(load_causal_lm(ModelSettings(path=path, dtype=dtype)), batch)
        for dtype in ("float32", "bfloat16")
    )
    mean = float((exact - rounded)[batch.loss_mask].abs().mean())
    assert mean <= ROUNDED, f"log-probs differ by {mean:.1e} on average (bound {ROUNDED:g})"


# --- reward model and Critic ----------------------------------------------------------------------


def scores(model: Any, batch: Experience, side: Literal["left", "right"] = "right") -> Tensor:
    """Return a reward model's raw scores of a batch, [B]."""
    return in_batches(batch, lambda part: sequence_scores(model, part, side))


def one_by_one(batch: Experience, forward: Callable[[Experience], Tensor]) -> Tensor:
    """Return `forward` of every row, each in a batch of its own without padding."""
    return map_rows(batch, 1, forward)


def make_reward_model(path: str, folder: Path) -> Any:
    """Put a head on an SFT model, move every weight, and export it; return the model."""
    torch.manual_seed(0)
    model = load_reward_model(ModelSettings(path=path), PAD)
    move(model, 0.02)
    write_calibration(model.config, Calibration(0.3, 2.0))
    Weights(model).export(str(folder))
    return model


def check_reward_model(path: str, folder: Path) -> None:
    """Scores are the same under both paddings, one by one, and after a reload."""
    model = make_reward_model(path, folder)
    batch = sequences(model.config.get_text_config().vocab_size)
    reloaded = load_reward_model(ModelSettings(path=str(folder), attention="eager"), PAD)
    truth = one_by_one(batch, lambda row: sequence_scores(reloaded, row))
    bound = EXACT * max(1.0, float(truth.abs().max()))
    differ(scores(model, batch), truth, bound, "scores, padded on the right,")
    differ(scores(model, batch, "left"), truth, bound, "scores, padded on the left,")


@torch.no_grad()
def check_plain_reward_model(path: str, folder: Path) -> None:
    """Plain Transformers loads an exported reward model and gives the same scores."""
    if not folder.exists():
        make_reward_model(path, folder)
    ours = load_reward_model(ModelSettings(path=str(folder)), PAD)
    if type(ours.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise Impossible("Transformers has no class for it; it loads here")
    batch = sequences(ours.config.get_text_config().vocab_size)
    plain = AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    theirs = torch.stack([plain(torch.tensor([row])).logits[0, 0] for row in rows_of(batch)])
    differ(scores(ours, batch), theirs, EXACT * max(1.0, float(theirs.abs().max())), "scores")


def values(model: Any, batch: Experience) -> Tensor:
    """Return a Critic's values before every response token, [B,T]."""
    return in_batches(batch, lambda part: response_values(model, part))


def check_critic(path: str, folder: Path) -> None:
    """A Critic begun from an SFT model values everything at 0, and once it has learned, the same in
    batches, one by one, and after a reload.
    """
    model = load_critic(ModelSettings(path=path))
    batch = sequences(model.config.get_text_config().vocab_size)
    assert not values(model, batch).any(), "values do not begin at 0"
    move(model, 0.05)
    Weights(model).export(str(folder))
    reloaded = load_critic(ModelSettings(path=str(folder), attention="eager"))
    truth = one_by_one(batch, lambda row: response_values(reloaded, row))
    assert truth.any(), "values stay 0"
    bound = EXACT * max(1.0, float(truth.abs().max()))
    differ(values(model, batch), truth, bound, "values")


def check_critic_of_reward_model(path: str, folder: Path) -> None:
    """A Critic begun from a reward model values a text as that one scores it, calibrated."""
    reward_model = make_reward_model(path, folder)
    critic = load_critic(ModelSettings(path=str(folder)))
    rows = rows_of(sequences(critic.config.get_text_config().vocab_size))
    # a token more, before which the Critic has read the whole text
    batch = Experience.from_ids(rows, [[3]] * len(rows))
    texts = Experience.from_ids([row[:1] for row in rows], [row[1:] for row in rows])
    mean, std = read_calibration(reward_model.config)
    expected = (scores(reward_model, texts) - mean) / std
    bound = EXACT * max(1.0, float(expected.abs().max()))
    differ(values(critic, batch)[:, 0], expected, bound, "values and calibrated scores")


# --- the engine -----------------------------------------------------------------------------------


class Engine:
    """An engine in a process of its own, as in a run: vLLM changes classes of Transformers.

    Starting it raises AssertionError with what kept it from starting.
    """

    def __init__(self, model: ModelSettings) -> None:
        wrong = not_served(json.loads(Path(model.path, "config.json").read_text()))
        assert not wrong, wrong  # as the check of a recipe says before it would start one
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(model, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._answer()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what `function` returns, called there with the engine before its arguments."""
        self.pipe.send((function, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            done, result = self.pipe.recv()
        except EOFError:
            self.process.join(10)
            raise AssertionError(f"the engine crashed ({self.process.exitcode})") from None
        assert done, result
        return result

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()


def serve(model: ModelSettings, calls: Connection) -> None:
    """Start an engine that weights can be sent to, and answer calls until their end."""
    torch.set_num_threads(1)
    generation = GenerationSettings(threads=1, kv_cache_gib=0.125, max_concurrent=16)

    def start(_: None) -> GenerationEngine:
        engine = GenerationEngine(model, generation, "cpu", 2 * LONGEST, [ENDS["eos_token_id"]])
        engine.init_weight_transfer_engine({"timeout_s": 10.0})
        return engine

    engine = None
    function: Callable[..., Any] = start
    arguments: tuple[Any, ...] = ()
    with contextlib.suppress(EOFError):
        while True:
            try:
                result = function(engine, *arguments)
                if function is start:
                    engine = result
                calls.send((True, None if function is start else result))
            except Exception as error:
                calls.send((False, words(error)))
            function, arguments = calls.recv()


def generate(engine: GenerationEngine) -> list[Rollout]:
    """Sample responses to prompts of several lengths."""
    requests = [
        PromptRequest(i, i, [3 + (7 * i + k) % 90 for k in range(length)], 2, TEMPERATURE, 40)
        for i, length in enumerate((1, 6, 33))
    ]
    return [rollout for groups in engine.generate(requests) for g in groups for rollout in g]


def probe(engine: GenerationEngine, ids: list[int]) -> list[float]:
    """Return log-probs of ids[1:] at temperature 1."""
    return engine.probe_logprobs(ids)


def update(engine: GenerationEngine, groups: list[dict[str, Any]], version: int) -> Receipt:
    """Give an engine packed groups of weights to serve; return its receipt."""
    engine.start_weight_update()
    engine.update_weights({"groups": groups})
    received = engine.finish_weight_update(str(version))
    engine.accept(version)
    return received


def send(engine: Engine, weights: TrainedWeights, version: int) -> None:
    """Give an engine the weights, as a run on CPUs does, and prove that they arrived."""
    groups = []
    for i, (names, tensors) in enumerate(weights.iter_groups()):
        meta, data = pack_group(f"group {i}", list(zip(names, tensors, strict=True)))
        groups.append({**meta, "ref": data})
    sent = [(group["name"], group["digest"], group["names"]) for group in groups]
    verify(sent, engine.call(update, groups, version), [n for n, _, _ in weights.metadata()])


def check_engine(engine: Engine, model: Any) -> None:
    """The engine gives what it sampled, and a given text, the Actor's log-probs."""
    batch = Experience.from_rollouts(engine.call(generate))
    assert batch.rollout_logprobs is not None
    ours = actor_logprobs(model, batch)
    agree(ours, batch.rollout_logprobs, model, "log-probs of sampled responses")
    given = rows_of(sequences(model.config.vocab_size))[2]
    text = Experience.from_ids([given[:1]], [given[1:]])
    theirs = torch.tensor([engine.call(probe, given)])
    agree(actor_logprobs(model, text, 1.0), theirs, model, "log-probs of a given text")


def agree(ours: Tensor, theirs: Tensor, model: Any, what: str) -> None:
    """Hold an engine to the bounds that a run has: on every token, in bfloat16 on the mean."""
    if model.dtype == torch.float32:
        differ(ours, theirs, ENGINE, what)
    else:
        mean = (ours - theirs)[theirs != 0].abs().mean()
        differ(mean, torch.zeros(()), ROUNDED, f"{what} (on average)")


def check_sync(engine: Engine, model: Any) -> None:
    """After each of two updates of every weight, both far away, the engine follows the Actor."""
    if wrong := sync_problem(model.config):
        raise Impossible(wrong)
    batch = sequences(model.config.vocab_size)
    for version in (1, 2):
        before = actor_logprobs(model, batch)
        move(model, 0.1)
        moved = float((actor_logprobs(model, batch) - before).abs().max())
        assert moved > MOVED, f"the update moved log-probs by {moved:.1e} only"
        send(engine, Weights(model), version)
        check_engine(engine, model)


def with_engine(folder: str, settings: ModelSettings) -> dict[str, str]:
    """Return what is found with an engine: "yes" or words for "engine" and "sync"."""
    try:
        model = load_causal_lm(settings)
        engine = Engine(settings)
    except Exception as error:
        return dict.fromkeys(("engine", "sync"), words(error).replace(f"{folder}/", ""))
    try:
        return {
            "engine": words_of(folder, check_engine, engine, model),
            "sync": words_of(folder, check_sync, engine, model),
        }
    finally:
        engine.close()


# --- words ----------------------------------------------------------------------------------------


def words_of(folder: str, check: Callable[..., None], *arguments: Any) -> str:
    """Return "yes" where a check holds, else what it says, without the folder's name."""
    try:
        check(*arguments)
    except Exception as error:
        return words(error).replace(f"{folder}/", "")
    return "yes"


def words(error: Exception) -> str:
    """Return what an error says, in a line; with its kind where it is not meant to be read."""
    said = in_a_line(error)
    meant = isinstance(error, AssertionError | UserError | Impossible) and str(error)
    return (said if meant else f"{type(error).__name__}: {said}").replace("|", "/")[:300]
