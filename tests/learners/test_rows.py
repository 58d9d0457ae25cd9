import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from learners.data.reading import read
from learners.data.rows import load_pairs, load_prompts, load_sft
from learners.data.tokenise import encode_prompt, encode_response
from learners.errors import DataError
from learners.settings import PairData, PromptData, SFTData

SPECIAL = ["<pad>", "<eos>", "<bos>", "[CLS]", "[SEP]"]
PAD, EOS, BOS, CLS, SEP = range(5)
A = len(SPECIAL)  # the id of "a"; the other letters follow
TEMPLATE = (
    "{% for m in messages %}{% if m.name %}{{ 'n' }}{% endif %}{{ m.content }}z{% endfor %}"
    "{% if add_generation_prompt %}y{% endif %}"
)


def make_tokenizer(around="$A", template=None, **special):
    """One token per letter; `around` says which special tokens the tokenizer adds."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *"abcdefghijklmnopqrstuvwxyz"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="z"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.post_processor = processors.TemplateProcessing(
        around, special_tokens=[(t, i) for i, t in enumerate(SPECIAL)]
    )
    special = special or {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def plain():
    return make_tokenizer(template=TEMPLATE)


@pytest.fixture(scope="module")
def bert():
    return make_tokenizer("[CLS] $A [SEP]", pad_token="<pad>", cls_token="[CLS]", sep_token="[SEP]")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keep what `datasets` caches out of the home folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def read_rows(data):
    return [row.values for row in read(data)]


def ids(text):
    return [A + ord(letter) - ord("a") for letter in text]


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


# --- tokenising -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("around", "text", "expected"),
    [
        ("$A", "ab", ids("ab")),
        ("<bos> $A", "ab", [BOS, *ids("ab")]),
        ("<bos> $A", "<bos>ab", [BOS, *ids("ab")]),  # never a double BOS
        ("<bos> $A <eos>", "ab", [BOS, *ids("ab")]),  # never an EOS before the response
        ("$A <eos>", "ab", ids("ab")),
        ("$A <eos>", "ab<eos>", [*ids("ab"), EOS]),  # written by the user: meant
        ("$A", "aab", ids("aab")),
        ("[CLS] $A [SEP]", "ab", [CLS, *ids("ab")]),
    ],
)
def test_prompts_keep_leading_special_tokens_only(around, text, expected):
    assert encode_prompt(make_tokenizer(around), text) == expected


@pytest.mark.parametrize("around", ["$A", "<bos> $A", "<bos> $A <eos>"])
def test_responses_end_with_exactly_one_eos(around):
    tokenizer = make_tokenizer(around)
    assert encode_response(tokenizer, "ab") == [*ids("ab"), EOS]
    assert encode_response(tokenizer, "ab<eos>") == [*ids("ab"), EOS]
    assert encode_response(tokenizer, "") == [EOS]


def test_an_encoder_reads_one_sequence_between_cls_and_sep(bert):
    assert encode_prompt(bert, "ab") == [CLS, *ids("ab")]
    assert encode_response(bert, "cd", encoder=True) == [*ids("cd"), SEP]


def test_a_tokenizer_without_eos_is_refused(bert):
    with pytest.raises(DataError, match="no EOS token"):
        encode_response(bert, "ab")


# --- prompts --------------------------------------------------------------------------------------


def test_text_prompts(plain, write):
    path = write(
        {"prompt": "ab", "answer": "3", "other": 1}, {"prompt": "c", "answer": None, "other": 2}
    )
    prompts = load_prompts(PromptData(path=path, answer_columns=("answer",)), plain)
    assert [(p.index, p.ids, p.text, p.columns) for p in prompts] == [
        (0, ids("ab"), "ab", {"answer": "3"}),
        (1, ids("c"), "c", {"answer": None}),
    ]
    assert not prompts.dropped


def test_chat_prompts_are_what_the_template_renders(plain, write):
    path = write(
        {
            "prompt": [
                {"role": "system", "content": "a"},
                {"role": "user", "content": "b", "name": "n"},
            ]
        },
        {"prompt": [{"role": "user", "content": "c"}]},
    )
    prompts = load_prompts(PromptData(path=path), plain)
    assert [p.text for p in prompts] == ["aznbzy", "czy"]
    assert [p.ids for p in prompts] == [ids("aznbzy"), ids("czy")]
    rendered = plain.apply_chat_template(
        [{"role": "user", "content": "c"}], add_generation_prompt=True
    )
    assert rendered["input_ids"] == prompts[1].ids


def test_what_is_not_read_and_not_rendered_is_noticed(plain, write):
    path = write({"prompt": "a", "answer": "1", "x": 1, "y": 2}, {"prompt": "b", "answer": None})
    assert load_prompts(PromptData(path=path, answer_columns=("answer",)), plain).notices == [
        f"{path}: columns not read: x, y",
        f"{path}: all rows are text that is read as it stands, although the tokenizer has a chat "
        "template; apply_template: true renders it as turns",
        f"{path}: 1 of 2 rows hold null in answer columns: 'answer'; row 2 (answer)",
    ]


def test_a_template_decides_about_bos_itself(write):
    path = write({"prompt": [{"role": "user", "content": "a"}]})
    for template, expected in [(TEMPLATE, ids("azy")), ("<bos>" + TEMPLATE, [BOS, *ids("azy")])]:
        tokenizer = make_tokenizer("<bos> $A", template=template)
        assert load_prompts(PromptData(path=path), tokenizer)[0].ids == expected


def test_chat_without_a_template_is_refused(write, bert):
    path = write({"prompt": [{"role": "user", "content": "a"}]})
    with pytest.raises(DataError) as error:
        load_prompts(PromptData(path=path), bert)
    assert "row 1" in one_line(error) and "no chat template" in one_line(error)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "the prompt is empty"),
        (None, "must be text, or a list of messages"),
        ([], "must be text, or a list of messages"),
        ([{"text": "a"}], "must be text, or a list of messages"),
    ],
)
def test_bad_prompts_are_named(plain, write, value, problem):
    path = write(
        {"prompt": [{"role": "user", "content": "a"}] if isinstance(value, list) else "a"},
        {"prompt": value},
    )
    with pytest.raises(DataError) as error:
        load_prompts(PromptData(path=path), plain)
    assert one_line(error).startswith(f"{path}: row 2: ") and problem in one_line(error)


def test_long_prompts_are_refused_or_dropped(plain, write):
    path = write({"prompt": "ab"}, {"prompt": "abc"}, {"prompt": "cd"})
    with pytest.raises(DataError) as error:
        load_prompts(PromptData(path=path, max_prompt_tokens=2, long_prompts="refuse"), plain)
    assert "row 2" in one_line(error) and "3 tokens" in one_line(error)
    data = PromptData(path=path, max_prompt_tokens=2, max_dropped=0.4)
    prompts = load_prompts(data, plain)
    assert [p.index for p in prompts] == [0, 2] and prompts.dropped == {"too long": 1}
    with pytest.raises(DataError, match=r"1 of 3 prompts .* max_prompt_tokens 2; at most 5% may"):
        load_prompts(PromptData(path=path, max_prompt_tokens=2), plain)
    with pytest.raises(DataError, match="no row can be used: 3 too long"):
        load_prompts(PromptData(path=path, max_prompt_tokens=1), plain)


# --- SFT examples and pairs -----------------------------------------------------------------------


def test_sft_examples(plain, write):
    path = write({"q": "ab", "a": "cd"}, {"q": "ab", "a": "cdefg"})
    data = SFTData(path=path, columns={"prompt": "q", "response": "a"}, max_tokens=5)
    examples = load_sft(data, plain)
    assert [(e.prompt_ids, e.response_ids) for e in examples] == [(ids("ab"), [*ids("cd"), EOS])]
    assert examples.dropped == {"too long": 1}


@pytest.mark.parametrize(
    ("value", "problem"),
    [("", "response is empty"), (None, "must be text, or a list of messages, not null or missing")],
)
def test_empty_answers_are_refused(plain, write, value, problem):
    path = write({"prompt": "a", "response": "b"}, {"prompt": "a", "response": value})
    with pytest.raises(DataError) as error:
        load_sft(SFTData(path=path), plain)
    assert "row 2" in one_line(error) and problem in one_line(error)


def test_pairs(plain, write):
    path = write(
        {"prompt": "a", "chosen": "b", "rejected": "c", "m": 2},
        {"prompt": "a", "chosen": "b", "rejected": "b", "m": 1},
        {"prompt": "a", "chosen": "b", "rejected": "cdefg", "m": 1},
        {"prompt": "a", "chosen": "b", "rejected": "", "m": 1},
    )
    pairs = load_pairs(
        PairData(path=path, columns={"margin": "m"}, max_tokens=4), plain, encoder=False
    )
    assert [tuple(p.compared.values()) for p in pairs] == [
        (ids("a"), [*ids("b"), EOS], [*ids("c"), EOS], 2.0),
        (ids("a"), [*ids("b"), EOS], [EOS], 1.0),
    ]
    assert pairs.dropped == {"equal answers": 1, "too long": 1}
    assert load_pairs(PairData(path=path, limit=1), plain, encoder=False)[0].margin == 0.0


def test_pairs_for_an_encoder(bert, write):
    path = write({"prompt": "a", "chosen": "b", "rejected": "c"})
    pair = load_pairs(PairData(path=path), bert, encoder=True)[0]
    assert tuple(pair.compared.values()) == (
        [CLS, *ids("a")],
        [*ids("b"), SEP],
        [*ids("c"), SEP],
        0.0,
    )


@pytest.mark.parametrize(("column", "value"), [("chosen", None), ("rejected", None), ("m", None)])
def test_bad_pairs_are_named(plain, write, column, value):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "m": 1.5}
    path = write(row, {**row, column: value})
    with pytest.raises(DataError) as error:
        load_pairs(PairData(path=path, columns={"margin": "m"}), plain, encoder=False)
    assert f"row 2: {column} must be" in one_line(error)


# --- reading --------------------------------------------------------------------------------------


def test_a_file_is_whatever_split_is_asked_for(write):
    path = write({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    for split, count in [("train", 3), ("test", 3), ("train[:2]", 2)]:
        assert len(read_rows(PromptData(path=path, split=split))) == count
    assert len(read_rows(PromptData(path=path, limit=2))) == 2
    assert len(read_rows(PromptData(path=path, limit=9))) == 3


def test_parquet_and_folders(write, tmp_path):
    from datasets import Dataset

    Dataset.from_list([{"prompt": "p"}]).to_parquet(tmp_path / "rows.parquet")
    assert read_rows(PromptData(path=str(tmp_path / "rows.parquet"))) == [{"prompt": "p"}]
    write({"prompt": "a"}, name="folder/train.jsonl")
    write({"prompt": "b"}, name="folder/test.jsonl")
    for split, expected in [("train", ["a"]), ("test", ["b"])]:
        rows = read_rows(PromptData(path=str(tmp_path / "folder"), split=split))
        assert [row["prompt"] for row in rows] == expected
    with pytest.raises(DataError, match="split validation"):
        read_rows(PromptData(path=str(tmp_path / "folder"), split="validation"))


def test_a_tilde_is_the_home_folder(write, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(write({"prompt": "a"})).parent))
    assert read_rows(PromptData(path="~/rows.jsonl")) == [{"prompt": "a"}]


def test_changed_files_are_read_again(write):
    assert read_rows(PromptData(path=write({"prompt": "a"}))) == [{"prompt": "a"}]
    assert read_rows(PromptData(path=write({"prompt": "b"}))) == [{"prompt": "b"}]


def test_dates_stay_the_text_they_are(plain, write):
    path = write(
        {"prompt": "a", "answer": "2024-01-01"}, {"prompt": "b", "answer": "2024-01-02 10:00:00"}
    )
    prompts = load_prompts(PromptData(path=path, answer_columns=("answer",)), plain)
    assert [p.columns["answer"] for p in prompts] == ["2024-01-01", "2024-01-02 10:00:00"]


def test_missing_columns_are_named(plain, write):
    path = write({"question": "a", "answer": "b"})
    with pytest.raises(DataError) as error:
        load_prompts(PromptData(path=path, answer_columns=("answer",)), plain)
    assert one_line(error) == (
        f"{path}: it has the columns ['question', 'answer'], and is read by prompt (or messages): "
        "name others, perhaps `columns: {prompt: question}`"
    )


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("absent.jsonl", None, "no such file or folder"),
        ("some/where/absent", None, "no such file or folder"),
        ("rows.txt", "prompt\na\n", "must be one of"),
        ("folder/readme.txt", "", r"holds no .jsonl, .json, .*\.parquet.* files"),
        ("broken.jsonl", '{"prompt": "a"}\n{"prompt": \n', "broken.jsonl:2: not a line of JSON"),
        ("broken.parquet", "PAR", "not a parquet file"),
        ("empty.jsonl", "", "the file is empty"),
        ("x" * 300, None, "no such file or folder"),
    ],
)
def test_unreadable_data_is_one_line(tmp_path, name, content, problem):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    target = path.parent if name.startswith("folder/") else path
    with pytest.raises(DataError, match=problem) as error:
        read_rows(PromptData(path=str(target)))
    assert str(target) in one_line(error)


USER = {"role": "user", "content": "q"}
BOT = {"role": "assistant", "content": "a"}
CHAT = {"messages": [USER, BOT]}
TOOLS = [{"name": "f"}]
EITHER = {"chosen": [USER, BOT], "rejected": [USER, {**BOT, "content": "b"}]}


@pytest.mark.parametrize(
    ("load", "kind", "row", "late"),
    [
        (load_sft, SFTData, CHAT, {"tools": TOOLS}),
        (load_sft, SFTData, CHAT, {"chat_template_kwargs": {"x": 1}}),
        (load_pairs, PairData, EITHER, {"prompt": "other"}),
        (load_prompts, PromptData, {"messages": [USER]}, {"prompt": [USER]}),
    ],
)
def test_a_column_that_would_be_read_comes_too_late(
    plain, write, monkeypatch, load, kind, row, late
):
    monkeypatch.setattr("learners.data.reading.LOOKED_AT", 3)

    def loaded(*rows, **keys):
        data = kind(path=write(*rows), **keys)
        return load(data, plain, **({"encoder": False} if kind is PairData else {}))

    first = [row] * 3
    with pytest.raises(DataError) as error:
        loaded(*first, {**row, **late})
    column = next(iter(late))
    assert one_line(error).endswith(
        f"rows.jsonl: row 4: {column} is a column that none of the first rows has: "
        "write it in the first row too, null if it is empty there"
    )
    null = {column: None}
    other = {**row, "id": 1}
    assert loaded(*first, {**row, **late}, limit=3).parts[0].size == 3
    assert loaded(*first, {**row, **null}, other).parts[0].size == 5
    if "tools" in late:
        assert loaded(*first, {**row, **late}, columns={"tools": ""}).parts[0].size == 4
