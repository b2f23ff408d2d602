"""Sources of examples: what is read, and what is refused in one line."""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import os
import shlex
import socket

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from lora_dist.data.sources import load_examples
from lora_dist.errors import UserError


@pytest.fixture
def load(config, tmp_path, monkeypatch):
    """Call load_examples on files that are written into a folder: {name: text or bytes}. `name`: of the data set."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def load(files: dict[str, str | bytes], name: str | None = None, **settings):
        folder = tmp_path / "data"
        for file, content in files.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        name = str(next(iter(files)) if name is None else name)
        name = name if name.count("/data/") > 1 else str(folder / name)
        return load_examples(dataclasses.replace(config, **{"dataset_name": name, "eval_fraction": 0.0} | settings))

    return load


@pytest.mark.parametrize(
    "renamed, message",
    [
        (["a=text", "b=text"], "--rename_columns a=text b=text: renames to text twice"),
        (["a=b"], "--rename_columns a=b: there is a column b already: b;"),
        (["a=x", "a=y"], "--rename_columns a=x a=y: renames from a twice"),
        (["c=x"], "--rename_columns c=x: no column c: .* has a, b"),
    ],
)
def test_boundary_two_columns_never_get_one_name(load, renamed, message):
    files = {"d.jsonl": json.dumps({"a": "x", "b": "y"})}
    with pytest.raises(UserError, match=message):
        load(files, rename_columns=renamed)
    assert load(files, rename_columns=["a=b", "b=a"]).columns == ["b", "a"]


def rows_of(examples, split="train") -> list[dict]:
    rows = list(getattr(examples, split))
    return [{name: row[name] for name in examples.columns} for row in rows]


PAIRS = [{"prompt": "a", "completion": "NA"}, {"prompt": "007", "completion": "2024-01-31"}]
PAIR_LINES = "".join(json.dumps(pair) + "\n" for pair in PAIRS)
CSV = "prompt,completion\na,NA\n007,2024-01-31\n"
BOM = b"\xef\xbb\xbf"
ZSTD = pa.compress(PAIR_LINES.encode(), "zstd", asbytes=True)
ONE_TABLE = {  # the same records, as people have them
    "x.jsonl": PAIR_LINES,
    "X.JSONL": PAIR_LINES,
    "x.ndjson": PAIR_LINES,
    "x": PAIR_LINES,
    "x.y": PAIR_LINES,
    "x.json": json.dumps(PAIRS),
    "pretty.json": json.dumps(PAIRS, indent=2),
    "one-after-another.json": "\n".join(json.dumps(pair, indent=2) for pair in PAIRS),
    "bom.jsonl": BOM + PAIR_LINES.encode(),
    "bom.json": BOM + json.dumps(PAIRS).encode(),
    "bom.csv": BOM + CSV.encode(),
    "crlf.jsonl": PAIR_LINES.replace("\n", "\r\n"),
    "crlf.csv": CSV.replace("\n", "\r\n"),
    "blank lines.jsonl": "\n \n" + PAIR_LINES.replace("\n", "\n\n"),
    "quoted.csv": '"prompt","completion"\n"a","NA"\n"007","2024-01-31"\n',
    "x.CSV": CSV,
    "x.tsv": CSV.replace(",", "\t"),
    "x.jsonl.gz": gzip.compress(PAIR_LINES.encode()),
    "x.TSV.GZ": gzip.compress(CSV.replace(",", "\t").encode()),
    "x.csv.bz2": bz2.compress(CSV.encode()),
    "x.jsonl.xz": lzma.compress(PAIR_LINES.encode()),
    "x.jsonl.zst": ZSTD,
    "compressed without saying so.jsonl": gzip.compress(PAIR_LINES.encode()),
    "not compressed.jsonl.gz": PAIR_LINES,
}


@pytest.mark.parametrize("file", ONE_TABLE)
def test_boundary_a_text_file_gives_its_text_whatever_its_name_and_form(load, file):
    """Every cell is the text that stands in the file: no NA, no number, no date."""
    assert rows_of(load({file: ONE_TABLE[file]})) == PAIRS
    streamed = load({file: ONE_TABLE[file]}, streaming=True)
    assert [{name: row[name] for name in PAIRS[0]} for row in streamed.train] == PAIRS


def test_boundary_cells_of_a_csv_are_text(load):
    cells = ["NA", "null", "None", "nan", "N/A", "1", "1.10", "1e5", "true", "-", "", " x "]
    rows = rows_of(load({"d.csv": "id,text\n" + "".join(f"{i},{cell}\n" for i, cell in enumerate(cells))}))
    assert [row["text"] for row in rows] == [cell or None for cell in cells]
    rows = rows_of(load({"e.csv": ',text\n0,"a\nb, ""c"""\n\n1,d\n'}))  # as pandas writes an index
    assert rows == [{"Unnamed: 0": "0", "text": 'a\nb, "c"'}, {"Unnamed: 0": "1", "text": "d"}]


def test_boundary_values_of_json_stay_as_they_are(load):
    """No key is added to a record of a list, and no type is made like another one's."""
    records = [
        {"a": [{"x": 1}, {"y": "2"}], "b": 2**70},
        {"a": "text", "b": 0.1, "c": None},
        {"a": {"k": [[]]}, "b": "2020-01-01T00:00:00"},
    ]
    examples = load({"d.jsonl": "".join(json.dumps(record) + "\n" for record in records)})
    assert rows_of(examples) == [{"a": None, "b": None, "c": None} | record for record in records]
    assert rows_of(load({"texts.json": '["a", "b"]'})) == [{"text": "a"}, {"text": "b"}]
    assert rows_of(load({"d.txt": "a\r\n\r\nNA\n"})) == [{"text": "a"}, {"text": ""}, {"text": "NA"}]


def test_boundary_cells_are_text_in_a_folder_that_names_its_own_files(load):
    readme = "---\nlicense: mit\nconfigs:\n- config_name: one\n  data_files: a.csv\n---\n"
    files = {"README.md": readme, "a.csv": "text\nNA\nb\n", "b.jsonl": '{"text": "c"}\n'}
    assert rows_of(load(files, "")) == [{"text": "NA"}, {"text": "b"}]
    assert rows_of(load(files, "", dataset_config="one")) == [{"text": "NA"}, {"text": "b"}]


def parquet(**columns) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


DEEP = "[" * 100_000 + "]" * 100_000
LATIN = "caf\xe9".encode("latin-1")
BAD_FILES = {  # (file, content, words of the error)
    "deep": ("d.jsonl", '{"text": "a"}\n{"text": ' + DEEP + "}\n", "d.jsonl: line 2: the JSON is nested too deep"),
    "deep array": ("d.json", DEEP, "d.json: line 1: the JSON is nested too deep"),
    "deep objects": ("d.jsonl", '{"a":' * 100_000, "line 1: the JSON is nested too deep"),
    "half a character": ("d.jsonl", '{"text": "ok"}\n{"text": "a \\ud83d b"}\n', "line 2: .*surrogates not allowed"),
    "half a character in an array": ("d.json", '[{"t": "ok"},\n{"t": "a \\ud83d b"}]', "line 2: .*surrogates"),
    "not UTF-8": ("d.txt", b"a\nb\n" + LATIN, "d.txt: line 3: byte 0xe9 is not UTF-8; convert the file to UTF-8"),
    "UTF-16": ("d.csv", "text\na\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
    "broken in the middle": ("d.jsonl", '{"a": 1}\n\n{"a" 2}\n', "line 3: Expecting ':' delimiter, at character 6"),
    "broken array": ("d.json", '[{"a": 1},\n{"a": 2}\n{"a": 3}]', "line 3: Expecting ',' delimiter"),
    "open array": ("d.json", '[{"a": 1},\n{"a": 2}', "line 2: Expecting ',' delimiter"),
    "numbers": ("d.json", "[1, 2]", "line 1: holds a int, not an object whose keys are the columns"),
    "a line that is no object": ("d.jsonl", '{"a": 1}\n[2]\n', "line 2: holds a list, not an object"),
    "a field too many": ("d.csv", 'a,b\n1,2\n"x\ny",2,3\n', "line 3: has 3 fields, but the header has 2; quote"),
    "a field too few": ("d.csv", "a,b\n\n1\n", "line 3: has 1 fields, but the header has 2"),
    "an open quote": ("d.csv", 'a,b\n1,2\n"x,2\n3,4\n', "line 3: unexpected end of data"),
    "a key twice": ("d.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n', "d.jsonl: line 2: text is given twice"),
    "a key twice in an array": (
        "d.json",
        '[{"text": "a"},\n{"text": "b", "x": {"y": 1, "y": 2}}]',
        "d.json: line 2: y is given twice",
    ),
    "a column twice": ("d.csv", "a,b,a\n1,2,3\n", "d.csv: two columns have the name a"),
    "an empty name": ("d.jsonl", '{"": "a", "text": "b"}\n', "has a column with the name ''; rename it"),
    "a name of two lines": ("d.csv", '"a\nb",text\n1,2\n', r"has a column with the name 'a\\nb'; rename it"),
    "no content": ("d.jsonl", "", "d.jsonl: is an empty file"),
    "blank lines only": ("d.jsonl", "\n  \n", "d.jsonl: holds no examples"),
    "a header only": ("d.csv", "a,b\n", "d.csv: holds no examples"),
    "a thousand keys": ("d.jsonl", json.dumps(dict.fromkeys(map(str, range(1001)), 1)), "more than 1000 columns"),
    "unknown": ("d.xyz", "text", "d.xyz: cannot tell what this file holds; files ending in .json .jsonl .* are read"),
    "archive": ("d.zip", b"PK\3\4...", "d.zip: cannot tell what this file holds"),
    "cut off gz": ("d.jsonl.gz", ONE_TABLE["x.jsonl.gz"][:-12], "d.jsonl.gz: .*[Ee]nd-of-stream"),
    "cut off zst": ("d.jsonl.zst", ZSTD[:-9], "d.jsonl.zst: "),
    "damaged gz": ("d.csv.gz", b"\x1f\x8b" + b"x" * 99, "d.csv.gz: "),
    "an array after an array": ("d.jsonl", '[{"text": "a"}]\n[{"text": "b"}]\n', "line 2: Extra data after the array"),
    "an object after an array": ("d.json", '[]\n\n{"text": "b"}', "d.json: line 3: Extra data after the array"),
    "garbage after an array": ("d.json", '[{"text": "a"}] x', "d.json: line 1: Extra data after the array"),
    "garbage after bz2": ("d.txt.bz2", bz2.compress(b"a\n") + b"garbage", "d.txt.bz2: Invalid data stream"),
    "garbage after xz": ("d.txt.xz", lzma.compress(b"a\n") + b"garbage!", "d.txt.xz: Input format not supported"),
    "cut off second bz2": ("d.txt.bz2", bz2.compress(b"a") + bz2.compress(b"b")[:-3], "ends in the middle of a stream"),
    "cut off second xz": ("d.txt.xz", lzma.compress(b"a") + lzma.compress(b"b")[:-3], "ends in the middle of a stream"),
    "compressed parquet": ("d.parquet.gz", gzip.compress(b"PAR1"), "is a compressed parquet file; decompress it"),
    "parquet without rows": ("d.parquet", parquet(text=pa.array([], pa.string())), "d.parquet: holds no examples"),
    "damaged parquet": ("d.parquet", b"PAR1" + b"x" * 99, "d.parquet: cannot be loaded: .*arquet"),
    "damaged arrow": ("d.arrow", b"ARROW1" + b"x" * 99, "d.arrow: cannot be loaded: "),
}


@pytest.mark.parametrize("compress, suffix", [(bz2.compress, "bz2"), (lzma.compress, "xz"), (gzip.compress, "gz")])
def test_boundary_all_streams_of_a_compressed_file_are_read(load, compress, suffix):
    """`cat a.xz b.xz > c.xz` is how such files are joined; zeros may fill up a stream of xz."""
    long = "a" * 100_000 + "\n"
    content = (
        compress(long.encode() * 30) + compress(b"") + (b"\0" * 20_000 if suffix == "xz" else b"") + compress(b"b")
    )
    assert rows_of(load({f"d.txt.{suffix}": content})) == [{"text": long.strip()}] * 30 + [{"text": "b"}]


@pytest.mark.parametrize("case", BAD_FILES)
def test_boundary_a_bad_file_is_one_line_that_names_the_file_and_its_line(load, case):
    file, content, message = BAD_FILES[case]
    with pytest.raises(UserError, match=message) as raised:
        load({file: content})
    assert str(raised.value).startswith("--dataset_name ") and str(raised.value).isprintable()
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "dangling"])
def test_boundary_what_is_no_file_is_refused_before_it_is_opened(load, tmp_path, kind):
    path = tmp_path / "d.jsonl"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    else:
        path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "nothing")
    message = ".*No such file" if kind == "dangling" else "is neither a file nor a directory"
    with pytest.raises(UserError, match=f"d.jsonl: {message}"):
        load({}, str(path))
    if kind != "dangling":
        with pytest.raises(UserError, match="neither a file"):
            load({}, str(tmp_path))


def a(text: str) -> str:
    return json.dumps({"text": text}) + "\n"


MANY_FILES = {  # (files, name of the data set below their folder, texts to train on, texts to hold out)
    "folder": ({"x.jsonl": a("1"), "y.JSONL": a("2"), "README.md": "# x", "LICENSE": "MIT"}, "", ["1", "2"], None),
    "splits": ({"train.jsonl": a("1"), "test.jsonl": a("2")}, "", ["1"], ["2"]),
    "split folders": (
        {"train/0.jsonl": a("1"), "train/1.jsonl": a("2"), "test/0.jsonl": a("3")},
        "",
        ["1", "2"],
        ["3"],
    ),
    "pattern": ({"b.jsonl": a("2"), "a.jsonl": a("1"), "c.csv": "text\n3\n"}, "*.jsonl", ["1", "2"], None),
    "deep pattern": ({"p/b.txt": "2", "a.txt": "1"}, "**/*.txt", ["1", "2"], None),
    "names": ({"b c.jsonl": a("1"), "a.jsonl.gz": gzip.compress(a("2").encode())}, None, ["1", "2"], None),
    "brackets in a name": ({"a[1].jsonl": a("1")}, "a[1].jsonl", ["1"], None),
}


@pytest.mark.parametrize("case", MANY_FILES)
def test_boundary_several_files_are_one_data_set(load, tmp_path, case):
    files, name, train, held_out = MANY_FILES[case]
    if name is None:
        load(files, next(iter(files)))
        name = shlex.join(str(tmp_path / "data" / file) for file in files)
    examples = load(files, name)
    assert [row["text"] for row in rows_of(examples)] == train
    assert (examples.held_out and [row["text"] for row in rows_of(examples, "held_out")]) == held_out
    assert load(files, name).identity == examples.identity
    last = next(reversed(files))
    changed = files | {last: a("other")} if last.endswith(".jsonl") else {}
    assert not changed or load(changed, name).identity != examples.identity


TABLES = {  # (columns of the first and of the second file, words of the error or None)
    "a number after text": (
        {"text": ["a"]},
        {"text": [7]},
        "1.parquet: its column text holds int64, but in .*0.parquet",
    ),
    "text after a number": (
        {"text": [7]},
        {"text": ["007"]},
        "1.parquet: its column text holds string, but in .*0.par",
    ),
    "parts of numbers": ({"x": [7]}, {"x": [7.5]}, "1.parquet: its column x holds double, but in .* it holds int64"),
    "inside of a list": ({"x": [["a"]]}, {"x": [[1]]}, "1.parquet: its column x holds list<element: int64>, but in "),
    "a key more": ({"x": [{"a": 1}]}, {"x": [{"a": 1, "b": 2}]}, "its column x holds struct<a: int64, b: int64>, but"),
    "a column more": (
        {"text": ["a"]},
        {"text": ["a"], "y": [1]},
        "0.parquet: lacks the column y, which .*1.parquet has",
    ),
    "a column less": (
        {"text": ["a"], "y": [1]},
        {"text": ["a"]},
        "1.parquet: lacks the column y, which .*0.parquet has",
    ),
    "no rows": ({"text": ["a"]}, {"text": pa.array([], pa.string())}, "1.parquet: holds no examples"),
    "another order": ({"text": ["a"], "y": [1]}, {"y": [2], "text": ["b"]}, None),
    "long texts": ({"text": ["a"]}, {"text": pa.array(["b"], pa.large_string())}, None),
    "nothing": ({"text": ["a"], "y": [1]}, {"text": ["b"], "y": pa.nulls(1)}, None),
    "a key less": ({"x": [{"a": 1, "b": [2]}]}, {"x": [{"b": [1]}]}, None),
}


@pytest.mark.parametrize("case", TABLES)
def test_boundary_tables_are_read_only_if_their_types_are_alike(load, case):
    first, second, message = TABLES[case]
    files = {"0.parquet": parquet(**first), "1.parquet": parquet(**second)}
    if message:
        with pytest.raises(UserError, match=message):
            load(files, "*.parquet")
    else:
        expected = [{name: columns[name][0] for name in first} for columns in (first, second)]
        expected = [{k: v.as_py() if isinstance(v, pa.Scalar) else v for k, v in row.items()} for row in expected]
        expected = [{"x": {"a": None} | row["x"]} if "x" in row else row for row in expected]
        assert rows_of(load(files, "*.parquet")) == expected


@pytest.mark.parametrize("shape", ["data files", "described", "saved"])
def test_boundary_a_linked_folder_is_refused_and_not_left_out(load, tmp_path, shape):
    readme = "---\nconfigs:\n- config_name: one\n  data_files: '**/*.jsonl'\n---\n"
    files = {"a.jsonl": a("1")} | ({"README.md": readme} if shape == "described" else {})
    load(files)
    if shape == "saved":
        Dataset.from_dict({"text": ["1"]}).save_to_disk(tmp_path / "data")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/b.jsonl").write_text(a("2"))
    (tmp_path / "data/linked").symlink_to(tmp_path / "more")
    with pytest.raises(UserError, match="data/linked: is a link to a folder, which is not followed; name its files"):
        load({}, str(tmp_path / "data"))
    (tmp_path / "data/linked").rename(tmp_path / "data/.linked")  # hidden ones are never read
    assert rows_of(load({}, str(tmp_path / "data")))


BAD_SETS = {  # (files, name, words of the error)
    "mixed folder": (
        {"a.jsonl": a("1"), "b.csv": "text\n2\n"},
        "",
        "a.jsonl and .*b.csv, which are of different kinds",
    ),
    "mixed pattern": ({"a.jsonl": a("1"), "b.txt": "2"}, "*", "a.jsonl and .*b.txt, which are of different kinds"),
    "no match": ({"a.jsonl": a("1")}, "*.csv", r"\*.csv: no file matches this"),
    "not there": ({"a.jsonl": a("1")}, "b.jsonl", "b.jsonl: no such file"),
    "not there, upper case": ({"a.jsonl": a("1")}, "b.JSONL.GZ", "b.JSONL.GZ: no such file"),
    "of no split": (
        {"train.jsonl": a("1"), "more.jsonl": a("2")},
        "",
        "more.jsonl belongs to none of the splits train",
    ),
    "brackets": ({"d[1]/a.jsonl": a("1")}, "d[1]", r"cannot search a folder with \*, \? or \[ in its path"),
    "no data": ({"a.png": "x"}, "", "has no data files; files ending in .json"),
    "another column": (
        {"a.jsonl": a("1"), "b.jsonl": '{"text": "x", "id": 1}\n'},
        "",
        "a.jsonl: lacks the column id, which .*b.jsonl has",
    ),
    "a column less": (
        {"a.csv": "id,text\n1,2\n", "b.csv": "text\n1\n"},
        "",
        "b.csv: lacks the column id, which .*a.csv has",
    ),
    "splits that differ": (
        {"train.jsonl": a("1"), "test.jsonl": '{"id": 1}\n'},
        "",
        "--dataset_test_split test: lacks the column text, which train has; add it, or give none",
    ),
}


@pytest.mark.parametrize("case", BAD_SETS)
def test_boundary_files_that_do_not_belong_together_are_named(load, case):
    files, name, message = BAD_SETS[case]
    with pytest.raises(UserError, match=message):
        load(files, name)


def test_boundary_several_names_are_all_looked_for(load, tmp_path):
    load({"a.jsonl": a("1")})
    with pytest.raises(UserError, match="--dataset_name /nothing.jsonl: no such file"):
        load({}, shlex.join([str(tmp_path / "data/a.jsonl"), "/nothing.jsonl"]))
