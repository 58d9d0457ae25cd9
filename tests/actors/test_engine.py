"""GenerationEngine on real vLLM: what comes out is what the model says, and nobody waits for
ever.
"""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from actors.engine.engine import GenerationEngine, in_loop
from actors.rollouts.requests import texts_of
from learners.checkpoints import load_causal_lm
from learners.data.conversation import Conversation
from learners.data.templates import ChatTemplate
from learners.experience import PromptRequest, Rollout
from learners.settings import ModelSettings
from tests.actors.tiny_models import EOS, THREADS, VOCAB, Served, logprobs, save_model, start_engine

pytestmark = pytest.mark.engines
PROBE = [1, *range(3, 40)]


def request(slot: int, temperature: float = 1.0, size: int = 4, tokens: int = 20) -> PromptRequest:
    seeds = tuple(range(100 * slot, 100 * slot + size))
    return PromptRequest(slot + 7, slot, [1, 5 + slot, 9], size, temperature, tokens, seeds)


def rollouts(served: Served, requests: list[PromptRequest]) -> list[Rollout]:
    """All samples, ordered by slot and sample."""
    groups = [group for groups in served.engine.generate(requests) for group in groups]
    return [rollout for group in sorted(groups, key=lambda g: g[0].slot) for rollout in group]


def assert_logprobs(served: Served, samples: list[Rollout], temperature: float) -> None:
    for sample in samples:
        expected = logprobs(served.model, sample.prompt_ids + sample.response_ids, temperature)
        torch.testing.assert_close(
            torch.tensor(sample.logprobs), expected[-len(sample.logprobs) :], atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_transformers_after_temperature(
    served: Served, temperature: float
) -> None:
    assert_logprobs(
        served, rollouts(served, [request(i, temperature) for i in range(4)]), temperature
    )


def by_vllms_own_front_end(engine: GenerationEngine, requests: list[PromptRequest]) -> list[Any]:
    """Outputs of the same samples, in the same order, and of a probe."""
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.FINAL_ONLY
    plain = partial(SamplingParams, flat_logprobs=True, detokenize=False, output_kind=kind)
    front = engine._engine
    for request in requests:
        for seed in request.seeds or ():
            stops = engine.stop_token_ids
            params = plain(
                seed=seed, max_tokens=request.max_new_tokens, stop_token_ids=stops, logprobs=0
            )
            front.add_request(
                f"{request.slot:03}{seed:03}", tokens_input(request.prompt_ids), params
            )
    outputs = []
    while front.has_unfinished_requests():
        outputs += front.step()
    front.add_request("probe", tokens_input(PROBE), plain(max_tokens=1, prompt_logprobs=0))
    return [*sorted(outputs, key=lambda output: output.request_id), *front.step()]


def test_what_is_gathered_is_what_vllms_own_front_end_makes_of_it(served: Served) -> None:
    """Bit by bit: ids, log-probs, ends, versions, and what a probe reads."""
    asked = [request(i) for i in range(4)]
    samples = rollouts(served, asked)
    *outputs, probed = in_loop(by_vllms_own_front_end)(served.engine, asked)
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for sample, output in zip(samples, outputs, strict=True):
        made = output.outputs[0]
        assert sample.response_ids == list(made.token_ids)
        assert sample.logprobs == made.logprobs.logprobs
        assert sample.finish_reason == made.finish_reason
        spans = made.weight_versions
        assert sample.weight_versions == (int(spans[0].version), int(spans[-1].version))
    assert served.engine.probe_logprobs(PROBE) == probed.prompt_logprobs.logprobs


@pytest.mark.parametrize("off_policy_sampling", [{"top_k": 5}, {"repetition_penalty": 1.3}])
def test_logprobs_of_distorted_sampling_are_those_it_really_sampled_with(
    served: Served, off_policy_sampling: dict[str, float]
) -> None:
    """What a correction needs: probabilities after truncation (renormalised) and after
    penalties.
    """
    for sample in rollouts(
        served, [replace(request(i), off_policy_sampling=off_policy_sampling) for i in range(2)]
    ):
        ids = sample.prompt_ids + sample.response_ids
        with torch.no_grad():
            logits = served.model(torch.tensor([ids])).logits[0]
        for t, (token, logprob) in enumerate(
            zip(sample.response_ids, sample.logprobs, strict=True)
        ):
            here = logits[len(sample.prompt_ids) + t - 1].clone()
            if "top_k" in off_policy_sampling:
                here[here < here.topk(5).values[-1]] = -torch.inf
            else:
                seen = torch.tensor(ids[: len(sample.prompt_ids) + t]).unique()
                here[seen] = torch.where(here[seen] > 0, here[seen] / 1.3, here[seen] * 1.3)
            assert logprob == pytest.approx(here.log_softmax(-1)[token].item(), abs=1e-4)


def test_groups_are_complete(served: Served) -> None:
    requests = [request(i, size=1 + i % 4) for i in range(16)]
    groups = [group for groups in served.engine.generate(requests) for group in groups]
    assert sorted(group[0].slot for group in groups) == list(range(16))
    samples = [sample for group in groups for sample in group]
    for group in groups:
        wanted = requests[group[0].slot]
        assert [s.sample_index for s in group] == list(range(wanted.group_size))
        assert {(s.prompt_index, s.slot) for s in group} == {(wanted.prompt_index, wanted.slot)}
        assert all(s.prompt_ids == wanted.prompt_ids and s.weight_versions == (0, 0) for s in group)
    for sample in samples:
        assert len(sample.response_ids) == len(sample.logprobs) <= 20
        assert all(0 <= i < VOCAB for i in sample.response_ids)
        assert EOS not in sample.response_ids[:-1]
        # the EOS stays, with a log-prob
        assert (sample.finish_reason == "stop") == (sample.response_ids[-1] == EOS)
    assert {s.finish_reason for s in samples} == {"stop", "length"}


def chat_tokenizer(turn_end: int, answer: int) -> Any:
    """A word for every id, two of them special: the end of the template's turns, and a mark."""
    names = {0: "<pad>", 1: "<bos>", EOS: "<eos>", turn_end: "<end>", answer: "<answer>"}
    words = {names.get(i, f"t{i}"): i for i in range(VOCAB)}
    core = Tokenizer(models.WordLevel(words, unk_token="t3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<end>", "<answer>"],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}<end>{% endif %}"
        "{% endfor %}"
    )
    return tokenizer


def test_a_response_ends_with_the_templates_turn(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that is not EOS: it stays the last id, as EOS does, and is not part of the text."""
    asked = [request(i, size=8) for i in range(4)]
    free = rollouts(served, asked)
    common = Counter(i for s in free for i in set(s.response_ids[:-1]) if i > EOS).most_common(2)
    turn_end, answer = (token for token, _ in common)
    template = ChatTemplate(chat_tokenizer(turn_end, answer))
    template.prompt(Conversation([{"role": "user", "content": "t5"}]))
    assert template.stops == [turn_end, EOS]
    monkeypatch.setattr(served.engine, "stop_token_ids", template.stops)
    samples = rollouts(served, asked)
    assert turn_end in {s.response_ids[-1] for s in samples if s.finish_reason == "stop"}
    for sample, before in zip(samples, free, strict=True):
        ids = before.response_ids
        end = ids.index(turn_end) + 1 if turn_end in ids else len(ids)
        assert sample.response_ids == ids[:end] and len(sample.logprobs) == end
        assert (sample.finish_reason == "stop") == (sample.response_ids[-1] in template.stops)
    texts = texts_of(samples, template.tokenizer)
    assert not any("<end>" in text or "<eos>" in text for text in texts)
    assert any("<answer>" in text for text in texts)
    for sample, text in zip(samples, texts, strict=True):
        said = sample.response_ids[: -1 if sample.finish_reason == "stop" else None]
        assert len(text.split()) == len([i for i in said if i])  # all words but <pad>


def test_the_same_seed_gives_the_same_sample_in_any_company(served: Served) -> None:
    together = rollouts(served, [request(i) for i in range(6)])
    alone = rollouts(served, [request(3)])
    assert [s.response_ids for s in alone] == [s.response_ids for s in together if s.slot == 3]
    assert len({tuple(s.response_ids) for s in alone}) == 4
    unseeded = [replace(request(3), seeds=None)]
    assert {tuple(s.response_ids) for s in rollouts(served, unseeded)} != {
        tuple(s.response_ids) for s in alone
    }


def test_without_seeds_an_engine_draws_from_its_own_seed_and_the_version(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(seed: int, version: int) -> list[list[int]]:
        monkeypatch.setattr(served.engine, "seed", seed)
        served.engine.accept(version)
        return [
            s.response_ids
            for s in rollouts(served, [replace(request(i), seeds=None) for i in range(3)])
        ]

    first = drawn(4, 1)
    assert drawn(4, 1) == first
    assert drawn(5, 1) != first and drawn(4, 2) != first


def test_greedy_takes_the_likeliest_token_and_reports_logprobs_at_temperature_1(
    served: Served,
) -> None:
    # in company of sampled requests: vLLM computes both kinds in one batch
    samples = rollouts(served, [request(0, temperature=0.0, size=2), request(1, temperature=0.5)])
    greedy = [s for s in samples if s.slot == 0]
    assert greedy[0].response_ids == greedy[1].response_ids
    ids = greedy[0].prompt_ids + greedy[0].response_ids
    with torch.no_grad():
        likeliest = served.model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    assert likeliest[2:-1] == greedy[0].response_ids
    assert_logprobs(served, greedy, 1.0)


def test_calls_from_several_threads_do_not_mix(served: Served) -> None:
    def ids(slot: int) -> list[list[int]]:
        return [s.response_ids for s in rollouts(served, [request(slot)])]

    alone = [ids(i) for i in range(4)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ids, range(4))) == alone


def test_the_loop_computes_with_the_threads_it_was_given(served: Served) -> None:
    assert served.engine.status() == {
        "version": 0,
        "stale": False,
        "running": 0,
        "threads": THREADS,
    }


def test_a_prompt_that_does_not_fit_is_refused_and_nothing_of_its_call_runs(served: Served) -> None:
    too_long = replace(request(1), prompt_ids=[1] * 500)
    with pytest.raises(ValueError, match="500 tokens leave no room"):
        next(served.engine.generate([request(0), too_long]))
    assert served.engine.status()["running"] == 0


def test_closing_the_generator_aborts_what_is_unfinished(served: Served) -> None:
    short = request(0, size=1, tokens=1)
    long = request(1, size=4, tokens=150)
    stream = served.engine.generate([short, long])
    assert [group[0].slot for group in next(stream)] == [0]
    assert served.engine.status()["running"] > 0
    stream.close()
    assert served.engine.status()["running"] == 0


def test_when_the_loop_dies_everyone_who_waits_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, seed=0, tied=True)
    engine = start_engine(tmp_path)
    release = threading.Event()

    def failing_step() -> None:
        release.wait(20)
        raise MemoryError("no more memory")

    monkeypatch.setattr(engine._engine.engine_core, "get_output", failing_step)
    with ThreadPoolExecutor(3) as threads:
        waiting = [
            threads.submit(lambda i=i: list(engine.generate([request(i)]))) for i in range(2)
        ]
        waiting.append(threads.submit(engine.probe_logprobs, [1, 3, 4]))
        release.set()
        for one in waiting:
            with pytest.raises(RuntimeError, match="no more memory"):
                one.result(20)
    with pytest.raises(RuntimeError, match="no more memory"):
        engine.status()
    engine.close()


def test_an_engine_that_cannot_start_raises(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="config"):
        start_engine(tmp_path)


def test_the_engine_caps_attention_as_the_actor_does(tmp_path: Path) -> None:
    """Gemma-2 with the kernel that auto chooses, and with the one that drops its cap."""
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        sliding_window=16,
        attn_logit_softcapping=2.0,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config)
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, VOCAB, (1, 40)).tolist()[0]
    engine = start_engine(tmp_path)
    try:
        seen = torch.tensor(engine.probe_logprobs(ids))
    finally:
        engine.close()
    actor = load_causal_lm(ModelSettings(path=str(tmp_path)))
    torch.testing.assert_close(logprobs(actor, ids), seen, rtol=0, atol=1e-4)
    model.set_attn_implementation("sdpa")
    assert (logprobs(model.eval(), ids) - seen).abs().max() > 0.05
