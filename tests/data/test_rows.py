"""From a data set to rows: read, checked, tokenized once, and cached only when complete."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version

import datasets
import pytest

from lora_dist.data import rows as rows_module
from lora_dist.data.encode import cut
from lora_dist.data.formats import load_tokenizer
from lora_dist.data.rows import Rows, prepare_rows
from lora_dist.data.tasks import IGNORE_INDEX
from lora_dist.embedded import QUOTES_DIR
from lora_dist.errors import UserError
from tests.helpers.ranks import PATIENCE_S, ROOT, launch

TOKENIZER = load_tokenizer("embedded")


@pytest.fixture
def prepare(config, tmp_path, monkeypatch):
    """Call prepare_rows on a list of examples, the text of a file or a name, with a cache of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def prepare(data, suffix=".jsonl", **settings):
        if isinstance(data, list):
            data = "\n".join(map(json.dumps, data))
        if "\n" in data or data.startswith("{"):
            file = tmp_path / f"data{suffix}"
            file.write_text(data)
            data = str(file)
        settings = {"dataset_name": data, "eval_fraction": 0.0, "dataset_text_field": None} | settings
        return prepare_rows(dataclasses.replace(config, **settings), TOKENIZER)

    return prepare


def texts(rows: Rows) -> list[str]:
    return [TOKENIZER.decode(row["input_ids"], skip_special_tokens=True) for row in rows]


EXAMPLES = [{"text": f"row {i}", "id": i} for i in range(40)]


@pytest.mark.parametrize("source", ["jsonl", "json", "csv", "parquet", "txt", "saved", "saved splits", "folder"])
def test_sources(prepare, tmp_path, source):
    table = datasets.Dataset.from_list(EXAMPLES)
    path = tmp_path / f"source.{source}"
    if source == "saved":
        table.save_to_disk(path)
    elif source == "saved splits":
        datasets.DatasetDict(train=table, test=table.select(range(3))).save_to_disk(path)
    elif source == "folder":
        path.mkdir()
        table.to_parquet(path / "train.parquet")
    elif source == "txt":
        path.write_text("\n".join(example["text"] for example in EXAMPLES))
    elif source == "json":
        path.write_text(json.dumps(EXAMPLES))
    else:
        {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[source](path)
    data = prepare(str(path))
    assert texts(data.train) == [example["text"] for example in EXAMPLES]
    assert len(data.held_out) == (3 if source == "saved splits" else 0)
    assert data.train[3]["labels"].tolist() == data.train[3]["input_ids"].tolist()


def test_a_fraction_is_held_out_if_there_is_no_test_split(prepare):
    first = prepare(EXAMPLES, eval_fraction=0.25)
    assert len(first.held_out) == 10
    assert sorted(texts(first.train) + texts(first.held_out)) == sorted(example["text"] for example in EXAMPLES)
    again, other = prepare(EXAMPLES, eval_fraction=0.25), prepare(EXAMPLES, eval_fraction=0.25, seed=1)
    assert texts(again.held_out) == texts(first.held_out) != texts(other.held_out)


def test_splits_by_name(prepare):
    data = prepare("embedded", dataset_text_field="quote", dataset_train_split="test", dataset_test_split="train")
    assert (len(data.train), len(data.held_out)) == (200, 2400)


def test_columns_are_renamed(prepare):
    examples = [{"question": "a?", "answer": " b"}, {"question": "c?", "answer": " d"}]
    data = prepare(examples, rename_columns=["question=prompt", "answer=completion"])
    assert data.format == "prompt_completion" and texts(data.train) == ["a? b", "c? d"]


def test_problems_in_the_data_are_counted(prepare):
    examples = [
        {"text": text} for text in ["fine", "", "  \n", "fine", "with \0 in it", "caf\ufffd", "long " * 30, None]
    ]
    data = prepare(examples, max_length=16)
    counts = data.counts["train"]
    assert (counts.examples, counts.rows, counts.empty, counts.overlong) == (8, 5, 3, 1)
    assert (counts.repeated, counts.with_bad_characters, counts.without_trained_tokens) == (1, 2, 0)
    assert counts.tokens == data.train.lengths.sum() and counts.trained_tokens == counts.tokens - counts.rows
    printed = data.table()
    assert printed.count("warning: ") == len(data.warnings()) == 4
    assert "warning: 1 of 8 train examples are longer than --max_length 16: cut off" in printed
    with pytest.raises(UserError, match=r"--strict True: the data causes warnings: 3 of 8 train examples are empty"):
        prepare(examples, max_length=16, strict=True)
    assert prepare([{"text": "fine"}, {"text": "too"}], strict=True).warnings() == []


def test_held_out_examples_that_are_also_training_examples_are_counted(prepare, tmp_path):
    train = datasets.Dataset.from_list(EXAMPLES)
    datasets.DatasetDict(train=train, test=train.select(range(5, 8))).save_to_disk(tmp_path / "both")
    assert prepare(str(tmp_path / "both")).warnings() == ["3 held-out examples are also training examples"]


@pytest.mark.parametrize(
    "overlong_rows, expected", [("truncate", [[2, 3, 4]]), ("split", [[2, 3, 4], [5, 6, 7], [8]]), ("drop", [])]
)
def test_cut(overlong_rows, expected):
    ids = list(range(2, 9))
    assert cut(ids, ids, 3, overlong_rows) == [(part, part) for part in expected]
    assert cut(ids, ids, 7, overlong_rows) == [(ids, ids)]


def test_overlong_rows_are_cut(prepare):
    long = {"text": "a lamp and a bell and a boat"}
    length = prepare([long]).train.lengths[0]
    for overlong_rows, rows, tokens in (("truncate", 1, 5), ("split", 2, length), ("drop", 0, 0)):
        data = prepare([long, {"text": "."}], max_length=5, overlong_rows=overlong_rows)
        kept = [row for row in data.train if TOKENIZER.decode(row["input_ids"]) != "</s>.</s>"]
        assert (len(kept), sum(len(row["input_ids"]) for row in kept)) == (rows, tokens)


def test_an_example_is_left_out_if_its_completion_is_cut_off(prepare):
    examples = [{"prompt": "a long prompt " * 9, "completion": "b"}, {"prompt": "c", "completion": "d"}]
    unanswered = {"prompt": "c", "completion": " "}
    counts = prepare([*examples, unanswered], max_length=16).counts["train"]
    assert (counts.without_trained_tokens, counts.overlong, counts.rows, counts.empty) == (1, 1, 1, 1)
    with pytest.raises(UserError, match="has no text to train on: .*1 of 2 train examples have no token to train on"):
        prepare(examples[:1] + [{"prompt": "", "completion": ""}], max_length=16)


def test_a_second_start_reads_the_cache(prepare, monkeypatch):
    first = prepare(EXAMPLES)
    monkeypatch.setattr(rows_module, "encode", None)  # calling it would fail
    assert texts(prepare(EXAMPLES).train) == texts(first.train)
    assert prepare(EXAMPLES).counts == first.counts


@pytest.mark.parametrize("package", ["transformers", "tokenizers", "jinja2"])
def test_boundary_rows_of_another_version_are_not_read_from_the_cache(prepare, monkeypatch, package):
    """A template may be rendered, and a text divided, in another way."""
    prepare(EXAMPLES)
    monkeypatch.setattr(rows_module, "version", lambda name: "0" if name == package else version(name))
    prepare(EXAMPLES)
    assert len(list(datasets.config.HF_DATASETS_CACHE.glob("lora-dist-rows/*/report.json"))) == 2


def test_boundary_a_held_out_split_without_text_is_refused(prepare, tmp_path):
    empty = datasets.Dataset.from_list([{"text": " "}, {"text": None}])
    texts = datasets.Dataset.from_list([{"text": f"row {i}"} for i in range(40)])
    datasets.DatasetDict(train=texts, test=empty).save_to_disk(tmp_path / "both")
    message = "its 2 held-out examples give no row to evaluate on: 2 of 2 held-out examples are empty"
    with pytest.raises(UserError, match=message):
        prepare(str(tmp_path / "both"))
    assert len(prepare(str(tmp_path / "both"), dataset_test_split="none").held_out) == 0
    assert len(prepare(str(tmp_path / "both"), dataset_test_split="none", eval_fraction=0.1).held_out) == 4


def test_boundary_an_error_in_a_held_out_example_names_its_own_line(prepare):
    lines = "".join(json.dumps({"text": "a"}) + "\n\n" for _ in range(40)) + json.dumps({"text": 3}) + "\n"
    for seed in range(3):
        with pytest.raises(UserError, match="data.jsonl: line 81: column text holds a int"):
            prepare(lines, eval_fraction=0.5, seed=seed)
    with pytest.raises(UserError, match="data.jsonl: line 81: column text holds a int"):
        prepare(lines, streaming=True)


@pytest.mark.parametrize(
    "change",
    [{"max_length": 3}, {"overlong_rows": "drop"}, {"seed": 1, "eval_fraction": 0.1}, {"dataset_text_field": "id2"}],
)
def test_other_settings_or_other_content_are_not_read_from_the_cache(prepare, change):
    examples = [example | {"id2": f"other {example['id']}"} for example in EXAMPLES]
    prepare(examples)
    prepare(examples, **change)
    assert len(list(datasets.config.HF_DATASETS_CACHE.glob("lora-dist-rows/*/report.json"))) == 2
    assert texts(prepare([*examples[:-1], {"text": "edited", "id": 39, "id2": "x"}]).train)[-1] == "edited"


SLOW_PROCESS = """
import sys, time
from lora_dist.data import rows
from lora_dist.config import TrainConfig
from lora_dist.data.formats import Encoder, load_tokenizer
fast = Encoder.__call__
def slow(self, documents):
    print("encoding", flush=True)
    time.sleep(float(sys.argv[2]))
    return fast(self, documents)
Encoder.__call__ = slow
config = TrainConfig(model_name_or_path="embedded", dataset_name=sys.argv[1], dataset_text_field="quote")
print(len(rows.prepare_rows(config, load_tokenizer("embedded")).train), flush=True)
"""


def start(tmp_path, seconds):
    command = [sys.executable, "-c", SLOW_PROCESS, str(QUOTES_DIR / "train.jsonl"), str(seconds)]
    env = os.environ | {"HF_DATASETS_CACHE": str(tmp_path)}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)


def test_a_kill_while_tokenizing_leaves_nothing_that_looks_complete(tmp_path):
    killed = start(tmp_path, 30)
    assert killed.stdout.readline() == "encoding\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert list(tmp_path.glob("lora-dist-rows/.*.lora-dist-new")) and not list(
        tmp_path.glob("lora-dist-rows/*/report.json")
    )
    again = start(tmp_path, 0)
    assert again.communicate(timeout=PATIENCE_S)[0].split()[-1] == "2280" and again.returncode == 0
    assert not list(tmp_path.glob("lora-dist-rows/.*.lora-dist-new"))


def test_only_one_of_two_processes_tokenizes(tmp_path):
    processes = [start(tmp_path, 0.5) for _ in range(2)]
    outputs = [process.communicate(timeout=PATIENCE_S)[0].split() for process in processes]
    assert [output[-1] for output in outputs] == ["2280", "2280"]
    assert sorted(output.count("encoding") for output in outputs) == [
        0,
        4,
    ]  # 3 batches of training examples, one held out


@pytest.mark.parametrize("name", ["train.arrow", "held-out.arrow", "report.json", "manifest.json"])
def test_safety_cached_rows_that_were_damaged_are_made_again(prepare, name):
    expected = prepare(EXAMPLES, eval_fraction=0.25)
    (file,) = datasets.config.HF_DATASETS_CACHE.glob(f"lora-dist-rows/*/{name}")
    for damage in (lambda raw: raw[:-20] + bytes([raw[-20] ^ 1]) + raw[-19:], lambda raw: raw[:9], lambda raw: b""):
        whole = file.read_bytes()
        file.unlink()  # the rows that were read are still mapped
        file.write_bytes(damage(whole))
        found = prepare(EXAMPLES, eval_fraction=0.25)
        assert (texts(found.train), texts(found.held_out)) == (texts(expected.train), texts(expected.held_out))
        assert found.counts == expected.counts and file.read_bytes() == whole


def test_safety_rows_that_cannot_be_written_leave_nothing(prepare, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rows_module, "write_manifest", full)
    with pytest.raises(
        UserError, match="cannot be cached in .*: No space left on device; its disk has .* free; set HF_"
    ):
        prepare(EXAMPLES)
    left = [path.suffix for path in datasets.config.HF_DATASETS_CACHE.glob("lora-dist-rows/*")]
    assert left == [".lock"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_safety_a_full_disk_is_not_taken_for_bad_data(prepare, monkeypatch, number):
    """datasets writes its own cache first, and its error names no file."""

    def full(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.finalize", full)
    with pytest.raises(UserError, match=f"cannot be cached in .*: {os.strerror(number)}; .* free; set HF_DATASETS_C"):
        prepare(EXAMPLES)


@pytest.mark.parametrize("source", ["file", "saved"])
def test_the_error_names_a_cache_that_cannot_be_written(prepare, tmp_path, monkeypatch, source):
    """datasets writes the cache of a file first; a saved data set needs only our own."""
    datasets.Dataset.from_list(EXAMPLES).save_to_disk(tmp_path / "saved")
    (tmp_path / "a-file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "a-file")
    with pytest.raises(
        UserError, match=r"cannot be cached in .*a-file: .*; set HF_DATASETS_CACHE to another directory"
    ):
        prepare(EXAMPLES if source == "file" else str(tmp_path / "saved"))


def test_doctor_prints_the_table_and_marks_the_trained_tokens(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        '{"prompt": "a?", "completion": " b"}\n{"prompt": "c?", "completion": " d"}\n{"prompt": "", "completion": ""}'
    )
    command = ("lora-dist", "doctor", "--data", str(file), "--eval_fraction", "0")
    done = launch(*command)
    assert done.returncode == 0, done.stderr
    assert "train                3           2" in done.stdout
    assert "warning: 1 of 3 train examples are empty: left out" in done.stdout
    assert "</s>a?⟦ b</s>⟧" in done.stdout and "</s>c?⟦ d</s>⟧" in done.stdout
    answer = json.loads(launch(*command, "--json").stdout)
    assert answer["counts"]["train"]["rows"] == 2 and answer["examples"] == ["</s>a?⟦ b</s>⟧", "</s>c?⟦ d</s>⟧"]
    strict = launch(*command, "--strict", "true")
    assert strict.returncode == 2 and strict.stderr.startswith("error: --strict True: ") and strict.stdout == ""
    assert launch("lora-dist", "doctor", "--data", "x", "--max_lenght", "3").stderr.endswith(
        "did you mean --max_length?\n"
    )


def test_rows_in_memory():
    rows = Rows.of([([2, 5, 6], [IGNORE_INDEX, 5, 6]), ([2, 7], [2, 7])])
    assert len(rows) == 2 and rows.lengths.tolist() == [3, 2] and rows[0]["labels"].tolist() == [IGNORE_INDEX, 5, 6]
    assert len(Rows.of([])) == 0


def as_prompt(example: dict) -> dict:
    return {"prompt": example["text"] + ":", "completion": f" {example['id']}"}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_transform_changes_the_examples_as_they_are_read(config, tmp_path, streaming):
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES)))
    settings = {"dataset_name": str(tmp_path / "d.jsonl"), "dataset_text_field": None, "eval_fraction": 0.0}
    config = dataclasses.replace(config, streaming=streaming, **settings)
    data = prepare_rows(config, TOKENIZER, as_prompt)
    rows = list(data.train) if streaming else [(row["input_ids"], row["labels"]) for row in data.train]
    assert data.format == "prompt_completion" and len(rows) == 40
    assert TOKENIZER.decode(rows[7][0]) == "</s>row 7: 7</s>" and rows[7][1][0] == IGNORE_INDEX
    with pytest.raises(UserError, match="has no column 'label'; it has text, id"):
        prepare_rows(config, TOKENIZER, lambda example: {"prompt": example["label"], "completion": ""})


def test_boundary_rows_of_another_constant_of_a_transform_are_not_read_from_the_cache(config, tmp_path):
    def with_end(end: str):
        return lambda example: {"prompt": example["text"], "completion": end}

    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES)))
    settings = {"dataset_name": str(tmp_path / "d.jsonl"), "dataset_text_field": None, "eval_fraction": 0.0}
    for end in (" a", " b", " a"):
        data = prepare_rows(dataclasses.replace(config, **settings), TOKENIZER, with_end(end))
        assert TOKENIZER.decode(data.train[0]["input_ids"]) == f"</s>row 0{end}</s>"
