"""Examples for classifiers: a text with its class or classes (SEQ_CLS), or words with a class each (TOKEN_CLS)."""

import math
from collections import Counter

from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerBase

from lora_dist.config import TrainConfig
from lora_dist.data.formats import Document, Encoded, Encoder
from lora_dist.data.sources import ORIGIN, Examples, where_from
from lora_dist.data.tasks import IGNORE_INDEX, TASKS
from lora_dist.errors import require


def choose_encoder(tokenizer: PreTrainedTokenizerBase, config: TrainConfig, examples: Examples) -> Encoder:
    """Raises UserError if settings, columns and tokenizer do not fit together."""
    if TASKS[config.task_type].has_classes:
        return ClassEncoder(tokenizer, config, examples)
    return Encoder(tokenizer, config, examples.columns)


def name_classes(train: Dataset, column: str, num_labels: int | None) -> dict[object, str]:
    """The name of each class, by the value that stands for it in the column; in the order of the class numbers.

    If the data set itself lists the classes (`datasets.ClassLabel`), the values are their numbers. Otherwise the
    classes are the column's values, sorted; with `num_labels`, only that many, the most frequent ones.
    """
    feature = getattr(train.features[column], "feature", train.features[column])
    if isinstance(feature, ClassLabel):
        return dict(enumerate(feature.names))
    counts = Counter(value for values in train[column] for value in as_classes(values) if value is not None)
    by_frequency = sorted(counts, key=lambda value: (-counts[value], str(value)))
    return {value: str(value) for value in sorted(by_frequency[:num_labels], key=str)}


def as_classes(value) -> list:
    return value if isinstance(value, list) else [value]


class ClassColumn:
    """Checks that the examples' classes are of one form: all are lists, or none is, and all values are of one type.

    Without that, the text "1" and the number 1 would be two classes with one name, or true and 1 one class.
    """

    def __init__(self, column: str):
        self.column, self.is_list, self.type = column, None, None

    def fault(self, value) -> str | None:
        """What is wrong with the value of the next example; None if nothing is."""
        if value is None:
            return None
        for item in as_classes(value):
            if item is None:
                continue
            if not isinstance(item, str | int | float) or isinstance(item, float) and not math.isfinite(item):
                found = item if isinstance(item, float) else f"a {type(item).__name__}"
                return f"{self.column} holds {found}; a class is text or a number"
            self.type = self.type or type(item)
            if type(item) is not self.type:
                types = f"{self.type.__name__} and {type(item).__name__}"
                return f"{self.column} holds {item!r}, so its classes are of two types, {types}; write them alike"
        self.is_list = isinstance(value, list) if self.is_list is None else self.is_list
        if isinstance(value, list) != self.is_list:
            forms = ("one class", "a list of classes")
            return f"{self.column} holds {forms[not self.is_list]}, and {forms[self.is_list]} before; write them alike"
        return None


class ClassEncoder(Encoder):
    """Turns examples into token ids and class numbers.

    Labels are class numbers: one per text; or a 0/1 vector over the classes, if the column holds a list of classes; or
    one per token (TOKEN_CLS).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, examples: Examples):
        self.tokenizer, self.config, self.format, self.columns = tokenizer, config, "classes", examples.columns
        text, label = config.dataset_text_field or "text", config.dataset_label_field
        has = f"{config.dataset_name} has {', '.join(examples.columns)}"
        for setting, column in (("dataset_text_field", text), ("dataset_label_field", label)):
            require(column in examples.columns, setting, column, f"no such column: {has}")
        self.text_column, self.label_column = text, label
        self.per_token = config.task_type == "TOKEN_CLS"
        why = f"needs a fast tokenizer, which {config.model_name_or_path} does not have"
        require(not self.per_token or tokenizer.is_fast, "task_type", "TOKEN_CLS", why)
        feature = examples.train.features[label]
        self.listed_by_data = isinstance(getattr(feature, "feature", feature), ClassLabel)
        why = f"has no effect: {config.dataset_name} lists the classes of {label} itself"
        require(not (self.listed_by_data and config.num_labels), "num_labels", config.num_labels, why)
        require(config.num_labels != 1, "num_labels", 1, "must be 2 or more: a classifier needs two classes")
        self.forms = ClassColumn(label)
        for origin, value in zip(examples.train[ORIGIN], examples.train[label], strict=True):
            self._check_form(value, where_from(origin))
        names = name_classes(examples.train, label, config.num_labels)
        self.classes = list(names.values())  # names, by class number
        self.number_of_value = {value: number for number, value in enumerate(names)}
        self.values = names.keys() if config.num_labels is None else name_classes(examples.train, label, None).keys()
        why = f"holds one class, {' '.join(self.classes)}; a classifier needs two or more"
        require(len(self.classes) > 1, "dataset_label_field", label, why)

    def _check_form(self, value, number: str) -> None:
        if why := self.forms.fault(value):
            raise self._malformed(number, why)

    def read(self, example: dict, number: str) -> Document:
        text, labels = example[self.text_column], example[self.label_column]
        self._check_form(labels, number)
        if not self.per_token:
            return Document(number, (self._text(example, self.text_column, number),), labels=labels)
        if not (isinstance(text, list) and isinstance(labels, list) and len(text) == len(labels)):
            why = f"{self.text_column} must hold a list of words, and {self.label_column} as many classes"
            raise self._malformed(number, why)
        for word in text:
            if not isinstance(word, str):
                why = f"{self.text_column} holds the word {word!r}, which is a {type(word).__name__}; it must be text"
                raise self._malformed(number, why)
        return Document(number, tuple(text), labels=labels)

    def __call__(self, documents: list[Document]) -> list[Encoded]:
        if self.per_token:
            encoded = self.tokenizer([list(d.parts) for d in documents], is_split_into_words=True, verbose=False)
            word_ids = [encoded.word_ids(i) for i in range(len(documents))]
            labels = [self._token_labels(d, ids) for d, ids in zip(documents, word_ids, strict=True)]
            return list(zip(encoded["input_ids"], labels, strict=True))
        ids = self._tokenize([document.text for document in documents])
        return [(row, self._text_labels(document)) for row, document in zip(ids, documents, strict=True)]

    def _text_labels(self, document: Document) -> list[int]:
        if isinstance(document.labels, list):
            present = {self._class_number(value, document) for value in document.labels}
            known = not document.labels or any(value in self.values for value in document.labels)
            if not known:  # it would be trained as a row of no class
                why = f"none of its classes {document.labels} is among the classes of the training examples"
                raise self._malformed(document.number, f"{why}; correct it, leave it out, or give it an empty list")
            return [int(number in present) for number in range(len(self.classes))]
        if self.forms.is_list:  # and this row does not say which classes it has
            return [IGNORE_INDEX] * len(self.classes)
        number = self._class_number(document.labels, document)
        return [IGNORE_INDEX if number is None else number]

    def _token_labels(self, document: Document, word_ids: list[int | None]) -> list[int]:
        """The class of a word is the label of its first token; its other tokens and special tokens are not trained.

        `word_ids`: for each token the index of its word, or None for a special token.
        """
        is_first = [word is not None and (i == 0 or word_ids[i - 1] != word) for i, word in enumerate(word_ids)]
        numbers = [self._class_number(value, document) for value in document.labels]
        chosen = [numbers[word] if first else None for word, first in zip(word_ids, is_first, strict=True)]
        return [IGNORE_INDEX if number is None else number for number in chosen]

    def _class_number(self, value, document: Document) -> int | None:
        """None if the value is no class: it is unknown (None or -1), too rare for `--num_labels`, or only held out.

        Raises UserError if the data set lists its classes and this is not one of them.
        """
        if self.listed_by_data and value is not None and not -1 <= value < len(self.classes):
            last = len(self.classes) - 1
            raise self._malformed(document.number, f"{self.label_column} is {value}, but the classes are 0 to {last}")
        return self.number_of_value.get(value)


def _check_pairs(config: TrainConfig) -> None:
    """Raises UserError if a setting is not supported with a loss of pairs."""
    refused = f"is not supported with --loss_type {config.loss_type}"
    remedies = {
        "task_type": ("CAUSAL_LM", "pairs are answers of a causal language model"),
        "packing": (False, "each answer is a row of its own; give --packing false"),
        "streaming": (False, "the reference is computed for all pairs before the first step"),
        "overlong_rows": (config.overlong_rows.replace("split", "truncate"), "use truncate or drop"),
        "context_parallel_size": (1, "ranks cannot share the rows of a pair; give 1"),
        "train_on_inputs": (False, "both answers have the same prompt; give false"),
    }
    for name, (allowed, why) in remedies.items():
        value = getattr(config, name)
        require(value == allowed, name, value, f"{refused}: {why}")
    changed = config.lora_bias != "none" and config.adapter_name_or_path and not config.reference_adapter
    why = f"{refused} and --adapter_name_or_path: the base with those biases is no reference; give --reference_adapter"
    require(not changed, "lora_bias", config.lora_bias, why)


def check_task_settings(config: TrainConfig) -> None:
    """Raises UserError if a setting has no effect with `--task_type`, is not supported with it, or is missing."""
    task, label = TASKS[config.task_type], config.dataset_label_field
    if config.has_pairs:
        _check_pairs(config)
    with_task = f"with --task_type {task.name}"
    if task.has_classes:
        require(label, "task_type", task.name, "needs --dataset_label_field COLUMN, the column that holds the classes")
        why = f"is not supported {with_task}, which counts the classes before it trains"
        require(not config.streaming, "streaming", True, why)
    else:
        for name in ("dataset_label_field", "num_labels"):
            value = getattr(config, name)
            require(value is None, name, value, f"has no effect {with_task}; use it with SEQ_CLS or TOKEN_CLS")
    if task.name != "CAUSAL_LM":
        refused = f"is not supported {with_task}"
        require(not config.packing, "packing", True, f"{refused}; give --packing false")
        require(config.overlong_rows != "split", "overlong_rows", "split", f"{refused}; use truncate or drop")
        prompt = config.sample_prompt
        require(not prompt, "sample_prompt", prompt, f"{refused}; give --sample_prompt ''")
