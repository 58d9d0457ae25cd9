"""Rows as they were written, whatever they lie in, and which of them are used."""

import bz2
import gzip
import json
import lzma
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pytest
from pyarrow import feather, ipc, parquet

from learners.data import store
from learners.data.reading import read
from learners.data.store import Part, Rows
from learners.errors import DataError, UserError
from learners.settings import PromptData

ROWS = [
    {"prompt": "2020-01-01", "n": 2**70, "tool": {"arguments": {"a": 1}}},
    {"prompt": "b", "n": 1.5, "tool": {"arguments": {"b": None}}},
    {"prompt": "c", "n": True},
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Work in an empty folder, where no cache can be written."""
    monkeypatch.setenv("HF_DATASETS_CACHE", "/proc/nobody")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, content):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def rows_of(path, **options):
    return [row.values for row in read(PromptData(path=path, **options))]


def prompts_of(path, **options):
    return [row["prompt"] for row in rows_of(path, **options)]


def places_of(path, **options):
    return [row.place for row in read(PromptData(path=path, **options))]


def refusal(path, **options):
    with pytest.raises(DataError) as error:
        rows_of(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("p.jsonl", ROWS, {}),
        ("p.json", json.dumps(ROWS), {}),
        ("p.json", json.dumps({"version": 1, "data": ROWS}, indent=1), {"field": "data"}),
        ("p.json", json.dumps({"version": 1, "a": {"b": ROWS}}), {"field": "a.b"}),
    ],
)
def test_json_values_are_as_they_were_written(name, content, options):
    """Numbers beyond 64 bits, numbers of several types in a column, text like a date, keys that
    other rows have: Arrow would change them all.
    """
    lacking = dict.fromkeys(("n", "tool"))
    found = rows_of(write(name, content), **options)
    assert found == [lacking | row for row in ROWS]
    assert [type(row["n"]) for row in found] == [int, float, bool]
    assert read(PromptData(path=name, **options)).columns == ["prompt", "n", "tool"]


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ({"v": 1, "data": ROWS}, {}, "set field to the key of its rows; lists of rows lie under d"),
        ({"a": {"b": ROWS}}, {"field": "a"}, "a is no list of rows; lists of rows lie under a.b"),
        ({"data": ROWS}, {"field": "rows"}, "has no list under rows; lists of rows lie under data"),
        ([*ROWS, 3], {}, "p.json: row 4: not a row of columns"),
        ([], {}, "p.json: no rows in split train"),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_json_without_a_list_of_rows_says_where_lists_lie(content, options, said, indent):
    assert said in refusal(write("p.json", json.dumps(content, indent=indent)), **options)


def test_one_object_may_be_a_row():
    """A conversation is a list of objects too, but of messages."""
    row = {"prompt": [{"role": "user", "content": "a"}]}
    assert rows_of(write("p.json", json.dumps(row))) == [row]
    assert rows_of(write("p.jsonl", [{"data": ROWS}])) == [{"data": ROWS}]


def test_columns_are_those_of_the_first_rows_and_lacking_ones_are_none():
    write("p.jsonl", [{"a": 1}, {"b": 2}, *({"a": i} for i in range(1500)), {"late": 3}])
    source = read(PromptData(path="p.jsonl"))
    assert source.columns == ["a", "b"]
    found = [row.values for row in source]
    assert found[:2] == [{"a": 1, "b": None}, {"a": None, "b": 2}]
    assert found[-1] == {"a": None, "b": None, "late": 3}


# --- CSV ------------------------------------------------------------------------------------------


def test_csv_holds_texts_as_they_are_written():
    """Also 01, empty cells, quotes, commas and line breaks in cells, and long ones."""
    long = "x" * 200_000
    write("p.csv", f'\ufeffprompt,n,ok\r\n"a ""b"",\nc",01,True\r\n\r\n{long},,\r\n')
    assert rows_of("p.csv") == [
        {"prompt": 'a "b",\nc', "n": "01", "ok": "True"},
        {"prompt": long, "n": "", "ok": ""},
    ]
    assert places_of("p.csv") == ["p.csv: row 1 (line 2)", "p.csv: row 2 (line 5)"]
    assert rows_of(write("p.tsv", 'prompt\tn\na,b\t"1\t2"\n')) == [{"prompt": "a,b", "n": "1\t2"}]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("prompt,n\na,1\nb\n", "p.csv:3: 1 cells, but 2 columns: prompt, n"),
        ("prompt,n\na,1\n\nb,1,2\n", "p.csv:4: 3 cells, but 2 columns"),
        ('prompt,n\na,"1"2\n', "p.csv:2: not a line of CSV: ',' expected after '\"'"),
        ('prompt,n\na,1\nb,"2\n', "p.csv:3: not a line of CSV: unexpected end of data"),
        (b"prompt,n\na,1\n\xe9,2\n", "p.csv:3: cannot be read as UTF-8 text"),
        ("prompt,prompt\na,1\n", "p.csv:1: columns named twice: 'prompt'"),
        ("prompt\n", "p.csv: no rows in split train"),
    ],
)
def test_broken_csv_is_refused_by_line(content, said):
    assert said in refusal(write("p.csv", content))


# --- packed ---------------------------------------------------------------------------------------

PACKERS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda raw: pyarrow.compress(raw, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("packing", PACKERS)
def test_packed_text_is_read_and_damage_is_named(packing):
    pack = PACKERS[packing]
    texts = {
        "jsonl": '{"prompt": "a"}\n{"prompt": "b"}\n',
        "json": '[{"prompt": "a"},\n{"prompt": "b"}]',
        "csv": "prompt\na\nb\n",
        "tsv": "prompt\tn\na\t1\nb\t2\n",
    }
    for suffix, text in texts.items():
        assert prompts_of(write(f"p.{suffix}.{packing}", pack(text.encode()))) == ["a", "b"]
    whole = pack(texts["jsonl"].encode())
    name = f"p.jsonl.{packing}"
    assert prompts_of(write(name, whole + whole)) == ["a", "b", "a", "b"]
    assert refusal(write(name, whole[:-9])).startswith(f"{name}: cannot be unpacked: ")
    said = f"{name}: not a .{packing} file, whatever its name says"
    assert refusal(write(name, texts["jsonl"])) == said
    assert f"{name}.parquet.{packing}: must be one of" in refusal(
        write(f"{name}.parquet.{packing}", whole)
    )


def test_packed_files_of_splits_are_found_in_a_folder():
    for split in ("train", "test"):
        write(f"set/{split}.csv.gz", gzip.compress(f"prompt\n{split}\n".encode()))
    assert prompts_of("set", split="test+train") == ["test", "train"]
    write("set/train.csv", "prompt\nc\n")
    assert "different formats (.csv, .csv.gz)" in refusal("set")


# --- parquet, Arrow, save_to_disk, the hub --------------------------------------------------------


def arrow_files():
    table = pyarrow.table({"prompt": ["a", "b"], "n": pyarrow.array([2**63, 1], pyarrow.uint64())})
    parquet.write_table(table, "p.parquet")
    for name, writer in {"file": ipc.new_file, "stream": ipc.new_stream}.items():
        with pyarrow.OSFile(f"{name}.arrow", "wb") as out, writer(out, table.schema) as written:
            written.write_table(table, max_chunksize=1)
    feather.write_feather(table, "p.feather")
    return ["p.parquet", "file.arrow", "stream.arrow", "p.feather"]


def test_parquet_and_arrow_are_read_without_a_cache():
    for name in arrow_files():
        assert rows_of(name) == [{"prompt": "a", "n": 2**63}, {"prompt": "b", "n": 1}], name
        assert places_of(name, split="train[1:]") == [f"{name}: row 2"]
        whole = Path(name).read_bytes()
        Path(name).write_bytes(whole[: len(whole) // 2])
        assert refusal(name).startswith(f"{name}: cannot be read: "), name
        assert "whatever its name says" in refusal(write(name, "prompt"))


def test_a_folder_of_save_to_disk_is_read(here):
    """Also its free-form JSON, which is text in Arrow."""
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    tools = [[{"b": 0}, {"c": "x"}], []]
    rows = Dataset.from_dict({"prompt": ["a", "b"], "tools": tools}, on_mixed_types="use_json")
    rows.save_to_disk("one")
    assert [row["tools"] for row in rows_of("one")] == tools
    assert places_of("one") == [f"one/data-00000-of-00001.arrow: row {n}" for n in (1, 2)]
    DatasetDict({"train": rows, "test": rows}).save_to_disk("two")
    assert prompts_of("two", split="test[1:]+train") == ["b", "a", "b"]
    assert prompts_of("two", split="all") == ["a", "b", "a", "b"]
    assert read(PromptData(path="two")).notice == (
        "two: read train/data-00000-of-00001.arrow; not read: test/data-00000-of-00001.arrow"
    )
    assert refusal("two", split="validation") == "two: no split validation; it holds train, test"


CARD = """---
configs:
- config_name: de
  data_files: de*.csv
  sep: ";"
- config_name: en
  data_files:
  - {split: train, path: en.csv}
  - {split: test, path: more.csv}
---
"""


def test_a_card_with_several_configurations():
    write("set/README.md", CARD)
    write("set/de1.csv", "prompt;n\na;1\n")
    write("set/en.csv", "prompt,n\nb,1\n")
    write("set/more.csv", "prompt,n\nc,1\n")
    assert refusal("set") == "set: several configurations: set configuration to one of de, en"
    assert refusal("set", configuration="fr") == (
        "set: no configuration fr: set configuration to one of de, en"
    )
    assert rows_of("set", configuration="de") == [{"prompt": "a", "n": "1"}]
    assert prompts_of("set", configuration="en", split="test+train") == ["c", "b"]
    assert refusal("set", configuration="en", split="x") == "set: no split x; it holds train, test"
    write("set/README.md", CARD.replace('sep: ";"', "skiprows: 1"))
    assert refusal("set", configuration="de").startswith("set: its card says skiprows")


@pytest.mark.parametrize(
    ("key", "said"),
    [("configuration", "of the hub, or of a folder"), ("revision", "of the hub"), ("field", "JSO")],
)
def test_a_key_that_means_nothing_is_refused(key, said):
    message = refusal(write("p.csv", "prompt\na\n"), **{key: "x"})
    assert message.startswith(f"p.csv: {key} is of a") and said in message


@pytest.fixture
def hub(here, monkeypatch):
    """Keep a data set of the hub with two configurations where `datasets` does; no network."""
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(here / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(here / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name in ("de", "en"):
        files = {split: write(f"{split}.jsonl", [{"prompt": name + split}] * 2) for split in "ab"}
        folder = here / f"cache/org___name/{name}/0.0.0/abc"
        builder = datasets.load_dataset_builder("json", data_files=files, cache_dir=here / "own")
        builder.download_and_prepare(str(folder))
        info = json.loads((folder / "dataset_info.json").read_text()) | {"config_name": name}
        (folder / "dataset_info.json").write_text(json.dumps(info))
        for split in "ab":
            os.rename(folder / f"json-{split}.arrow", folder / f"name-{split}.arrow")


def test_a_hub_set_with_configurations(hub, monkeypatch):
    import datasets

    assert prompts_of("org/name", configuration="de", split="b+a[1:]") == ["deb", "deb", "dea"]
    assert places_of("org/name", configuration="en", split="a[1:]") == ["org/name: row 2"]
    assert "Unknown split" in refusal("org/name", configuration="de", split="c")
    assert "configurations in the cache: de, en" in refusal("org/name", split="a")
    monkeypatch.setenv("HF_DATASETS_CACHE", "/proc/nobody")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/proc/nobody"))
    assert (
        "org/name: the cache /proc/nobody cannot be written: No such file or directory; set HF"
        in (refusal("org/name", configuration="de", split="a"))
    )


# --- which rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ({"lang": "de"}, ["a", "d"]),
        ({"lang": ["de", "fr"], "n": 1}, ["a", "c"]),
        ({"n": True}, ["d"]),
        ({"n": 1.0}, ["a", "c"]),
        ({"n": None}, ["b"]),
        ({"n": "1"}, ["e"]),
    ],
)
def test_where_compares_values_as_they_are_written(where, left):
    rows = [("a", "de", 1), ("c", "fr", 1), ("d", "de", True), ("e", "en", "1")]
    lines = [{"prompt": p, "lang": lang, "n": n} for p, lang, n in rows]
    assert (
        prompts_of(write("p.jsonl", [*lines, {"prompt": "b", "lang": "en"}]), where=where) == left
    )


@pytest.mark.parametrize(
    ("where", "left"), [({"n": 1}, "a"), ({"n": 0.5}, "b"), ({"n": True}, "cd"), ({"n": None}, "e")]
)
def test_where_compares_with_the_text_of_a_number_in_csv(where, left):
    write("p.csv", "prompt,n\na,1\nb,0.5\nc,True\nd,true\ne,\n")
    assert prompts_of("p.csv", where=where) == list(left)


def test_where_names_the_condition_that_leaves_nothing():
    write("p.jsonl", [{"prompt": "a", "lang": "de", "n": i} for i in range(3)])
    assert refusal("p.jsonl", where={"language": "de"}) == (
        "p.jsonl: where names the column 'language'; there are prompt, lang, n"
    )
    assert refusal("p.jsonl", where={"lang": ["fr", "en"]}) == (
        'p.jsonl: where leaves no row: none of 3 rows has lang: ["fr", "en"]'
    )
    assert refusal("p.jsonl", where={"lang": "de", "n": 7}) == (
        'p.jsonl: where leaves no row: none of 3 rows with lang: "de" has n: 7'
    )


@pytest.mark.parametrize("as_objects", [10, 10_000])
def test_a_seed_gives_an_order_which_limit_cuts(here, monkeypatch, as_objects):
    """Whether or not the rows that are shuffled fit memory."""
    monkeypatch.setattr(store, "AS_OBJECTS", as_objects)
    monkeypatch.setattr(tempfile, "tempdir", str(here))
    write("p.jsonl", [{"prompt": str(i), "even": i % 2 == 0} for i in range(50)])
    everything = prompts_of("p.jsonl", shuffle=1)
    assert everything != prompts_of("p.jsonl") and sorted(everything, key=int) == prompts_of(
        "p.jsonl"
    )
    assert prompts_of("p.jsonl", shuffle=1) == everything != prompts_of("p.jsonl", shuffle=2)
    assert prompts_of("p.jsonl", shuffle=1, limit=7) == everything[:7]
    assert len(prompts_of("p.jsonl", shuffle=1, limit=99)) == 50
    even = prompts_of("p.jsonl", shuffle=1, where={"even": True})
    assert even[:5] == prompts_of("p.jsonl", shuffle=1, where={"even": True}, limit=5)
    assert sorted(even, key=int) == [str(i) for i in range(0, 50, 2)]
    assert places_of("p.jsonl", shuffle=1, limit=1) == [f"p.jsonl: row {int(everything[0]) + 1}"]


def test_limit_reads_no_further():
    write("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"\n')
    assert prompts_of("p.jsonl", limit=2) == ["a", "b"]
    assert prompts_of("p.jsonl", split="train[:2]", limit=1) == ["a"]
    assert "p.jsonl:3: not a line of JSON" in refusal("p.jsonl", limit=3)


@pytest.mark.parametrize(
    ("split", "left"),
    [
        ("train[:2]+test", "abe"),
        ("train[-1:]", "d"),
        ("train[:25%]", "a"),
        ("test+train[2:]", "ecd"),
        ("train[2:]+train[:2]", "cdab"),
        ("all", "eabcd"),
    ],
)
def test_splits_are_summed_and_sliced(split, left):
    write("set/train-1.jsonl", [{"prompt": p} for p in "abc"])
    write("set/train-2.jsonl", [{"prompt": "d"}])
    write("set/test.jsonl", [{"prompt": "e"}])
    assert prompts_of("set", split=split) == list(left)
    assert "set: cannot be read (split train[): " in refusal("set", split="train[")


def test_rows_can_be_read_more_than_once_unless_they_change():
    write("p.jsonl", [{"prompt": str(i)} for i in range(3000)])
    source = read(PromptData(path="p.jsonl"))
    assert len(list(source)) == len(list(source)) == 3000
    rows = iter(source)
    next(rows)
    with open("p.jsonl", "a") as file:
        file.write('{"prompt"')
    with pytest.raises(DataError, match="p.jsonl: changed while it was read"):
        list(rows)


# --- rows as they are kept ------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    number: int
    ids: list[int]
    trained: bytes
    margin: float
    columns: dict


def kept(i):
    return Kept(i, [i, 2 * i], bytes([i % 2]), i / 3, {"a": {"b": [None, i, 2**70]}})


def test_many_rows_come_back_as_they_were_appended(here, monkeypatch):
    """Before, in and behind the rows that are encoded; also when reading and adding alternate."""
    monkeypatch.setattr(store, "AS_OBJECTS", 10)
    monkeypatch.setattr(tempfile, "tempdir", str(here))  # as the cache cannot be written
    rows = Rows()
    assert not rows and len(rows) == 0
    expected = []
    for i in range(47):
        rows.append(kept(i))
        expected.append(kept(i))
        if i % 15 == 0:
            assert list(rows) == expected
    assert list(rows) == expected == [*reversed(list(reversed(rows)))]
    assert [rows[i] for i in (0, 9, 10, 39, 40, 46, -1, -47)] == [
        expected[i] for i in (0, 9, 10, 39, 40, 46, -1, -47)
    ]
    assert rows[5:45:3] == expected[5:45:3] and rows[44:] == expected[44:]
    assert len(rows._last) == 7, "the others are encoded"
    for beyond in (47, -48):
        with pytest.raises(IndexError):
            rows[beyond]
    assert os.listdir(here) == [], "the file has no name"
    rows.close_part(Part("0", size=47))
    assert [part.size for part in rows.parts] == [47]


def test_rows_without_room_name_the_way_out(monkeypatch):
    monkeypatch.setattr(store, "AS_OBJECTS", 10)
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nobody")
    with pytest.raises(UserError, match="the cache /proc/nobody cannot be written: .*HF_HOME"):
        Rows(range(10))
    full = open("/dev/full", "wb")  # noqa: SIM115
    monkeypatch.setattr(store, "_nameless_file", lambda: ("/cache", full))
    with pytest.raises(UserError, match="rows cannot be kept in /cache: No space left .*HF_HOME"):
        Rows(range(10))
    assert full.closed
