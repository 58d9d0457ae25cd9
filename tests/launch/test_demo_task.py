"""The demo's task (answers, data, tokenizer, model, reward) and its page."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import pytest

from launch.demo.page import read_curve, write_page
from launch.tasks import unique_digits as task


@pytest.mark.parametrize(
    ("prompt", "right", "slipped"),
    [
        ("uniq:800299=", "0289", "002899"),
        ("uniq:1111=", "1", "1111"),
        ("uniq:4321=", "1234", "1234"),
    ],
)
def test_answers(prompt: str, right: str, slipped: str) -> None:
    assert task.answer(prompt) == right
    assert task.slip(prompt) == slipped


def test_edits_by_hand() -> None:
    class Always(random.Random):
        def randrange(self, *_: object) -> int:  # type: ignore[override]
            return 1

        def choice(self, options: str) -> str:  # type: ignore[override]
            return options[7]

    edited = [edit("0289", Always()) for edit in task.EDITS]
    assert edited == ["0789", "0829", "089", "02289", "0"]
    assert sum(task.EDITS.values()) == pytest.approx(1)


@pytest.mark.parametrize("text", ["7", "02", "0123456789"])
def test_a_corruption_is_never_the_answer(text: str) -> None:
    rng = random.Random(0)
    assert all(task.corrupt(text, rng) != text for _ in range(300))


def test_splits_share_no_prompt_and_rows_depend_on_the_seed_alone() -> None:
    splits = {s: task.make_prompts(400, 7, s) for s in get_args(task.Split)}
    seen = {s: {r["prompt"] for r in rows} for s, rows in splits.items()}
    assert not (
        seen["train"] & seen["validation"]
        | seen["train"] & seen["test"]
        | seen["validation"] & seen["test"]
    )
    assert all(len(rows) == 400 for rows in splits.values())
    assert all(re.fullmatch(r"uniq:[0-9]{4,10}=", p) for prompts in seen.values() for p in prompts)
    assert splits["train"] == task.make_prompts(400, 7, "train")
    assert splits["train"] != task.make_prompts(400, 8, "train")
    # fixed for ever
    assert task.split_of("uniq:800299=") == "test" and task.split_of("uniq:1234=") == "train"


def test_demonstrations_are_partly_right() -> None:
    rows = task.make_demonstrations(4000, 0)
    slipped = [r["response"] == task.slip(r["prompt"]) for r in rows]
    right = [r["response"] == task.answer(r["prompt"]) for r in rows]
    ambiguous = [task.slip(r["prompt"]) == task.answer(r["prompt"]) for r in rows]
    clear = len(rows) - sum(ambiguous)  # duplicates present: the slip is a mistake
    assert sum(
        s and not a for s, a in zip(slipped, ambiguous, strict=True)
    ) / clear == pytest.approx(0.45, abs=0.04)
    assert sum(r and not a for r, a in zip(right, ambiguous, strict=True)) / clear == pytest.approx(
        0.45, abs=0.03
    )
    assert {task.split_of(r["prompt"]) for r in rows} == {"train"}
    assert rows == task.make_demonstrations(4000, 0)


def test_pairs_prefer_the_right_answer_over_a_sampled_or_corrupted_one() -> None:
    prompts = ["uniq:800299="] * 400
    rows = task.make_pairs(prompts, [["0289", "wrong"]] * 400, seed=0)
    assert all(r["chosen"] == "0289" and r["rejected"] != "0289" for r in rows)
    assert sum(r["rejected"] == "wrong" for r in rows) / 400 == pytest.approx(0.5, abs=0.08)
    assert all(r["rejected"] != "0289" for r in task.make_pairs(prompts, [["0289"]] * 400, seed=0))


def test_measured_pairs_use_only_what_the_model_got_wrong() -> None:
    rows = task.make_sampled_pairs(
        ["uniq:800299=", "uniq:4321=", "uniq:1111="], [["0289"], ["1234", "12"], ["", "11"]]
    )
    assert rows == [
        {"prompt": "uniq:4321=", "chosen": "1234", "rejected": "12"},
        {"prompt": "uniq:1111=", "chosen": "1", "rejected": ""},
    ]


def test_the_reward_wants_the_answer_and_its_end() -> None:
    scores = task.exact_match(
        ["uniq:800299="] * 4,
        ["0289", "0289", "0288", ""],
        ["stop", "length", "stop", "stop"],
        answer=["0289"] * 4,
    )
    assert scores == [1.0, 0.0, 0.0, 0.0]


def test_rows_are_json_lines(tmp_path: Path) -> None:
    rows = task.make_prompts(3, 0, "test")
    task.write_rows(tmp_path / "data" / "prompts.jsonl", rows)
    assert [
        json.loads(x) for x in (tmp_path / "data" / "prompts.jsonl").read_text().splitlines()
    ] == rows


def test_tokenizer_is_one_token_per_character(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    task.make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 52
    ids = tokenizer("uniq:80=")["input_ids"]
    assert ids == [1] + [3 + task.CHARACTERS.index(c) for c in "uniq:80="]
    assert tokenizer("0289", add_special_tokens=False)["input_ids"] == [3, 5, 11, 12]
    assert tokenizer.decode([3, 5, 11, 12, 2], skip_special_tokens=True) == "0289"
    text = task.CHARACTERS + " , ." + task.CHARACTERS[::-1]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_model_has_the_promised_size_and_depends_on_the_seed(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    before = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        task.make_model(tmp_path / name, seed)
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "abc")
    assert a.num_parameters() == 597_568
    assert {p.dtype for p in a.parameters()} == {torch.float32}
    assert a.lm_head.weight is a.model.embed_tokens.weight
    assert (a.config.pad_token_id, a.config.bos_token_id, a.config.eos_token_id) == (0, 1, 2)
    assert (a.generation_config.pad_token_id, a.generation_config.eos_token_id) == (0, 2)
    assert torch.equal(a.lm_head.weight, b.lm_head.weight) and not torch.equal(
        a.lm_head.weight, c.lm_head.weight
    )


def test_nothing_heavy_is_imported() -> None:
    heavy = "{'torch', 'transformers', 'ray', 'vllm', 'datasets', 'deepspeed'} & set(sys.modules)"
    code = f"import sys, launch.demo.page, launch.tasks.unique_digits; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def metrics_file(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_a_curve_is_read_from_the_metrics(tmp_path: Path) -> None:
    file = metrics_file(
        tmp_path / "metrics.jsonl",
        [
            {"step": 0, "score/mean": 0.5},
            {"step": 1, "loss": 2.0},
            {"step": 2, "score/mean": None},
            {"step": 3, "score/mean": 0.7},
            {"step": 3, "score/mean": 0.75},
        ],
    )
    assert read_curve(file, "score/mean") == [(0, 0.5), (3, 0.75)]
    assert read_curve(file, "absent") == []


def test_the_page_stands_alone_and_shows_table_and_curves(tmp_path: Path) -> None:
    accuracy = "evaluation/accuracy_sampled"
    ppo = metrics_file(
        tmp_path / "ppo.jsonl",
        [{"step": s, accuracy: a, "kl/sequence": 0.0} for s, a in ((0, 0.4), (5, 0.8), (25, 0.94))],
    )
    grpo = metrics_file(tmp_path / "grpo.jsonl", [{"step": 1, accuracy: 0.9}])
    table = [("phase", "sampled"), ("SFT", "0.441"), ("PPO <&>", "")]
    write_page(tmp_path / "page.html", table, {"ppo": ppo, "grpo": grpo}, note="two cores")
    page = (tmp_path / "page.html").read_text()
    for foreign in ("http:", "https:", "src=", "href=", "@import", "url("):
        assert foreign not in page
    assert (
        "0.441" in page
        and "PPO &lt;&amp;&gt;" in page
        and "two cores" in page
        and "nan" not in page
    )
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(figures) == 2  # metrics that no run has get no chart
    lines = [line for line in ElementTree.fromstring(figures[0]).iter("polyline")]
    points = [tuple(map(float, p.split(","))) for p in lines[0].attrib["points"].split()]
    assert len(lines) == 2 and len(points) == 3 and points == sorted(points)  # steps go right
    assert [y for _, y in points] == sorted((y for _, y in points), reverse=True)  # more is higher
    assert len(list(ElementTree.fromstring(figures[1]).iter("polyline"))) == 1
