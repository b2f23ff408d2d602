"""Labels of classifiers: one class per text, several per text, one per word; and sequence-to-sequence targets."""

import dataclasses
import json
import math
import re

import datasets
import pytest

from lora_dist.data.classes import name_classes
from lora_dist.data.formats import load_tokenizer
from lora_dist.data.rows import prepare_rows
from lora_dist.data.tasks import IGNORE_INDEX
from lora_dist.errors import UserError

TOKENIZER = load_tokenizer("embedded")
NAMES = datasets.ClassLabel(names=["no", "yes", "maybe"])


@pytest.fixture
def prepare(config, tmp_path):
    def prepare(train, test=None, features=None, **settings):
        splits = {"train": train} | ({"test": test} if test else {})
        tables = {name: datasets.Dataset.from_dict(columns, features=features) for name, columns in splits.items()}
        datasets.DatasetDict(tables).save_to_disk(tmp_path / "data")
        settings = {"task_type": "SEQ_CLS", "dataset_label_field": "label", "dataset_text_field": None} | settings
        settings |= {"dataset_name": str(tmp_path / "data"), "eval_fraction": 0.0}
        return prepare_rows(dataclasses.replace(config, **settings), TOKENIZER)

    return prepare


def labels(rows) -> list[list[int]]:
    return [row["labels"].tolist() for row in rows]


def test_one_class_per_text(prepare):
    data = prepare({"text": ["a", "b", "c"], "label": ["late", "broken", "late"]})
    assert data.classes == ["broken", "late"] and labels(data.train) == [[1], [0], [1]]
    assert data.train[0]["input_ids"].tolist() == TOKENIZER("a")["input_ids"]
    assert data.counts["train"].trained_tokens == 3


def test_classes_may_be_numbers(prepare):
    data = prepare({"text": ["a", "b", "c"], "label": [5, 3, 5]})
    assert data.classes == ["3", "5"] and labels(data.train) == [[1], [0], [1]]


def test_classes_that_the_data_set_lists_keep_their_numbers(prepare):
    features = datasets.Features({"text": datasets.Value("string"), "label": NAMES})
    data = prepare({"text": ["a", "b", "c"], "label": [2, 0, -1]}, features=features)
    assert data.classes == ["no", "yes", "maybe"]
    assert labels(data.train) == [[2], [0]] and data.counts["train"].without_trained_tokens == 1  # -1 means unknown
    with pytest.raises(UserError, match="--num_labels 2: has no effect: .* lists the classes of label itself"):
        prepare({"text": ["a", "b", "c"], "label": [2, 0, -1]}, features=features, num_labels=2)


def test_several_classes_per_text(prepare):
    tags = [["sea", "hope"], [], ["hope", "time"], ["sea", "hope"]]
    data = prepare({"text": ["a", "b", "c", "d"], "label": tags})
    assert data.classes == ["hope", "sea", "time"]
    assert labels(data.train) == [[1, 1, 0], [0, 0, 0], [1, 0, 1], [1, 1, 0]]
    frequent = prepare({"text": ["a", "b", "c", "d"], "label": tags}, num_labels=2)
    assert frequent.classes == ["hope", "sea"] and labels(frequent.train) == [[1, 1], [0, 0], [1, 0], [1, 1]]


def test_a_class_that_only_held_out_examples_have_is_left_out(prepare):
    data = prepare({"text": ["a", "b"], "label": ["x", "y"]}, {"text": ["c", "d"], "label": ["z", "y"]})
    assert labels(data.held_out) == [[1]] and data.counts["held-out"].without_trained_tokens == 1


def test_boundary_a_row_of_unknown_classes_only_is_not_trained_as_one_of_no_class(prepare):
    train = {"text": ["a", "b", "c"], "label": [["sea"], ["hope", "sea"], ["hope"]]}
    data = prepare(train, {"text": ["d", "e"], "label": [["tide", "sea"], []]})
    assert labels(data.held_out) == [[0, 1], [0, 0]]
    message = r"example 2: none of its classes \['tide'\] is among the classes of the training examples; correct it"
    with pytest.raises(UserError, match=message):
        prepare(train, {"text": ["d", "e"], "label": [["sea"], ["tide"]]})
    with pytest.raises(UserError, match=r"example 3: none of its classes \[None\]"):
        prepare(train | {"label": [["sea"], ["hope"], [None]]})
    rare = {"text": ["a", "b", "c", "d"], "label": [["sea"], ["hope"], ["sea", "hope"], ["tide"]]}
    assert labels(prepare(rare, num_labels=2).train)[-1] == [0, 0]  # the setting says to leave it out


def test_the_class_of_a_word_is_the_label_of_its_first_token(prepare):
    words = [["The", "lighthouses", "of"], ["patience"]]
    data = prepare({"text": words, "label": [["o", "thing", "o"], ["thing"]]}, task_type="TOKEN_CLS", max_length=64)
    row = data.train[0]
    encoded = TOKENIZER([words[0]], is_split_into_words=True)
    assert row["input_ids"].tolist() == encoded["input_ids"][0]
    expected, seen = [], set()
    for word in encoded.word_ids(0):
        first = word is not None and word not in seen
        expected.append([0, 1, 0][word] if first else IGNORE_INDEX)
        seen.add(word)
    assert row["labels"].tolist() == expected and sum(label != IGNORE_INDEX for label in expected) == 3
    assert IGNORE_INDEX in expected[2:]  # one of the words has several tokens


def test_labels_of_tokens_are_truncated_with_the_tokens(prepare):
    long = {"text": [["word"] * 40], "label": [["o", "thing"] * 20]}
    data = prepare(long, task_type="TOKEN_CLS", max_length=10)
    assert len(data.train[0]["input_ids"]) == len(data.train[0]["labels"]) == 10
    text = prepare({"text": ["word " * 40, "b"], "label": ["x", "y"]}, max_length=10)
    assert text.train.lengths.tolist()[0] == 10 and labels(text.train) == [[0], [1]]


def test_a_target_ends_with_eos(prepare):
    settings = {"task_type": "SEQ_2_SEQ_LM", "dataset_label_field": None}
    data = prepare({"prompt": ["name it"], "completion": ["a lamp"]}, **settings)
    row = data.train[0]
    assert row["input_ids"].tolist() == TOKENIZER("name it")["input_ids"]
    assert row["labels"].tolist() == [*TOKENIZER("a lamp")["input_ids"], TOKENIZER.eos_token_id]


BAD_CLASSES = {  # (texts or words, classes, task, words of the error); the third example is wrong, if one is
    "text and number": (["x", "1", 1], "SEQ_CLS", "label holds 1, so its classes are of two types, str and int"),
    "number and text": ([2, 1, "1"], "SEQ_CLS", "label holds '1', so its classes are of two types, int and str"),
    "true and one": ([1, 0, True], "SEQ_CLS", "label holds True, so its classes are of two types, int and bool"),
    "one and several": (
        ["x", "y", ["x"]],
        "SEQ_CLS",
        "label holds a list of classes, and one class before",
    ),
    "several and one": (
        [["x"], ["y"], "x"],
        "SEQ_CLS",
        "label holds one class, and a list of classes before",
    ),
    "types in lists": ([["1"], ["2"], ["2", 1]], "SEQ_CLS", "label holds 1, so its classes are of two types"),
    "object": (["x", "y", {"a": 1}], "SEQ_CLS", "label holds a dict; a class is text or a number"),
    "nested list": ([["x"], ["y"], [["x"]]], "SEQ_CLS", "label holds a list; a class is text or a number"),
    "not a number": ([1.0, 2.0, math.nan], "SEQ_CLS", "label holds nan; a class is text or a number"),
    "class of a word": ([["x"], ["y"], [{"x": 1}]], "TOKEN_CLS", "label holds a dict; a class is text or a number"),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("case", BAD_CLASSES)
def test_boundary_classes_of_other_forms_are_refused_with_their_line(config, tmp_path, case, split):
    labels, task, says = BAD_CLASSES[case]
    rows = [{"text": ["a"] if task == "TOKEN_CLS" else "a", "label": label} for label in labels]
    for name in {"train", split}:
        kept = rows if name == split else rows[:2]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    settings = {"task_type": task, "dataset_label_field": "label", "dataset_text_field": None, "eval_fraction": 0.0}
    with pytest.raises(UserError, match=f"line 3: {re.escape(says)}"):
        prepare_rows(dataclasses.replace(config, dataset_name=str(tmp_path), **settings), TOKENIZER)


@pytest.mark.parametrize("word, kind", [(None, "NoneType"), (7, "int"), (["a"], "list")])
def test_boundary_a_word_that_is_no_text_is_refused(config, tmp_path, word, kind):
    rows = [{"text": ["a", "b"], "label": ["x", "y"]}, {"text": ["a", word], "label": ["x", "y"]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"task_type": "TOKEN_CLS", "dataset_label_field": "label", "dataset_text_field": None}
    with pytest.raises(UserError, match=f"line 2: text holds the word .*, which is a {kind}; it must be text"):
        prepare_rows(dataclasses.replace(config, dataset_name=str(tmp_path / "a.jsonl"), **settings), TOKENIZER)


def test_a_row_that_does_not_say_its_classes_is_left_out(prepare):
    data = prepare({"text": ["a", "b", "c"], "label": [["x"], None, ["y", None]]})
    assert labels(data.train) == [[1, 0], [0, 1]] and data.counts["train"].without_trained_tokens == 1


def test_name_classes_of_a_column_of_listed_classes():
    features = datasets.Features({"tags": datasets.List(NAMES)})
    table = datasets.Dataset.from_dict({"tags": [[0, 2]]}, features=features)
    assert name_classes(table, "tags", None) == {0: "no", 1: "yes", 2: "maybe"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"packing": True}, "--packing True: is not supported with --task_type SEQ_CLS; give --packing false"),
        ({"overlong_rows": "split"}, "split: is not supported with --task_type SEQ_CLS; use truncate or drop"),
        ({"sample_prompt": "a"}, "a: is not supported with --task_type SEQ_CLS; give --sample_prompt ''"),
        ({"streaming": True}, "--streaming True: is not supported with --task_type SEQ_CLS, which counts the classes"),
        ({"num_labels": 1}, "--num_labels 1: must be 2 or more"),
        ({"dataset_label_field": None}, "--task_type SEQ_CLS: needs --dataset_label_field COLUMN"),
    ],
)
def test_settings_that_a_classifier_does_not_support_are_refused(prepare, settings, message):
    with pytest.raises(UserError, match=message):
        prepare({"text": ["a", "b"], "label": ["x", "y"]}, **settings)


def test_a_recipe_that_makes_prompts_is_refused_for_classes(config):
    settings = {"task_type": "SEQ_CLS", "dataset_label_field": "tags"}
    with pytest.raises(UserError, match="--task_type SEQ_CLS: is not supported by this recipe, .*quotes_tags.py"):
        prepare_rows(dataclasses.replace(config, **settings), TOKENIZER, lambda example: example)
