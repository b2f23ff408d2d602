"""Classes: of a text, several of a text, of words; and targets of a sequence-to-sequence model."""

import dataclasses

import datasets
import pytest

from lora_dist.data.classes import number_classes
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


def test_one_class_of_each_text(prepare):
    data = prepare({"text": ["a", "b", "c"], "label": ["late", "broken", "late"]})
    assert data.classes == ["broken", "late"] and labels(data.train) == [[1], [0], [1]]
    assert data.train[0]["input_ids"].tolist() == TOKENIZER("a")["input_ids"]
    assert data.counts["train"].trained == 3


def test_numbers_are_classes_too(prepare):
    data = prepare({"text": ["a", "b", "c"], "label": [5, 3, 5]})
    assert data.classes == ["3", "5"] and labels(data.train) == [[1], [0], [1]]


def test_classes_that_the_data_set_lists_keep_their_numbers(prepare):
    features = datasets.Features({"text": datasets.Value("string"), "label": NAMES})
    data = prepare({"text": ["a", "b", "c"], "label": [2, 0, -1]}, features=features)
    assert data.classes == ["no", "yes", "maybe"]
    assert labels(data.train) == [[2], [0]] and data.counts["train"].untrained == 1  # -1 says unknown
    with pytest.raises(UserError, match="--num_labels 2: has no effect: .* lists the classes of label itself"):
        prepare({"text": ["a", "b", "c"], "label": [2, 0, -1]}, features=features, num_labels=2)


def test_several_classes_of_each_text(prepare):
    tags = [["sea", "hope"], [], ["hope", "time"], ["sea", "hope"]]
    data = prepare({"text": ["a", "b", "c", "d"], "label": tags})
    assert data.classes == ["hope", "sea", "time"]
    assert labels(data.train) == [[1, 1, 0], [0, 0, 0], [1, 0, 1], [1, 1, 0]]
    frequent = prepare({"text": ["a", "b", "c", "d"], "label": tags}, num_labels=2)
    assert frequent.classes == ["hope", "sea"] and labels(frequent.train) == [[1, 1], [0, 0], [1, 0], [1, 1]]


def test_a_class_that_only_the_held_out_rows_have_is_not_guessed(prepare):
    data = prepare({"text": ["a", "b"], "label": ["x", "y"]}, {"text": ["c", "d"], "label": ["z", "y"]})
    assert labels(data.held_out) == [[1]] and data.counts["held-out"].untrained == 1


def test_a_words_class_is_its_first_tokens(prepare):
    words = [["The", "lighthouses", "of"], ["patience"]]
    data = prepare(
        {"text": words, "label": [["o", "thing", "o"], ["thing"]]}, task_type="TOKEN_CLS", max_length=64
    )  # fmt: skip
    row = data.train[0]
    encoded = TOKENIZER([words[0]], is_split_into_words=True)
    assert row["input_ids"].tolist() == encoded["input_ids"][0]
    expected, seen = [], set()
    for word in encoded.word_ids(0):
        first = word is not None and word not in seen
        expected.append([0, 1, 0][word] if first else IGNORE_INDEX)
        seen.add(word)
    assert row["labels"].tolist() == expected and sum(label != IGNORE_INDEX for label in expected) == 3
    assert IGNORE_INDEX in expected[2:]  # a word of several tokens is among them


def test_labels_are_cut_off_with_their_tokens(prepare):
    long = {"text": [["word"] * 40], "label": [["o", "thing"] * 20]}
    data = prepare(long, task_type="TOKEN_CLS", max_length=10)
    assert len(data.train[0]["input_ids"]) == len(data.train[0]["labels"]) == 10
    text = prepare({"text": ["word " * 40, "b"], "label": ["x", "y"]}, max_length=10)
    assert text.train.lengths.tolist()[0] == 10 and labels(text.train) == [[0], [1]]


def test_a_target_is_closed_by_eos(prepare):
    settings = {"task_type": "SEQ_2_SEQ_LM", "dataset_label_field": None}
    data = prepare({"prompt": ["name it"], "completion": ["a lamp"]}, **settings)
    row = data.train[0]
    assert row["input_ids"].tolist() == TOKENIZER("name it")["input_ids"]
    assert row["labels"].tolist() == [*TOKENIZER("a lamp")["input_ids"], TOKENIZER.eos_token_id]


def test_number_classes_of_nested_lists_of_names():
    features = datasets.Features({"tags": datasets.List(NAMES)})
    table = datasets.Dataset.from_dict({"tags": [[0, 2]]}, features=features)
    assert number_classes(table, "tags", None) == {0: "no", 1: "yes", 2: "maybe"}


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"packing": True}, "--packing True: cannot be had with --task_type SEQ_CLS"),
        ({"overlong_rows": "split"}, "--overlong_rows split: cannot be had with --task_type SEQ_CLS; truncate or drop"),
        ({"sample_prompt": "a"}, "--sample_prompt a: only CAUSAL_LM completes a prompt"),
    ],
)
def test_what_classes_cannot_have(prepare, settings, words):
    with pytest.raises(UserError, match=words):
        prepare({"text": ["a", "b"], "label": ["x", "y"]}, **settings)
