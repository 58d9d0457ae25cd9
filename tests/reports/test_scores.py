"""Failures of scoring that people reported elsewhere, each with its source, and their kin."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from actors.rewards import function, reading
from actors.rewards.function import FunctionReward
from actors.rewards.model import RewardWorker
from actors.rewards.reading import Reader
from actors.rewards.score import Rewards, Score
from actors.roles import roles_of
from actors.rollouts.sample import Sample
from actors.run.metrics import BY_NAME
from actors.run_data import RunData
from actors.settings import RewardSettings, RLRecipe
from launch.recipe.read import RecipeError, load_recipe, read_recipe
from launch.tasks import unique_digits as task
from learners.advantages import group_advantages
from learners.checkpoints import read_calibration
from learners.errors import UserError
from learners.settings import ModelSettings
from tests.actors.scored import scores as scores_of
from tests.launch.small_recipes import REWARD_MODEL, make_model, recipes


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sample(response: str, prompt: str = "2+2=", ids: Sequence[int] = (5,)) -> Sample:
    return Sample([1, 4], list(ids), prompt, response, "stop", {})


def asked(function: Callable[..., Any], *responses: str, **options: float) -> list[Score]:
    """The scores of a function of this file."""
    reward = FunctionReward(f"{__name__}:{function.__name__}", **options)
    return reward.scores([sample(response) for response in responses])


# --- what a function raises -----------------------------------------------------------------------


class OwnEnd(BaseException):
    """Not an Exception, and not ours either."""


class Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even that")


RAISED = {
    "timeout": TimeoutError("10 s"),
    "file": FileNotFoundError(2, "no such file"),
    "exit": SystemExit(3),
    "generator": GeneratorExit(),
    "own": OwnEnd("enough"),
    "memory": MemoryError(),
    "speechless": Speechless(),
    "lines": ValueError("one\n  two"),
}


def raising(prompts: list[str], responses: list[str]) -> list[float]:
    for response in responses:
        if response in RAISED:
            raise RAISED[response]
    return [1.0] * len(responses)


def test_one_timeout_costs_one_response() -> None:
    """databricks/compose-rl#87, rasbt/reasoning-from-scratch#125: the step was lost for all."""
    scores = asked(raising, "a", "timeout", "b", "timeout", "c")
    assert [s.value for s in scores] == [1.0, None, 1.0, None, 1.0]
    assert scores[1].error == "TimeoutError: 10 s"


def test_whatever_is_raised_costs_one_response() -> None:
    """ray-project/ray#1049: sys.exit() inside an actor ended it, and the caller waited for ever."""
    names = list(RAISED)
    scores = asked(raising, *names, "fine")
    assert scores[-1] == Score(1.0) and not any(score.value for score in scores[:-1])
    words = dict(zip(names, (score.error for score in scores), strict=False))
    assert words["exit"] == "SystemExit: 3" and words["own"] == "OwnEnd: enough"
    assert words["memory"] == "MemoryError" and words["lines"] == "ValueError: one two"
    assert words["speechless"] == "Speechless: it cannot say what is wrong"


def interrupted(prompts: list[str], responses: list[str]) -> list[float]:
    if responses == ["ray"]:
        end = SystemExit(1)
        end.ray_terminate_msg = "The process receives a SIGTERM."  # type: ignore[attr-defined]
        raise end
    raise KeyboardInterrupt


@pytest.mark.parametrize(("who", "raised"), [("ray", SystemExit), ("us", KeyboardInterrupt)])
def test_an_interrupt_of_ours_still_ends_the_process(who: str, raised: type) -> None:
    """No public report known to us: a process that is told to end must not score on."""
    with pytest.raises(raised):
        asked(interrupted, who)


calls: list[int] = []


def slow_and_dead(prompts: list[str], responses: list[str]) -> list[float]:
    calls.append(len(responses))
    time.sleep(0.01)
    raise ConnectionError("no route to host")


def test_a_dead_server_does_not_eat_the_step() -> None:
    """TideDra/lmm-r1#30, verl-project/verl-omni#366: every response waited for the server."""
    calls.clear()
    scores = asked(slow_and_dead, *"0123456789" * 10, patience_s=0.03)
    assert calls[0] == 100 and 2 <= len(calls) - 1 <= 5
    given_up = [s for s in scores if "(not asked again: " in str(s.error)]
    assert len(given_up) == 100 - (len(calls) - 1)
    assert all(str(s.error).startswith("ConnectionError: no route to host") for s in scores)


def one_hard_prompt(prompts: list[str], responses: list[str]) -> list[float]:
    if "hard" in responses:
        time.sleep(0.01)
        raise TimeoutError
    return [1.0] * len(responses)


def test_a_prompt_that_is_too_hard_is_not_a_dead_server() -> None:
    """TideDra/lmm-r1#30 again: the responses to one prompt come one after the other."""
    scores = asked(one_hard_prompt, *["hard"] * 4, *"ab" * 6, patience_s=0.015)
    assert [s.value for s in scores] == [None] * 4 + [1.0] * 12


class Clock:
    """The time, which goes on when a function says so."""

    def __init__(self, failing_s: float) -> None:
        self.now = 0.0
        self.failing_s = failing_s

    def monotonic(self) -> float:
        return self.now


clocks: list[Clock] = []


def in_parallel(prompts: list[str], responses: list[str]) -> list[float]:
    """All at once: a call takes as long as the slowest of them."""
    calls.append(len(responses))
    clocks[0].now += clocks[0].failing_s if "bad" in responses else 1.0
    if "bad" in responses:
        raise TimeoutError("a judge did not answer")
    return [float(response) for response in responses]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(failing_s=1.0)
    monkeypatch.setattr(f"{__name__}.clocks", [clock])
    monkeypatch.setattr(function, "time", clock)
    calls.clear()
    return clock


@pytest.mark.parametrize("bad", [0, 1, 100, 255])
def test_one_failure_leaves_the_others_of_a_parallel_function_together(
    clock: Clock, bad: int
) -> None:
    """huggingface/trl#6680: functions are given a whole batch in one call, and make use of it. Each
    of 256 was then asked alone.
    """
    texts = ["bad" if i == bad else str(i) for i in range(256)]
    scores = asked(in_parallel, *texts, deadline_s=1800)
    assert scores.pop(bad) == Score(error="TimeoutError: a judge did not answer")
    assert [s.value for s in scores] == [float(text) for text in texts if text != "bad"]
    assert clock.now == len(calls) <= 2 + 1 + 2 * 8


def test_slow_failures_are_looked_for_one_by_one_where_that_is_quicker(clock: Clock) -> None:
    """No public report known to us: halves would wait for the same one again and again."""
    clock.failing_s = 30.0
    scores = asked(in_parallel, *map(str, range(9)), "bad", "10", "11", deadline_s=1800)
    assert [s.value for s in scores] == [*map(float, range(9)), None, 10.0, 11.0]
    assert calls == [12, 1, 11, *[1] * 11] and clock.now == 3 * 30 + 11


def test_failures_end_well_before_the_call_is_given_up(clock: Clock) -> None:
    """TideDra/lmm-r1#30 again, with successes in between: 64 waits of 30 s were half an hour."""
    clock.failing_s = 30.0
    texts = [str(i) if i % 5 else "bad" for i in range(256)]
    scores = asked(in_parallel, *texts, deadline_s=1800)
    assert 900 < clock.now <= 930
    assert sum(s.value is not None for s in scores) > 50
    assert all(s.error is None or s.error.startswith("TimeoutError: a judge") for s in scores)
    assert "(not asked again: " in str(scores[-1]) and " of 256 were done after 9" in str(
        scores[-1]
    )


def test_functions_know_how_long_they_are_waited_for(tmp_path: Path) -> None:
    """No public report known to us: a recipe with a shorter deadline of its own."""
    file = tmp_path / "grpo.yaml"
    file.write_text(yaml.safe_dump(recipes()["grpo"]))
    asked_for = [
        "evaluation.prompts.path=p.jsonl",
        "cluster.call_deadline_s=90",
        "evaluation.function=a:b",
    ]
    roles = roles_of(load_recipe(file, asked_for))
    waits = [roles[name].arguments["deadline_s"] for name in ("reward exact", "evaluator")]
    assert waits == [90, 90]


def alarms(prompts: list[str], responses: list[str]) -> list[float]:
    def late(*_: Any) -> None:
        raise TimeoutError("alarm")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    if "loops" in responses:
        time.sleep(1)
    if "forgets" in responses:
        raise ValueError("with the alarm still set")
    signal.setitimer(signal.ITIMER_REAL, 0)
    return [1.0] * len(responses)


def test_an_alarm_that_a_function_forgets_rings_for_nobody_else() -> None:
    """verl-project/verl#5635: alarms of a verifier inside a worker spoiled all of its scores."""
    before = signal.getsignal(signal.SIGALRM)
    try:
        scores = asked(alarms, "fine", "loops", "forgets", "fine")
        time.sleep(0.02)
    finally:
        signal.signal(signal.SIGALRM, before)
    said = ["TimeoutError: alarm", "ValueError: with the alarm still set"]
    assert scores == scores_of([1.0, *said, 1.0])


def forking(prompts: list[str], responses: list[str]) -> list[float]:
    ends = []
    for response in responses:
        child = os.fork()
        if not child:
            print(f"child of {response}")
            if response == "exits":
                sys.exit(3)
            if response == "raises":
                raise ValueError("in a child")
            if response == "returns":
                return [7.0] * len(responses)
            os._exit(5)
        ends.append(float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    return ends


def test_a_child_that_runs_out_of_the_function_ends_there() -> None:
    """No public report known to us. Such a child tore down its parent's connections to Ray."""
    this = os.getpid()
    scores = asked(forking, "ends", "exits", "raises", "returns")
    assert os.getpid() == this
    assert scores == scores_of([5.0, 3.0, 1.0, 0.0])


# --- what a function returns ----------------------------------------------------------------------


VALUES: dict[str, Any] = {
    "text": "abc",
    "dict": {"score": 1},
    "huge": 10**400,
    "complex": 1j,
    "list": [1.0, 2.0],
    "object": object(),
}


def odd_values(prompts: list[str], responses: list[str]) -> list[Any]:
    return [VALUES.get(response, 0.5) for response in responses]


def test_a_value_that_is_no_number_costs_one_response() -> None:
    """THUDM/slime#2121: a reward that is no float ended the rollout."""
    scores = asked(odd_values, "fine", *VALUES, "fine")
    assert scores[0] == scores[-1] == Score(0.5)
    for name, score in zip(VALUES, scores[1:-1], strict=True):
        assert score.value is None and "not a number" in str(score.error), name
    assert "gave 'abc', not a number" in str(scores[1].error)


def numbers(prompts: list[str], responses: list[str]) -> list[Any]:
    return [np.float32("nan"), np.int64(2), True, torch.tensor(0.5), torch.tensor([3.0]), None, "4"]


def test_numbers_of_any_kind_are_scores() -> None:
    """modelscope/ms-swift#8123: NaN and None are not the same: the one is a fault."""
    nan, *rest = asked(numbers, *"abcdefg")
    assert nan.value != nan.value and nan.error is None
    assert rest == scores_of([2.0, 1.0, 0.5, 3.0, None, 4.0])
    assert all(type(score.value) in (float, type(None)) for score in rest)


RESULTS: dict[str, Callable[[int], Any]] = {
    "a generator": lambda n: (0.5 for _ in range(n)),
    "a tuple": lambda n: (0.5,) * n,
    "an array": lambda n: np.full(n, 0.5, dtype=np.float32),
    "a tensor": lambda n: torch.full((n,), 0.5),
    "a column": lambda n: torch.full((n, 1), 0.5),
    "values": lambda n: dict.fromkeys(range(n), 0.5).values(),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_scores_may_come_as_anything_in_order(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface/trl#6533 was about the other ones, see below."""
    reward = FunctionReward(f"{__name__}:raising")
    monkeypatch.setattr(reward, "function", lambda prompts, responses: RESULTS[kind](len(prompts)))
    assert reward.scores([sample("a")] * 3) == scores_of([0.5] * 3)


def some_missing(prompts: list[str], responses: list[str]) -> list[float]:
    return [1.0 for response in responses if response != "unparsed"]


WRONG_RESULTS: dict[str, tuple[Any, str]] = {
    "one for all": (1.0, "returned a float, not a list"),
    "by name": ({"a": 1.0, "b": 2.0}, "returned a dict, not a list"),
    "text": ("ab", "returned a str, not a list"),
    "nothing": (None, "returned a NoneType, not a list"),
    "without end": (itertools.repeat(1.0), "returned more than 1 scores for 1 responses"),
}


def test_a_wrong_number_of_scores_costs_those_at_fault() -> None:
    """huggingface/trl#6533: a single score became that of every response."""
    scores = asked(some_missing, "a", "unparsed", "b")
    assert scores == scores_of([1.0, "ValueError: returned 0 scores for 1 responses", 1.0])


@pytest.mark.parametrize("kind", WRONG_RESULTS)
def test_what_is_no_list_of_scores_is_said(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface/trl#6533, variants."""
    result, said = WRONG_RESULTS[kind]
    reward = FunctionReward(f"{__name__}:raising")
    monkeypatch.setattr(reward, "function", lambda prompts, responses: result)
    scores = reward.scores([sample("a"), sample("b")])
    assert all(score.value is None and said in str(score.error) for score in scores)


async def not_awaited(prompts: list[str], responses: list[str]) -> list[float]:
    return [1.0] * len(responses)


def test_a_function_that_somebody_would_have_to_await_is_refused_before_start() -> None:
    """No public report known to us; other trainers take such functions."""
    with pytest.raises(UserError, match="not_awaited: is async, nobody would wait for it"):
        asked(not_awaited, "a")


# --- names ----------------------------------------------------------------------------------------


def refused(folder: Path, kind: str, *overrides: str) -> str:
    file = folder / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(recipes()[kind]))
    with pytest.raises(RecipeError) as error:
        load_recipe(file, overrides)
    (line,) = error.value.problems
    return line


OURS = sorted(name.split("/")[1] for name in BY_NAME if name.startswith("score/"))


@pytest.mark.parametrize("name", OURS)
def test_a_source_is_not_called_like_a_metric_of_ours(tmp_path: Path, name: str) -> None:
    """huggingface/trl#5233: a user's metric was averaged into the trainer's own."""
    assert {"mean", "std", "unscorable"} <= set(OURS)
    line = refused(tmp_path, "grpo", f"rewards.0.name={json.dumps(name)}")
    assert "rewards.0.name" in line and f"score/{name} is a metric of the whole step" in line


@pytest.mark.parametrize(
    ("name", "said"),
    [("''", "is empty"), ("' '", "is empty"), (r'"a\nb"', "control"), (r'"a\0"', "control")],
)
def test_a_source_has_a_name(tmp_path: Path, name: str, said: str) -> None:
    """No public report known to us. A NUL ended as "type name must not contain null characters"."""
    assert said in refused(tmp_path, "grpo", f"rewards.0.name={name}")


@pytest.mark.parametrize(
    "name", ["Mean", "mean2", "org/model", "Länge, 長さ", "a b", "exact.match"]
)
def test_other_names_are_fine(tmp_path: Path, name: str) -> None:
    """huggingface/trl#5233, the other side: these are nobody else's."""
    file = tmp_path / "grpo.yaml"
    file.write_text(yaml.safe_dump(recipes()["grpo"]))
    recipe = load_recipe(file, [f"rewards.0.name={json.dumps(name)}"])
    assert isinstance(recipe, RLRecipe) and recipe.rewards[0].name == name


@pytest.mark.parametrize("column", ["prompts", "responses", "finish_reasons"])
def test_a_column_is_not_called_like_what_a_function_is_given(tmp_path: Path, column: str) -> None:
    """unslothai/unsloth-zoo#832 (review): columns of the trainer's own reached the functions."""
    line = refused(tmp_path, "grpo", f"prompts.answer_columns=[answer,{column}]")
    assert "prompts.answer_columns.1" in line and "is what a function is given" in line


def test_a_column_is_listed_once(tmp_path: Path) -> None:
    """No public report known to us."""
    line = refused(tmp_path, "grpo", "prompts.answer_columns=[answer,answer]")
    assert "prompts.answer_columns.1: 'answer' is listed twice" in line


@pytest.mark.parametrize(
    ("kind", "override", "said"),
    [
        ("sft", "data.response_column=prompt", "data.response_column: 'prompt' is data.columns.p"),
        (
            "sft",
            "data.columns.response=prompt",
            "data.columns.response: 'prompt' is data.",
        ),
        ("rm", "held_out.columns.rejected=chosen", "'chosen' is held_out.columns.chosen too"),
    ],
)
def test_prompt_and_answers_are_different_columns(
    tmp_path: Path, kind: str, override: str, said: str
) -> None:
    """No public report known to us. The one learned to repeat the prompt, the other dropped all."""
    assert said in refused(tmp_path, kind, override)


# --- a reward model's noise -----------------------------------------------------------------------

VOCABULARY = len(task.SPECIAL) + len(task.CHARACTERS)
SCALE = 3000.0


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> RewardWorker:
    """A reward model whose scores are in the thousands, in micro-batches of a few sequences."""
    return worker(save_reward_model(tmp_path_factory.mktemp("models") / "large", positions=128))


@pytest.fixture
def quiet(loaded: RewardWorker) -> RewardWorker:
    """One that does not measure its noise."""
    return copy.copy(loaded)


@pytest.fixture
def loud(loaded: RewardWorker) -> RewardWorker:
    """One that measures its noise, and has not begun."""
    reader = copy.copy(loaded)
    reader.measures_noise = True
    return reader


def save_reward_model(
    folder: Path, positions: int, scale: float = SCALE, vocabulary: int = 0
) -> Path:
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary or VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=positions,
        initializer_range=0.2,
        num_labels=1,
        pad_token_id=0,
        eos_token_id=2,
    )
    model = Qwen3ForSequenceClassification(config)
    with torch.no_grad():
        model.score.weight.mul_(scale)
    model.save_pretrained(folder)
    task.make_tokenizer(folder)
    return folder


def worker(folder: Path, actor: Path | None = None) -> RewardWorker:
    model = ModelSettings(path=str(folder))
    return RewardWorker(model, ModelSettings(path=str(actor or folder)), 300, "cpu")


def groups_of_equal_answers(count: int = 6, size: int = 8) -> list[Sample]:
    """Groups whose responses are all the same, of many lengths, so that they meet in micro-batches
    of many shapes.
    """
    generator = torch.Generator().manual_seed(1)

    def ids(shortest: int, longest: int) -> list[int]:
        length = int(torch.randint(shortest, longest, (1,), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    groups = [Sample(ids(4, 12), ids(4, 40), "", "", "stop", {}) for _ in range(count)]
    return [one for one in groups for _ in range(size)]


class Answered:
    """A group of workers that have answered; each scores its share when it is asked for."""

    def __init__(self, *workers: Any) -> None:
        self.workers = workers

    def __len__(self) -> int:
        return len(self.workers)

    def scatter(self, method: str, shares: list[list[Sample]]) -> list[list[Score]]:
        assert method == "scores"
        return [w.scores(share) for w, share in zip(self.workers, shares, strict=True)]

    def gather(self, pending: list[Any], phase: str, deadline_s: float) -> list[Any]:
        return pending


class Fixed:
    """A source with known scores."""

    def __init__(self, scores: Sequence[float]) -> None:
        self.known = scores_of(scores)

    def scores(self, samples: Sequence[Sample]) -> list[Score]:
        return self.known


def totals(samples: list[Sample], compared: int, *sources: Answered) -> torch.Tensor:
    settings = [
        RewardSettings(name=f"source {i}", kind="function", function="m:f")
        for i in range(len(sources))
    ]
    rewards = Rewards(settings, sources, 1.0, compared)  # type: ignore[arg-type]
    scores, _ = rewards.gather(rewards.submit(samples), samples)
    return torch.tensor([s.value for s in scores], dtype=torch.float64)


def test_equal_answers_have_equal_scores(quiet: RewardWorker, loud: RewardWorker) -> None:
    """allenai/reward-bench#137 (scores move with the batch) and NVIDIA-NeMo/RL#4161 (a std that is
    only rounding makes advantages of it): of order 1 without `compared`.
    """
    samples = groups_of_equal_answers()
    plain = totals(samples, 1, Answered(quiet))
    assert plain.abs().mean() > 1000
    assert group_advantages(plain, 8).abs().max() > 0.8

    one = totals(samples, 8, Answered(loud))
    two = totals(samples, 8, Answered(loud, loud))
    for scores in (one, two):
        assert not group_advantages(scores, 8).any()
        assert torch.allclose(scores, plain, rtol=1e-5)


def test_answers_that_differ_for_the_model_by_rounding_only_are_equal(loud: RewardWorker) -> None:
    """NVIDIA-NeMo/RL#4161, a variant: other ids, which the model reads as the same text."""
    samples = groups_of_equal_answers()
    scores = loud.scores(samples)
    spread = max(
        max(s.value for s in group) - min(s.value for s in group)  # type: ignore[type-var, operator]
        for group in (scores[i : i + 8] for i in range(0, len(scores), 8))
    )
    assert 0 < spread <= scores[0].noise < 0.1

    different = [
        Sample(s.prompt_ids, [*s.response_ids, i], "", "", "stop", {})
        for i, s in enumerate(samples)
    ]
    known = Answered(Fixed([0.0]))
    known.workers[0].known = scores
    assert not group_advantages(totals(different, 8, known), 8).any()


def test_a_real_difference_keeps_its_digits(quiet: RewardWorker, loud: RewardWorker) -> None:
    """NVIDIA-NeMo/RL#4161, the other side."""
    samples = groups_of_equal_answers()
    for i in range(0, len(samples), 8):  # one response of each group is another one
        samples[i + 3] = Sample(
            samples[i].prompt_ids, samples[i].response_ids[::-1], "", "", "stop", {}
        )
    plain = totals(samples, 1, Answered(quiet))
    scored = totals(samples, 8, Answered(loud))
    different = torch.arange(3, len(samples), 8)
    assert torch.equal(scored[different], plain[different])
    assert torch.equal(scored[0::8], plain[0::8])
    assert group_advantages(scored, 8).reshape(-1, 8).abs().max(1).values.min() > 1


def test_a_functions_small_differences_are_real(loud: RewardWorker) -> None:
    """NVIDIA-NeMo/RL#4161, the other side: alone, and beside a model that has nothing to say about
    the group.
    """
    samples = groups_of_equal_answers(count=2)
    small = [1e-9 * i for i in range(16)]
    alone = totals(samples, 8, Answered(Fixed(small)))
    assert alone.tolist() == small
    both = totals(samples, 8, Answered(loud), Answered(Fixed(small)))
    expected = group_advantages(alone, 8)
    assert torch.allclose(group_advantages(both, 8), expected, atol=0.01) and expected.any()


def test_scores_that_no_algorithm_compares_are_what_they_were(
    quiet: RewardWorker, loud: RewardWorker
) -> None:
    """No public report known to us. PPO: no forward pass more, no digit moved."""
    samples = groups_of_equal_answers(count=2)
    scores = quiet.scores(samples)
    assert [s.value for s in scores] == [s.value for s in loud.scores(samples)]
    assert all(score.noise == 0 for score in scores)


def test_noise_is_a_function_of_the_step_alone(loud: RewardWorker) -> None:
    """NVIDIA-NeMo/RL#108: what a process had seen was not in the checkpoint, so a resumed run went
    on with other numbers.
    """
    steps = [groups_of_equal_answers(count=6)[i : i + 8] for i in range(0, 48, 8)]
    resumed = [copy.copy(loud) for _ in steps]  # at each of them
    uninterrupted = [loud.scores(step) for step in steps]
    assert len({scores[0].noise for scores in uninterrupted}) == len(steps)
    assert uninterrupted == [r.scores(step) for r, step in zip(resumed, steps, strict=True)]


def test_noise_costs_few_forward_passes(
    loud: RewardWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No public report known to us. Two in a hundred, and some where a step is small."""
    alone: list[int] = []
    read = loud._raw

    def counted(ids: Any, token_budget: int) -> torch.Tensor:
        if token_budget == 1:
            alone.append(len(ids))
        return read(ids, token_budget)

    monkeypatch.setattr(loud, "_raw", counted)
    for count in (1, 5, 48, 640):
        scores = loud.scores((groups_of_equal_answers(count=6) * 14)[:count])
        assert all(score.noise > 0 for score in scores)
    assert alone == [1, 3, 4, 10]


def test_a_step_without_copies_knows_its_noise_too(loud: RewardWorker) -> None:
    """allenai/reward-bench#137, a variant: only what is tried alone tells it."""
    unlike = groups_of_equal_answers(count=48, size=1)
    alone = [loud._raw([(s.prompt_ids, s.response_ids)], 1).item() for s in unlike]
    scores = loud.scores(unlike)
    differences = [abs(s.value - a) for s, a in zip(scores, alone, strict=True)]  # type: ignore[operator]
    assert 0 < max(differences) < scores[0].noise < 0.1


def test_an_infinite_score_equals_nothing_else() -> None:
    """No public report known to us: it must not make a noise without bound of the others."""
    odd = [Score(1.0, noise=0.1), Score(float("inf"), noise=float("inf")), Score(9.0, noise=0.1)]
    known = Answered(Fixed([]))
    known.workers[0].known = [*odd, Score(error="x")]
    samples = [sample("", ids=[i]) for i in range(4)]
    rewards = Rewards(
        [RewardSettings(name="a", kind="function", function="m:f")],
        [known],
        1.0,
        4,  # type: ignore[list-item]
    )
    scores, _ = rewards.gather(rewards.submit(samples), samples)
    assert [s.value for s in scores] == [1.0, float("inf"), 9.0, None]


# --- what a reward model cannot read --------------------------------------------------------------


@pytest.fixture(scope="module")
def words_and_letters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An Actor whose tokens are words, and a reward model of 32 positions whose tokens are
    letters.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("readers")
    letters = save_reward_model(folder / "letters", positions=32, scale=1.0)
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "0123456789": 3, "7": 4}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder / "words")
    config = Qwen3Config(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        eos_token_id=2,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "words")
    return folder / "words", letters


def test_what_is_too_long_for_a_reward_model_has_no_score(
    words_and_letters: tuple[Path, Path],
) -> None:
    """huggingface/sentence-transformers#3302, huggingface/trl#1867: an assertion on the device,
    after which nothing can be computed.
    """
    words, letters = words_and_letters
    reader = worker(letters, words)
    short = sample("0123", prompt="12")
    long = sample("0123456789" * 4, prompt="12")
    scores = reader.scores([short, long, short])
    assert scores[1] == Score(error="44 tokens, the model has 32 positions")
    assert scores[0] == reader.scores([short])[0] and scores[0].value is not None
    fits = sample("0" * 28, prompt="12")  # with BOS and EOS 32
    assert reader.scores([fits])[0].error is None
    assert reader.scores([long]) == [scores[1]]


def test_ids_that_a_reward_model_does_not_know_have_no_score(tmp_path: Path) -> None:
    """huggingface/trl#1821: the Actor's ids on a reward model with a smaller vocabulary."""
    actor = save_reward_model(tmp_path / "actor", positions=64)
    reader = worker(save_reward_model(tmp_path / "small", 64, vocabulary=8), actor)
    scores = reader.scores([sample("", ids=[5]), sample("", ids=[5, 9])])
    assert scores[0].value is not None
    assert scores[1] == Score(error="token id 9, the model knows 8 ids")


def test_an_empty_response_is_no_end_of_the_step(
    loud: RewardWorker, words_and_letters: tuple[Path, Path]
) -> None:
    """No public report known to us."""
    nothing = Sample([], [], "", "", "length", {})
    answerless = Sample([1, 4], [], "2", "", "length", {})
    own = worker(words_and_letters[1], words_and_letters[0])
    assert own.scores([answerless])[0].value is not None
    empty, after = loud.scores([nothing, answerless])
    assert empty.error == "nothing to read: no token in prompt and response"
    assert after.value is not None
    assert loud.scores([nothing]) == [empty]


def run_data(
    folder: Path, actor: Path, reward_model: Path, prompt: str, *overrides: str
) -> RunData:
    rows = [{"prompt": text, "answer": "2"} for text in ("7", prompt)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipes()["grpo"]
    recipe["actor"]["model"]["path"] = str(actor)
    recipe["prompts"]["path"] = str(folder / "prompts.jsonl")
    recipe["rewards"] = [{"name": "rm", "kind": "model", "model": {"path": str(reward_model)}}]
    (folder / "grpo.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(folder / "grpo.yaml", overrides)
    assert isinstance(loaded, RLRecipe)
    return RunData.load(loaded)


def test_a_prompt_that_fills_a_reward_model_is_refused_with_its_row(
    words_and_letters: tuple[Path, Path], tmp_path: Path
) -> None:
    """huggingface/trl#1867: lengths are known before start, in the reward model's own tokens."""
    words, letters = words_and_letters
    with pytest.raises(UserError) as error:
        run_data(tmp_path, words, letters, "0123456789 " * 3 + "7")
    (line,) = error.value.problems
    assert line == (
        f"rewards.0.model: {letters} cannot read row 2 of prompts.path and an empty answer: "
        "36 tokens, the model has 32 positions"
    )


def test_a_reward_model_is_not_measured_in_the_actors_tokens(
    words_and_letters: tuple[Path, Path], tmp_path: Path
) -> None:
    """huggingface/trl#1867, the other side, and it was refused: ten words and 24 more are above 32,
    the letters are not.
    """
    words, letters = words_and_letters
    data = run_data(tmp_path, words, letters, "7" + " 7" * 9, "generation.max_new_tokens=24")
    assert len(data.prompts[1].ids) == 10


def test_short_prompts_are_not_tokenised_for_every_reward_model(
    words_and_letters: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No public report known to us: minutes before the start where there are many."""
    words, letters = words_and_letters
    tokenised: list[str] = []
    encode = reading.encode_prompt

    def counted(tokenizer: Any, text: str) -> list[int]:
        tokenised.append(text)
        return encode(tokenizer, text)

    monkeypatch.setattr(reading, "encode_prompt", counted)
    long = "7 " * 15  # with BOS and EOS as many as there are positions
    run_data(tmp_path, words, letters, long, "generation.max_new_tokens=24")
    assert tokenised == [long]


@pytest.mark.parametrize("rule", ["none", "NFKC", "replace", "prepend", "bert"])
def test_what_is_not_looked_at_can_be_read(words_and_letters: tuple[Path, Path], rule: str) -> None:
    """No public report known to us: rules that make texts longer, and letters of many bytes."""
    rules = {
        "NFKC": normalizers.NFKC(),
        "replace": normalizers.Replace("a", "bbbb"),
        "prepend": normalizers.Prepend("_"),
        "bert": normalizers.BertNormalizer(),
    }
    core = Tokenizer(models.BPE(byte_letters(), []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    if rule in rules:
        core.normalizer = rules[rule]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    reader = Reader(tokenizer, encoder=False, same_ids=False, positions=24, vocabulary=300)
    texts = [
        piece * times for piece in ("a", "\ufdfa", "長", "é ", "x\n") for times in range(1, 24)
    ]
    doubtful = reader.doubtful(texts)
    wrong = [i for i, text in enumerate(texts) if reader.read(sample("", prompt=text))[1]]
    assert wrong and set(wrong) <= set(doubtful) and len(doubtful) < len(texts)


def byte_letters() -> dict[str, int]:
    """A vocabulary of all bytes, as byte-level tokenizers write them, and an end."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"]
    return {letter: i for i, letter in enumerate(letters)}


def test_letters_that_a_reward_model_does_not_know_are_refused_with_their_row(
    words_and_letters: tuple[Path, Path], tmp_path: Path
) -> None:
    """huggingface/tokenizers#168 and #351: an exception where a vocabulary has no UNK."""
    _, letters = words_and_letters
    with pytest.raises(UserError) as error:
        run_data(tmp_path, letters, letters_only(tmp_path / "own", letters), "2+2=")
    (line,) = error.value.problems
    assert "cannot read row 2 of prompts.path and an empty answer: the tokenizer cannot" in line


def letters_only(folder: Path, model: Path) -> Path:
    """A copy of a reward model, whose tokenizer knows one word and nothing else."""
    shutil.copytree(model, folder)
    core = Tokenizer(WordLevel({"7": 0, "</s>": 1}))
    core.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(folder)
    return folder


def test_a_reward_model_that_has_no_end_of_a_response_is_refused_before_start(
    words_and_letters: tuple[Path, Path], tmp_path: Path
) -> None:
    """No public report known to us. It ended the first step."""
    words, _ = words_and_letters
    endless = save_reward_model(tmp_path / "endless", positions=32)
    file = endless / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token"}))
    with pytest.raises(UserError, match=r"rewards\.0\.model: .*endless has no EOS token"):
        run_data(tmp_path, words, endless, "7")


# --- calibrations ---------------------------------------------------------------------------------

CANNOT_BE_MEANT: list[tuple[dict[str, Any], str]] = [
    ({"score_std": 0}, "score_std must be a finite number above 0, not 0"),
    ({"score_std": -1.0}, "score_std must be a finite number above 0, not -1.0"),
    ({"score_std": float("nan")}, "score_std must be"),
    ({"score_std": float("inf")}, "score_std must be"),
    ({"score_std": "1.0"}, "not '1.0'"),
    ({"score_std": None}, "not null"),
    ({"score_std": True}, "not True"),
    ({"score_std": 1e-320}, "score_std must be"),
    ({"score_mean": float("-inf")}, "score_mean must be a finite number"),
    ({"score_mean": "high"}, "score_mean must be a finite number, not 'high'"),
    ({"score_mean": 10**400}, "score_mean must be"),
    ({"score_mean": 5.0, "score_std": 4e-7}, "is only the rounding of score_mean 5.0"),
]


@pytest.mark.parametrize(("written", "said"), CANNOT_BE_MEANT)
def test_a_calibration_that_cannot_be_meant_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: dict[str, Any], said: str
) -> None:
    """OpenRLHF/OpenRLHF#1343: scores that a reward model's mean and std make non-finite."""
    from transformers import Qwen3Config

    config = Qwen3Config(name_or_path="rm/folder", **written)
    with pytest.raises(UserError) as error:
        read_calibration(config)
    (line,) = error.value.problems
    assert line.startswith("rm/folder: config.json: score_") and said in line

    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "reward_model", REWARD_MODEL | written)
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(recipes()["ppo"]))
    with pytest.raises(RecipeError) as refusal:
        read_recipe(tmp_path / "ppo.yaml", files=True)
    lines = [one for one in refusal.value.problems if said in one]
    assert len(lines) == 2  # the reward model's, and the Critic's that starts from it
    assert all("./reward_model: config.json: score_" in one for one in lines)


@pytest.mark.parametrize(
    "written",
    [{}, {"score_mean": -3}, {"score_std": 2}, {"score_mean": 1000.0, "score_std": 0.01}],
)
def test_other_calibrations_are_read(written: dict[str, Any]) -> None:
    """OpenRLHF/OpenRLHF#1343, the other side."""
    from transformers import Qwen3Config

    mean, std = read_calibration(Qwen3Config(**written))
    assert (mean, std) == (written.get("score_mean", 0.0), written.get("score_std", 1.0))


def test_a_response_that_a_reward_models_tokenizer_cannot_encode_has_no_score() -> None:
    """huggingface/tokenizers#351: an exception for a word where a vocabulary has no UNK."""
    words = Tokenizer(WordLevel({"2+2=": 0, "4": 1, "</s>": 2}))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    reader = Reader(tokenizer, encoder=False, same_ids=False, positions=None, vocabulary=3)
    assert reader.read(sample("4")) == (([0], [1, 2]), "")
    ids, problem = reader.read(sample("four"))
    assert ids == ([], []) and "the tokenizer cannot encode it" in problem
