"""Bad data: every rank exits with 2, and one line says what is wrong, before a model is loaded; or it is counted."""

import json
import shutil

import datasets
import pytest
from transformers import AutoTokenizer

from lora_dist.embedded import BASE_DIR
from tests.helpers.ranks import assert_refused, fork_ranks, launch

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def lines(*rows) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def saved(folder, table, features=None):
    datasets.Dataset.from_dict(table, features=features).save_to_disk(folder / "data")
    return str(folder / "data")


def no_rows(folder):
    datasets.Dataset.from_dict({"text": ["a"]}).select([]).to_parquet(folder / "none.parquet")
    return str(folder / "none.parquet")


CLASSES = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
TOKEN_CLS = ["--task_type", "TOKEN_CLS", "--dataset_label_field", "tags"]
SEQ_CLS = ["--task_type", "SEQ_CLS", "--dataset_label_field", "label"]

# id: (file name, its bytes, flags, words of the error). If the name is None, a function of the folder makes the data
# set in place of the bytes and returns its name.
CASES = {
    "truncated line": ("d.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"te', [], ["d.jsonl", "line 3: ", "character"]),
    "broken line in the middle": ("d.jsonl", b'{"text": "a"}\n{"text" "b"}\n', [], ["line 2: Expecting ':'"]),
    "raw NUL byte": ("d.jsonl", b'{"text": "a"}\n{"text": "b\0"}\n', [], ["line 2: ", "control character"]),
    "not UTF-8": ("d.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', [], ["line 2: byte 0xe9 is not UTF-8"]),
    "csv not UTF-8": ("d.csv", b"text\nok\ncaf\xe9\n", [], ["line 3: byte 0xe9 is not UTF-8"]),
    "lines that are no objects": ("d.jsonl", b'"a"\n"b"\n', [], ["line 1: holds a str, not an object"]),
    "csv with a field too many": (
        "d.csv",
        b"text,id\na,1\nb,2,3\n",
        [],
        ["line 3: has 3 fields, but the header has 2"],
    ),
    "no parquet": ("d.parquet", b"PAR1 and nothing", [], ["cannot be loaded", "arquet"]),
    "empty file": ("d.jsonl", b"", [], ["d.jsonl: is an empty file"]),
    "rows without text": (
        "d.jsonl",
        lines({"text": ""}, {"text": None}, {"text": " "}),
        [],
        ["3 of 3 train examples are empty"],
    ),
    "mixed schemas": (
        "d.jsonl",
        lines({"text": "a"}, {"text": 3}),
        [],
        ["line 2: column text holds a int; it must hold text"],
    ),
    "no known columns": (
        "d.jsonl",
        lines({"quote": "a"}),
        [],
        ["has quote", "--dataset_text_field", "--rename_columns"],
    ),
    "wrong column": (
        "d.jsonl",
        lines({"quote": "a"}),
        ["--dataset_text_field", "q"],
        ["--dataset_text_field q", "has quote"],
    ),
    "half a format": (
        "d.jsonl",
        lines({"prompt": "a"}),
        ["--dataset_format", "prompt_completion"],
        ["needs prompt and completion"],
    ),
    "rename a missing column": (
        "d.jsonl",
        lines({"a": "a"}),
        ["--rename_columns", "b=text"],
        ["--rename_columns b=text", "no column b"],
    ),
    "rename onto an existing column": (
        "d.jsonl",
        lines({"a": "a", "text": "b"}),
        ["--rename_columns", "a=text"],
        ["a=text", "there is a column text already"],
    ),
    "rename without =": ("d.jsonl", lines({"a": "a"}), ["--rename_columns", "a"], ["--rename_columns a", "OLD=NEW"]),
    "chat without a template": (
        "d.jsonl",
        lines({"messages": CHAT}),
        [],
        ["has no chat template; give --chat_template"],
    ),
    "no template file": (
        "d.jsonl",
        lines({"messages": CHAT}),
        ["--chat_template", "no.jinja"],
        ["--chat_template no.jinja: No such file or directory"],
    ),
    "messages without roles": (
        "d.jsonl",
        lines({"messages": CHAT}, {"messages": [{"text": "hi"}]}),
        ["--chat_template", "TEMPLATE"],
        ["line 2: message 1 of messages has no role"],
    ),
    "a chat that the template refuses": (
        "d.jsonl",
        lines({"messages": CHAT}, {"messages": CHAT[1:]}),
        ["--chat_template", "TEMPLATE"],
        ["line 2: the chat template refuses it: begin with the user"],
    ),
    "chats without answers": (
        "d.jsonl",
        lines({"messages": CHAT[:1]}),
        ["--chat_template", "TEMPLATE"],
        ["1 of 1 train examples have no token to train"],
    ),
    "completions that are cut off": (
        "d.jsonl",
        lines({"prompt": "word " * 90, "completion": "b"}),
        ["--max_length", "32"],
        ["no token to train on"],
    ),
    "all too long": (
        "d.jsonl",
        lines({"text": "word " * 90}),
        ["--max_length", "32", "--overlong_rows", "drop"],
        ["no text to train on", "longer than --max_length 32: left out"],
    ),
    "no examples": (None, no_rows, [], ["none.parquet: holds no examples"]),
    "no saved examples": (None, lambda t: saved(t, {"text": []}), [], ["data: holds no examples"]),
    "no such split": (
        None,
        lambda t: saved(t, {"text": ["a"]}),
        ["--dataset_train_split", "all"],
        ["no such split", "train"],
    ),
    "no such test split": (
        None,
        lambda t: saved(t, {"text": ["a"]}),
        ["--dataset_test_split", "dev"],
        ["--dataset_test_split dev"],
    ),
    "warnings under --strict": (
        "d.jsonl",
        lines(*[{"text": "a"}] * 3),
        ["--strict", "true"],
        ["--strict True", "2 of 3 train examples repeat"],
    ),
    "classes outside their range": (
        None,
        lambda t: saved(t, {"text": ["a", "b"], "label": [0, 1]}, CLASSES),
        SEQ_CLS,
        ["example 2: label is 7, but the classes are 0 to 1"],
    ),
    "one class": (
        "d.jsonl",
        lines(*[{"text": "a", "label": "x"}] * 3),
        SEQ_CLS,
        ["--dataset_label_field label", "one class, x; a classifier needs two or more"],
    ),
    "no column of classes": (
        "d.jsonl",
        lines({"text": "a"}),
        SEQ_CLS,
        ["--dataset_label_field label", "no such column"],
    ),
    "words without as many classes": (
        "d.jsonl",
        lines({"text": ["a", "b"], "tags": ["x"]}, {"text": ["a"], "tags": ["y"]}),
        TOKEN_CLS,
        ["line 1: text must hold a list of words, and tags as many classes"],
    ),
    "classes for a causal language model": (
        "d.jsonl",
        lines({"text": "a"}),
        ["--num_labels", "3"],
        ["--num_labels 3", "has no effect with --task_type CAUSAL_LM"],
    ),
    "texts for a sequence-to-sequence model": (
        "d.jsonl",
        lines({"text": "a"}),
        ["--task_type", "SEQ_2_SEQ_LM", "--packing", "false"],
        ["needs a prompt and a completion"],
    ),
    "a stream without its end": (
        "d.jsonl",
        lines({"text": "a"}),
        ["--streaming", "true"],
        ["--streaming True", "--max_steps"],
    ),
    "a fraction of a stream": (
        "d.jsonl",
        lines({"text": "a"}),
        ["--streaming", "true", "--max_steps", "30"],
        ["--streaming True: cannot hold out a fraction of a stream", "--eval_fraction 0"],
    ),
    "a stream that breaks": (
        "d.jsonl",
        b'{"text": "a"}\n{"te',
        ["--streaming", "true", "--max_steps", "30", "--eval_fraction", "0"],
        ["line 2: "],
    ),
    "no length": ("d.jsonl", lines({"text": "a"}), ["--max_length", "1"], ["--max_length 1", "2 or more"]),
    "packed and grouped": (
        "d.jsonl",
        lines({"text": "a"}),
        ["--train_sampling_strategy", "group_by_length"],
        ["has no effect with --packing"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_exit_code_2(case, tmp_path, monkeypatch):
    name, content, flags, expected = CASES[case]
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    data = content(tmp_path) if name is None else str(tmp_path / name)
    if name:
        (tmp_path / name).write_bytes(content)
    if case == "classes outside their range":  # datasets checks them when it writes, but not when it reads
        monkeypatch.setattr("lora_dist.data.sources.datasets.load_from_disk", _with_class_7)
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    flags = [str(template) if flag == "TEMPLATE" else flag for flag in flags]
    if "--task_type" in flags:
        flags += ["--packing", "false"]
    before = sorted(tmp_path.iterdir())
    run = ("--dataset_name", data, "--output_dir", str(tmp_path / "run"), "--model_name_or_path", "embedded")
    ended = fork_ranks(*run, *flags, recipe="sft")
    assert_refused(ended, expected)
    assert sorted(path for path in tmp_path.iterdir() if path != cache) == before
    if "--strict" not in flags:  # strict refuses data that was tokenized completely
        assert not list(cache.glob("lora-dist-rows/*/report.json"))  # nothing that a later start would read


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("recipe", ["opt_quotes", "bloomz_complaints", "sft"])
def test_a_classifier_without_a_label_column_is_refused(recipe, task_type, tmp_path):
    """quotes_tags is not among the recipes, because it names its label column itself."""
    flags = ("--output_dir", str(tmp_path / "run"), "--task_type", task_type)
    ended = fork_ranks(*flags, recipe=recipe)
    assert_refused(ended, [f"--task_type {task_type}: needs --dataset_label_field COLUMN"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--task_type", "CAUSAL_LM"], "--dataset_label_field tags: has no effect with --task_type CAUSAL_LM"),
        (
            ["--dataset_label_field", "nothing"],
            "--dataset_label_field nothing: no such column: embedded has quote, author",
        ),
    ],
)
def test_quotes_tags_with_another_task_or_column(flags, expected, tmp_path):
    assert_refused(fork_ranks("--output_dir", str(tmp_path / "run"), *flags, recipe="quotes_tags"), [expected])


def _with_class_7(path):
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 7]})
    table.info.features = table._info.features = CLASSES
    return datasets.DatasetDict({"train": table})


@pytest.mark.slow
def test_ten_megabytes_in_a_line_and_nul_characters_are_only_counted(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines({"text": "word " * 2_000_000}, {"text": "a \0 b"}, {"text": "x" * 50_000}, {"text": "fine"}))
    flags = ("--eval_fraction", "0", "--max_length", "128", "--overlong_rows", "split", "--json")
    done = launch("lora-dist", "doctor", "--data", str(file), *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    counts = report["counts"]["train"]
    assert (counts["overlong"], counts["with_bad_characters"]) == (2, 1) and counts["tokens"] > 2_000_000
    assert any("NUL" in line for line in report["warnings"])


@pytest.mark.parametrize("missing, code", [("pad_token", 0), ("eos_token", 2)])
def test_a_tokenizer_without_pad_or_eos(tmp_path, missing, code):
    """Without a pad token, eos is used for padding. Without eos, the model could not learn where a text ends."""
    (tmp_path / "d.jsonl").write_bytes(lines({"text": "a"}, {"text": "b"}))
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    setattr(tokenizer, missing, None)
    tokenizer.save_pretrained(tmp_path / missing)
    flags = ("--eval_fraction", "0", "--model_name_or_path", str(tmp_path / missing))
    done = launch("lora-dist", "doctor", "--data", str(tmp_path / "d.jsonl"), *flags)
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.count("\n") == 1
        assert done.stderr.endswith("eos_token: its tokenizer has no eos token; training needs one to end each text\n")


def test_a_tokenizer_larger_than_the_base_is_refused(tmp_path):
    shutil.copytree(BASE_DIR, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "d.jsonl").write_bytes(lines({"text": "a"}))
    flags = ("--dataset_name", str(tmp_path / "d.jsonl"), "--output_dir", str(tmp_path / "run"))
    ended = fork_ranks(*flags, "--model_name_or_path", str(tmp_path / "base"), "--warmup_steps", "0", recipe="sft")
    assert [code for code, _, _ in ended] == [2, 2]
    assert "its tokenizer has 1787 tokens, and the model embeds 1786" in ended[0][2]
