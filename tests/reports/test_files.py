"""Reports of data read as somebody else's idea of them: patterns for names, guesses for folders,
caches for files, tokens for text. Each case names where it was met.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from learners.data.rows import load_pairs, load_prompts, load_sft
from learners.errors import DataError, UserError
from learners.settings import PairData, PromptData, SFTData

LETTERS = [chr(i) for i in range(32, 127)]
CHAT = [{"role": "user", "content": "a"}]


def tokenizer_of(
    model: Any = models.WordLevel, added: tuple[str, ...] = (), **special: str
) -> PreTrainedTokenizerFast:
    """One token per letter of ASCII; `<eos>` ends, and `unk_token` is what others become."""
    special = {"eos_token": "<eos>"} | special
    vocabulary = {token: i for i, token in enumerate([*special.values(), *LETTERS])}
    named = {"unk_token": special["unk_token"]} if "unk_token" in special else {}
    more = {"merges": []} if model is models.BPE else {}
    core = Tokenizer(model(vocabulary, **named, **more))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    return tokenizer


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    return tokenizer_of()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in; what `datasets` caches stays out of the home folder."""
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def write(name: str, *texts: str, raw: bytes | None = None) -> str:
    """Write rows with these prompts, or bytes."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
    Path(name).write_bytes(lines.encode() if raw is None else raw)
    return name


@pytest.fixture
def texts(letters: PreTrainedTokenizerFast) -> Callable[..., list[str]]:
    """Return the prompts that a path gives, as a run would read them."""

    def texts(path: str, **options: Any) -> list[str]:
        return [p.text for p in load_prompts(PromptData(path=path, **options), letters)]

    return texts


@pytest.fixture
def refusal(texts: Callable[..., list[str]]) -> Callable[..., str]:
    """Return the one line that refuses a path."""

    def refusal(path: str, **options: Any) -> str:
        with pytest.raises(DataError) as error:
            texts(path, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    return refusal


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("what?.jsonl", "whatX.jsonl"),
        ("lr[1e-6]/p.jsonl", "lr1/p.jsonl"),  # was: StopIteration
        ("*.jsonl", "other.jsonl"),
        ("**/p.jsonl", "deep/er/p.jsonl"),
        ("[a-c].jsonl", "b.jsonl"),
        ("{a,b}.jsonl", "a.jsonl"),
        ("hf:/datasets/p.jsonl", "p.jsonl"),
        ("file:/p.jsonl", "p.jsonl"),
        ("zip:/p.jsonl::q.jsonl", "q.jsonl"),
        ("über 100%#1 $HOME.jsonl", "uber.jsonl"),
        (".hidden/p.jsonl", "p.jsonl"),  # huggingface/datasets#6073
    ],
)
def test_a_name_is_no_pattern(texts: Callable[..., list[str]], name: str, beside: str) -> None:
    """huggingface/datasets#7468: a folder called [D_DATA] is searched for as a pattern."""
    write(beside, "another file")
    assert texts(write(name, "this file")) == ["this file"]


def test_a_folder_is_no_pattern_either(texts: Callable[..., list[str]]) -> None:
    """huggingface/datasets#7468 again, with the folder as the path."""
    write("lr1/a.jsonl", "another file")
    write("lr[1]/b.jsonl", "this file")
    assert texts("lr[1]") == ["this file"]


def test_the_folder_for_temporary_files_is_no_pattern(
    texts: Callable[..., list[str]], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No public report known to us; huggingface/datasets#7468 would meet it there too."""
    (here / "t[1]*").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(here / "t[1]*"))
    assert texts(write("p.jsonl", "a")) == ["a"]
    assert not list((here / "t[1]*").iterdir())


def test_the_check_reads_the_files_that_the_run_reads(here: Path) -> None:
    """The quick check took the first *.jsonl of a folder, whichever split that was. No public
    report known to us.
    """
    from launch.recipe.machine import _data_file

    write("set/test.jsonl", raw=b'{"question": "other columns"}\n')
    write("set/train/1.jsonl", "a")
    write("set/train/2.jsonl", raw=b'{"promt": "b"}\n')
    (problem,) = _data_file("prompts", PromptData(path="set"))
    assert "set/train/2.jsonl" in problem.message and "{prompt: promt}" in problem.message
    write("set/train/2.jsonl", "b")
    assert not list(_data_file("prompts", PromptData(path="set")))
    write("set/extra.jsonl", "c")
    (problem,) = _data_file("prompts", PromptData(path="set"))
    assert problem.keys == ("prompts.path",) and "extra.jsonl" in problem.message


# --- folders --------------------------------------------------------------------------------------


def test_a_file_beside_those_of_splits_is_not_dropped(refusal: Callable[..., str]) -> None:
    """huggingface/datasets#7201: with train.png in the folder all other images are dropped;
    huggingface/datasets#5021: so they are by any file with "train" or "test" in its name.
    """
    write("set/train.jsonl", "a")
    write("set/extra.jsonl", "b")
    said = refusal("set")
    assert said.startswith("set: train.jsonl: named after a split; extra.jsonl: not.")
    assert "Name the file to read as the path" in said


def test_files_of_a_split_are_read_and_the_others_named(
    letters: PreTrainedTokenizerFast, texts: Callable[..., list[str]]
) -> None:
    """huggingface/datasets#4895 and #7343: which files became which split is anybody's guess."""
    for name in ("train-2", "train-1", "test", "dev/b", "dev/a", ".train-3"):
        write(f"set/{name}.jsonl", name)
    write("set/README.md", raw=b"# Ours")
    write("set/train-1.jsonl.md5", raw=b"0")
    write("set/train-4.jsonl.tmp", "half")
    rows = load_prompts(PromptData(path="set"), letters)
    assert [p.text for p in rows] == ["train-1", "train-2"]
    assert rows.notices == [
        "set: read train-1.jsonl, train-2.jsonl; not read: dev/a.jsonl, dev/b.jsonl, test.jsonl"
    ]
    assert texts("set", split="validation") == ["dev/a", "dev/b"]
    assert texts("set", split="train[:1]+test") == ["train-1", "test"]


def test_files_that_name_no_split_are_all_read_in_order(
    letters: PreTrainedTokenizerFast, refusal: Callable[..., str]
) -> None:
    """huggingface/datasets#4150: splits are seen in some names and not in others. Words inside
    words (latest, retrain) and numbers are no splits.
    """
    for name in ("part-10", "part-02", "latest/x", "retrained"):
        write(f"set/{name}.jsonl", name)
    rows = load_prompts(PromptData(path="set"), letters)
    assert [p.text for p in rows] == ["latest/x", "part-02", "part-10", "retrained"]
    assert "not read" not in rows.notices[0]
    assert "no file is of split test; it holds train: latest/x" in refusal("set", split="test")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("train.jsonl", "train.json"), "different formats (.json, .jsonl)"),
        (("a.jsonl", "b.csv"), "different formats (.csv, .jsonl)"),
        (("a.jsonl", "a.jsonl.gz"), "different formats (.jsonl, .jsonl.gz)"),
        (("test/train.jsonl", "test/b.jsonl"), "names of the splits test, train"),
        (("train.orc", "test.jsonl"), "train.orc must be one of .jsonl, .json, .csv"),
    ],
)
def test_what_would_be_a_guess_is_refused(
    refusal: Callable[..., str], names: tuple[str, ...], said: str
) -> None:
    """huggingface/datasets#6315: a file of another format beside the rows is read as rows."""
    for name in names:
        write(f"set/{name}", "a")
    assert said in refusal("set")


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("data/train-00000-of-00002.parquet", {"train"}),
        ("data/test_sft-00000-of-00002-0a1b.parquet", {"test_sft"}),
        ("part-00000-of-00002.parquet", set()),
        ("my Training (1).jsonl", {"train"}),
        ("val.en.jsonl", {"validation"}),
        ("math/eval/x.jsonl", {"test"}),
        ("contest-trainer.jsonl", set()),
    ],
)
def test_splits_are_named_by_whole_words(name: str, splits: set[str]) -> None:
    """huggingface/datasets#5021: "train" anywhere in a name made it a split once; and its shards
    (#4150) carry names of their own.
    """
    from learners.data.files import named_splits

    assert named_splits(name) == splits


def test_linked_folders_are_read_and_circles_end(texts: Callable[..., list[str]]) -> None:
    """No public report known to us: subfolders that are links were dropped without a word."""
    write("elsewhere/b.jsonl", "b")
    write("set/a.jsonl", "a")
    os.symlink("../elsewhere", "set/linked")
    os.symlink("../elsewhere", "set/twice")
    os.symlink(".", "set/circle")
    os.symlink("../set", "elsewhere/back")
    assert texts("set/") == ["a", "b", "b"]


def test_a_folder_with_a_dataset_card_is_read_by_it(
    letters: PreTrainedTokenizerFast,
) -> None:
    """huggingface/datasets#7468 with a card: its patterns are meant, the folder's name is none."""
    card = "---\nconfigs:\n- config_name: default\n  data_files: one*.jsonl\n---\n# Ours\n"
    write("set[1]/README.md", raw=card.encode())
    write("set[1]/one.jsonl", "a")
    write("set[1]/two.jsonl", "b")
    rows = load_prompts(PromptData(path="set[1]"), letters)
    assert [p.text for p in rows] == ["a"]
    assert rows.notices == ["set[1]: read one.jsonl; not read: two.jsonl"]


def test_a_folder_of_save_to_disk_is_read(
    texts: Callable[..., list[str]], refusal: Callable[..., str]
) -> None:
    """huggingface/alignment-handbook#53: load_dataset refuses it in words about its own
    functions.
    """
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    Dataset.from_dict({"prompt": ["a", "b"]}).save_to_disk("set")
    assert texts("set") == ["a", "b"]
    assert texts("set", split="test[1:]") == ["b"]
    write("set/state.json", raw=b"{}")
    assert "set: written by save_to_disk, but its state.json names no files" in refusal("set")


# --- what is there, not what was there ------------------------------------------------------------


def test_a_rewritten_file_of_equal_size_and_time_is_read_again(
    texts: Callable[..., list[str]],
) -> None:
    """huggingface/datasets#2956 and #444: a changed file is read from the cache."""
    before = os.stat(write("p.jsonl", "old"))
    assert texts("p.jsonl") == ["old"]
    write("p.jsonl", "new")
    os.utime("p.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat("p.jsonl").st_size == before.st_size
    assert texts("p.jsonl") == ["new"]


@pytest.mark.engines
def test_another_process_reads_it_again_too_and_needs_no_home(here: Path) -> None:
    """huggingface/datasets#2956; pytorch/pytorch#188880: datasets writes below HF_HOME even for
    local files, and fails where that cannot be written.
    """
    reads = (
        "from learners.data.reading import read\nfrom learners.settings import PromptData\n"
        "print(next(iter(read(PromptData(path='p.jsonl')))).values['prompt'])"
    )

    def read(home: str) -> str:
        environment = os.environ | {"HF_HOME": home, "HOME": home, "TMPDIR": str(here / "tmp")}
        command = [sys.executable, "-c", reads]
        return subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        ).stdout.strip()

    (here / "tmp").mkdir()
    before = os.stat(write("p.jsonl", "old"))
    assert read(str(here / "home")) == "old"
    write("p.jsonl", "new")
    os.utime("p.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read(str(here / "home")) == "new"
    assert read("/proc/nobody") == "new"
    assert not [name for name in os.listdir(here / "tmp") if name.startswith("quatuor")]


def test_other_splits_of_the_same_files_are_others(texts: Callable[..., list[str]]) -> None:
    """No public report known to us: the same files in the same order, one with another name now."""
    for name, text in {"train-1": "a", "train-2": "b", "test-3": "c"}.items():
        write(f"set/{name}.jsonl", text)
    assert texts("set", split="train+test[:1]") == ["a", "b", "c"]
    os.rename("set/train-2.jsonl", "set/test-2.jsonl")
    assert texts("set", split="train+test[:1]") == ["a", "b"]


def test_text_that_looks_like_a_date_is_text(texts: Callable[..., list[str]]) -> None:
    """No public report known to us: where all rows look so, Arrow reads dates."""
    dates = ["2020-01-01", "2020-01-02T03:04:05Z"]
    assert texts(write("p.jsonl", *dates)) == dates


@pytest.mark.parametrize("card", [False, True])
def test_files_need_no_cache_and_leave_nothing(
    texts: Callable[..., list[str]], here: Path, monkeypatch: pytest.MonkeyPatch, card: bool
) -> None:
    """tenstorrent/tt-metal#42890: HF_DATASETS_CACHE on a file system that is only read. Also where
    the rows are too many to be held as objects.
    """
    from learners.data import store

    monkeypatch.setattr(store, "AS_OBJECTS", 2)
    monkeypatch.setenv("HF_DATASETS_CACHE", "/proc/nobody")
    (here / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(here / "tmp"))
    write("set/p.jsonl", "a", "b", "c")
    if card:
        write("set/README.md", raw=b"---\nconfigs:\n- config_name: x\n  data_files: p.jsonl\n---\n")
    assert texts("set") == ["a", "b", "c"]
    assert os.listdir(here / "tmp") == []


@pytest.mark.parametrize("change", ["grows", "vanishes"])
def test_a_file_that_changes_while_it_is_read(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """jingyaogong/minimind#551 reads a file that ends within a letter, as one does that is still
    being written.
    """
    from learners.data import reading

    parts = reading._parts

    def meanwhile(*args: Any) -> Any:
        if change == "grows":
            write("p.jsonl", "a", "b")
        else:
            os.unlink("p.jsonl")
        return parts(*args)

    write("p.jsonl", "a")
    monkeypatch.setattr(reading, "_parts", meanwhile)
    assert refusal("p.jsonl").startswith("p.jsonl: changed while it was read")


def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_data(
    texts: Callable[..., list[str]], refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface/datasets#4589 is the same with a cache that may not be written."""
    import datasets

    from learners.data import store

    def full(*args: Any, **where: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = os.environ["HF_DATASETS_CACHE"]
    monkeypatch.setattr(datasets, "load_dataset_builder", full)
    assert f"org/name: the cache {cache} is full: No space left on device; set HF_HOME" in refusal(
        "org/name"
    )
    monkeypatch.setattr(store, "AS_OBJECTS", 1)
    monkeypatch.setenv("HF_DATASETS_CACHE", "/proc/nobody")
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nobody")
    with pytest.raises(UserError, match="^the cache /proc/nobody cannot be written: .* HF_HOME"):
        texts(write("p.jsonl", "a"))


# --- files that are not what they say -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "p.jsonl",
            b'{"prompt": "a"}\n\n{"prompt": "b"\n{"prompt": "c"}\n',
            "p.jsonl:3: not a line of JSON: Expecting ',' delimiter at column 15",
        ),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b', "p.jsonl:2: not a line of JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n\0\0\0\0', "p.jsonl:2: not a line of JSON"),
        # was read, and ended the run without its row as soon as that was used
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "p.jsonl:2: cannot be read as UTF-8"),
        ("p.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "p.jsonl:1: cannot be read as UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\\ud83d"}\n', "p.jsonl:2: half a character"),
        ("p.json", b'[{"prompt": "a"},\n {"prompt": "b"},,]', "p.json:2: not JSON: Expecting"),
        ("p.parquet", b'{"prompt": "a"}\n', "p.parquet: not a parquet file"),
        ("p.parquet", b"PAR1 and then nothing", "p.parquet: cannot be read: Parquet magic"),
        (
            "p.jsonl",
            gzip.compress(b'{"prompt": 3}\n', mtime=0),
            "must be text, or a list of messages",
        ),
    ],
)
def test_a_broken_file_is_refused_by_line(
    refusal: Callable[..., str],
    capfd: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    said: str,
) -> None:
    """ml-explore/mlx-examples#458 asks for the file and line of bad JSON; huggingface/datasets#6641
    and jingyaogong/minimind#551: UnicodeDecodeError without either.
    """
    assert said in refusal(write(name, raw=content))
    assert capfd.readouterr().err == ""  # datasets logs a line of its own


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "b"}\n'),  # huggingface/datasets#8241
        ("p.json", b'{"prompt": "a"}\n{"prompt": "b"}\n'),
        ("p.jsonl", b'\n\n{"prompt": "a"}\r\n  \n{"prompt": "b"}'),
        ("p.jsonl", b'[{"prompt": "a"}, {"prompt": "b"}]'),
        ("p.JSONL", b'{"prompt": "a"}\n{"prompt": "b"}\n'),
        ("p.jsonl", b'{"prompt": "a"}{"prompt": "b"}\n'),  # huggingface/datasets#4107
    ],
)
def test_a_sound_file_in_an_odd_form_is_read(
    texts: Callable[..., list[str]], name: str, content: bytes
) -> None:
    """microsoft/promptflow#4172: a byte-order mark makes good JSON lines unreadable; the check
    before a run refused it here.
    """
    from launch.recipe.machine import _data_file

    assert texts(write(name, raw=content)) == ["a", "b"]
    if b"}{" not in content:
        assert not list(_data_file("prompts", PromptData(path=name)))


def test_rows_that_look_like_the_log_of_an_agent_are_rows(texts: Callable[..., list[str]]) -> None:
    """huggingface/datasets#8113 and #8255: a file whose columns have certain names becomes one row
    of other columns, or asks for a package.
    """
    row = {"id": "1", "source": "s", "model": "m", "system_prompt": "", "messages": [1]}
    write("p.jsonl", raw=json.dumps(row | {"prompt": "a"}).encode())
    assert texts("p.jsonl") == ["a"]


def test_what_is_no_file_is_named_as_what_it_is(refusal: Callable[..., str]) -> None:
    """No public report known to us: opening a pipe would wait for ever."""
    os.symlink("gone.jsonl", "link.jsonl")
    os.mkfifo("pipe.jsonl")
    Path("set").mkdir()
    os.symlink("gone.jsonl", "set/train.jsonl")
    assert refusal("link.jsonl") == "link.jsonl: a link to gone.jsonl, which is not there"
    assert refusal("pipe.jsonl") == "pipe.jsonl: neither a file nor a folder"
    assert "set/train.jsonl: cannot be read: No such file" in refusal("set")


# --- letters, templates and control tokens --------------------------------------------------------


def test_a_letter_that_the_tokenizer_refuses_names_its_row(refusal: Callable[..., str]) -> None:
    """huggingface/tokenizers#351: Missing [UNK] token, an error without text or row."""
    assert refusal(write("p.jsonl", "ab", "a né b")) == (
        "p.jsonl: row 2: prompt: the tokenizer cannot encode it: WordLevel error: Missing [UNK] "
        "token from the vocabulary (unknown: 'é')"
    )


def test_rows_are_named_as_they_stand_in_their_file(refusal: Callable[..., str]) -> None:
    """ml-explore/mlx-examples#458: which file holds it? Also behind empty lines, in slices and in
    sums of splits.
    """
    from datasets import Dataset

    write("p.jsonl", raw='\n{"prompt": "a"}\n\n{"prompt": "é"}\n'.encode())
    assert refusal("p.jsonl").startswith("p.jsonl: row 2 (line 4): prompt: ")
    assert refusal("p.jsonl", split="train[1:]").startswith("p.jsonl: row 2 (line 4): prompt: ")
    write("set/train-1.jsonl", "a", "b")
    write("set/train-2.jsonl", "c", "é")
    write("set/test.jsonl", "d", "e", "ü")
    assert refusal("set").startswith("set/train-2.jsonl: row 2: prompt: ")
    assert refusal("set", split="train[:3]+test[1:]").startswith("set/test.jsonl: row 3: prompt: ")
    for name, column in {"1": ["a", "b"], "2": ["c", "é"]}.items():
        Dataset.from_dict({"prompt": column}).to_parquet(f"{name}.parquet")
    Path("two").mkdir()
    os.rename("1.parquet", "two/[1].parquet")
    os.rename("2.parquet", "two/[2].parquet")
    assert refusal("two").startswith("two/[2].parquet: row 2: prompt: ")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].tools | tojson }}", "TypeError: "),
        ("{{ messages[0].name.first }}", "UndefinedError: "),
        ("{{ 'a' + messages[0].content[5] }}", "UndefinedError: "),
        ("é{{ messages[0].content }}", "Missing [UNK] token"),
    ],
)
def test_whatever_a_template_raises_names_its_row(template: str, said: str) -> None:
    """FasterDecoding/Medusa#102: a TemplateError without the conversation;
    sgl-project/sglang#20700: templates raise TypeErrors too.
    """
    tokenizer = tokenizer_of()
    tokenizer.chat_template = template
    write("p.jsonl", raw=json.dumps({"prompt": CHAT}).encode())
    with pytest.raises(DataError, match=re.escape(said)) as error:
        load_prompts(PromptData(path="p.jsonl"), tokenizer)
    assert str(error.value).startswith("p.jsonl: row 1: prompt: the ")
    assert "\n" not in str(error.value)


def test_text_that_becomes_unknown_is_noticed() -> None:
    """Shark-NLP/DiffuSeq#66: after 55k steps the model answers in [UNK];
    ckiplab/ckip-transformers#7: letters that a vocabulary lacks.
    """
    rows = [{"prompt": "né", "response": "a"}, {"prompt": "a", "response": "<unk>"}]
    rows += [{"prompt": "a", "response": "ß"}] * 6
    write("p.jsonl", raw="\n".join(map(json.dumps, rows)).encode())
    loaded = load_sft(SFTData(path="p.jsonl"), tokenizer_of(unk_token="<unk>"))
    assert loaded.notices[0] == (
        "p.jsonl: 7 of 8 rows hold text that the tokenizer does not know, which becomes <unk>: "
        "'é', 'ß'; row 1 (prompt), row 3 (response), row 4 (response), row 5 (response), "
        "row 6 (response) and 2 more"
    )


def test_letters_that_vanish_are_noticed() -> None:
    """huggingface/tokenizers#1136: without an unknown token, BPE leaves out what it does not
    know.
    """
    write("p.jsonl", "abc", "aéb😀", "a\u200bb c")
    loaded = load_prompts(PromptData(path="p.jsonl"), tokenizer_of(models.BPE))
    assert loaded.notices == [
        "p.jsonl: 1 of 3 rows hold letters that the tokenizer leaves out: 'é', '😀'; row 2 (prompt)"
    ]


def test_control_tokens_inside_answers_are_noticed() -> None:
    """FranxYao/Long-Context-Data-Engineering#14: </s> in texts becomes the end of a text;
    01-ai/Yi#80: a model that was taught so answers in </s>.
    """
    tokenizer = tokenizer_of(added=("<|call|>", "<think>"))
    answers = ["a<eos>", "a<eos>b", "a<eos><eos>", "a<eos>\n", "</s>", "x<|im_end|>", "<|call|>b"]
    answers += ["a < b", "<think>"]
    rows = [{"prompt": "<|call|>", "response": answer} for answer in [*answers, "plain"]]
    write("p.jsonl", raw="\n".join(map(json.dumps, rows)).encode())
    tokenizer.add_tokens("\n")
    loaded = load_sft(SFTData(path="p.jsonl"), tokenizer)
    (notice,) = loaded.notices
    assert notice.startswith(
        "p.jsonl: 7 of 10 rows hold control tokens inside an answer, which are learned as part of "
        "it: '<eos>', '</s>', '<|im_end|>', '<|call|>', '<think>'; row 2 (response), row 3 "
    )
    assert notice.endswith("row 6 (response) and 2 more")


def test_control_tokens_in_either_answer_of_a_pair_are_noticed(
    letters: PreTrainedTokenizerFast,
) -> None:
    """FranxYao/Long-Context-Data-Engineering#14, for preferences."""
    rows = [
        {"prompt": "a", "chosen": "b<eos>", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c<eos>d"},
        {"prompt": "a", "chosen": "b</s>d", "rejected": "c"},
    ]
    write("p.jsonl", raw="\n".join(map(json.dumps, rows)).encode())
    (notice,) = load_pairs(PairData(path="p.jsonl"), letters, encoder=False).notices
    assert (
        notice.startswith("p.jsonl: 2 of 3 rows") and "row 2 (rejected), row 3 (chosen)" in notice
    )


def test_a_tokenizer_that_knows_every_byte_is_not_suspected() -> None:
    """GPT-2's unknown token is its EOS: nothing may be noticed where nothing is lost.

    No public report known to us.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<|endoftext|>"])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, unk_token=end)
    rows = [{"prompt": "é日本 😀\u200b", "response": "ß if a < b: <p>日</p>\n" + end}]
    write("p.jsonl", raw=json.dumps(rows[0]).encode())
    assert load_sft(SFTData(path="p.jsonl"), tokenizer).notices == []


def test_what_was_noticed_is_said_before_anything_starts(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface/datasets#5021 wants "a warning for unused files"."""
    from actors import begin
    from launch.demo.demo import RECIPES
    from launch.recipe.read import load_recipe

    class Started(Exception):
        pass

    def start(*args: Any) -> Any:
        raise Started

    said = "set: read a.jsonl; not read: b.jsonl"
    recipe = load_recipe(
        RECIPES / "demo_sft.yaml", [f"run.folder={here / 'run'}", "run.tensorboard=false"]
    )
    monkeypatch.setattr(begin, "roles_of", lambda recipe: {})
    monkeypatch.setattr(begin, "found_by", lambda *_: {})
    with pytest.raises(Started):
        data = SimpleNamespace(
            notices=[said], tokenizer=None, sets={}, total_steps=lambda recipe: 1
        )
        parts = begin.Parts(read=lambda *_: data, start=start, training=start)
        begin.run(recipe, None, "", lambda _: parts)
    assert capfd.readouterr().err == f"notice: {said}\n"


@pytest.mark.engines
def test_a_run_says_and_keeps_what_was_noticed(
    cluster: None, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """huggingface/datasets#5021 and FranxYao/Long-Context-Data-Engineering#14, in a whole run."""
    from actors import supervised
    from launch.demo.demo import RECIPES
    from launch.recipe.read import load_recipe
    from launch.tasks import unique_digits as task

    task.make_tokenizer(here / "base")
    task.make_model(here / "base", seed=1)
    rows = task.make_demonstrations(64, seed=1)
    rows[6]["response"] = f"{rows[6]['response']}<eos>{rows[6]['response']}"
    task.write_rows(here / "lr[1e-6]/train.jsonl", rows)
    task.write_rows(here / "lr[1e-6]/test.jsonl", rows[:8])
    quick = ["learner.ranks=1", "train.steps=1", "learner.optimizer.warmup_steps=0"]
    paths = [
        f"learner.model.path={here / 'base'}",
        "data.path=lr[1e-6]",
        f"run.folder={here / 'run'}",
    ]
    recipe = load_recipe(RECIPES / "demo_sft.yaml", [*quick, *paths], "sft")
    supervised.run(recipe)
    said = (here / "run/notices.txt").read_text().splitlines()
    assert said == [
        "lr[1e-6]: read train.jsonl; not read: test.jsonl",
        "lr[1e-6]: 1 of 64 rows hold control tokens inside an answer, which are learned as part of "
        "it: '<eos>'; train.jsonl: row 7 (response)",
    ]
    assert [line for line in capfd.readouterr().err.splitlines() if line.startswith("notice")] == [
        f"notice: {line}" for line in said
    ]
