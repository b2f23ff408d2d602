"""Examples with classes: a text and its class or classes, or words and a class for each."""

from collections import Counter

from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerBase

from lora_dist.config import TrainConfig
from lora_dist.data.formats import Document, Encoded, Encoder
from lora_dist.data.sources import Examples
from lora_dist.data.tasks import IGNORE_INDEX, TASKS
from lora_dist.errors import UserError, require


def choose_encoder(tokenizer: PreTrainedTokenizerBase, config: TrainConfig, examples: Examples) -> Encoder:
    if TASKS[config.task_type].has_classes:
        return ClassEncoder(tokenizer, config, examples)
    return Encoder(tokenizer, config, examples.columns)


def number_classes(train: Dataset, column: str, num_labels: int | None) -> dict[object, str]:
    """The names of the classes in a column, by how its rows call them: by number where the data set lists names.

    In the order of that list, or sorted; of `num_labels` the most frequent ones.
    """
    feature = getattr(train.features[column], "feature", train.features[column])
    if isinstance(feature, ClassLabel):
        return dict(enumerate(feature.names))
    values = (value if isinstance(value, list) else [value] for value in train[column])
    counts = Counter(name for row in values for name in row if name is not None)
    by_frequency = sorted(counts, key=lambda name: (-counts[name], str(name)))
    return {name: str(name) for name in sorted(by_frequency[:num_labels], key=str)}


class ClassEncoder(Encoder):
    """Token ids with the classes' numbers as labels: of a row its class, or 0 or 1 for each, or of each token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, examples: Examples):
        self.tokenizer, self.config, self.format = tokenizer, config, "classes"
        text, label = config.dataset_text_field or "text", config.dataset_label_field
        has = f"{config.dataset_name} has {', '.join(examples.columns)}"
        for setting, column in (("dataset_text_field", text), ("dataset_label_field", label)):
            require(column in examples.columns, setting, column, f"no such column: {has}")
        self.per_token = config.task_type == "TOKEN_CLS"
        require(not self.per_token or tokenizer.is_fast, "task_type", "TOKEN_CLS", "needs a fast tokenizer")
        feature = examples.train.features[label]
        self.listed = isinstance(getattr(feature, "feature", feature), ClassLabel)
        why = f"has no effect: {config.dataset_name} lists the classes of {label} itself"
        require(not (self.listed and config.num_labels), "num_labels", config.num_labels, why)
        names = number_classes(examples.train, label, config.num_labels)
        self.classes, self.numbers = list(names.values()), {name: number for number, name in enumerate(names)}
        require(len(self.classes) > 1, "dataset_label_field", label, f"holds one class, {' '.join(self.classes)}")

    def read(self, example: dict, row: int) -> Document:
        text, labels = example[self.config.dataset_text_field or "text"], example[self.config.dataset_label_field]
        if not self.per_token:
            return Document(row, (self._text(example, self.config.dataset_text_field or "text", row),), labels=labels)
        if not (isinstance(text, list) and isinstance(labels, list) and len(text) == len(labels)):
            raise self._malformed(row, "needs a list of words and as many classes")
        return Document(row, tuple(text), labels=labels)

    def __call__(self, documents: list[Document]) -> list[Encoded]:
        if self.per_token:
            encoded = self.tokenizer([list(d.parts) for d in documents], is_split_into_words=True, verbose=False)
            words = [encoded.word_ids(i) for i in range(len(documents))]
            labels = [self._of_tokens(d, ids) for d, ids in zip(documents, words, strict=True)]
            return list(zip(encoded["input_ids"], labels, strict=True))
        ids = self._ids([document.text for document in documents])
        return [(row, self._of_row(document)) for row, document in zip(ids, documents, strict=True)]

    def _of_row(self, document: Document) -> list[int]:
        if isinstance(document.labels, list):  # several at once; those that are no class are left out
            held = {self._number(name, document) for name in document.labels}
            return [int(number in held) for number in range(len(self.classes))]
        number = self._number(document.labels, document)
        return [IGNORE_INDEX if number is None else number]

    def _of_tokens(self, document: Document, words: list[int | None]) -> list[int]:
        """A word's class is its first token's to predict."""
        begins = [word is not None and (i == 0 or words[i - 1] != word) for i, word in enumerate(words)]
        numbers = [self._number(name, document) for name in document.labels]
        chosen = [numbers[word] if first else None for word, first in zip(words, begins, strict=True)]
        return [IGNORE_INDEX if number is None else number for number in chosen]

    def _number(self, name, document: Document) -> int | None:
        """None for what is no class: left out by `--num_labels`, not in the rows to train on, or unknown (None, -1)."""
        outside = self.listed and name is not None and not -1 <= name < len(self.classes)
        if outside:
            column, last = self.config.dataset_label_field, len(self.classes) - 1
            raise self._malformed(document.row, f"{column} is {name}, and the classes are 0 to {last}")
        return self.numbers.get(name)


def check_classes(config: TrainConfig) -> None:
    """Raises UserError where a setting has no effect on, or is missing for, `--task_type`."""
    task = TASKS[config.task_type]
    label, names = config.dataset_label_field, ("dataset_label_field", "num_labels")
    if task.has_classes:
        require(label, "task_type", task.name, "needs --dataset_label_field COLUMN")
        require(
            not config.streaming, "streaming", True, f"cannot be had with {task.name}: its classes are counted first"
        )
    else:
        for name in names:
            value = getattr(config, name)
            require(value is None, name, value, f"has no effect with --task_type {task.name}")
    if task.name != "CAUSAL_LM":
        require(not config.packing, "packing", True, "cannot be had with --task_type " + task.name)
        split = config.overlong_rows == "split"
        require(not split, "overlong_rows", "split", f"cannot be had with --task_type {task.name}; truncate or drop")
        if config.sample_prompt:
            raise UserError(f"--sample_prompt {config.sample_prompt}: only CAUSAL_LM completes a prompt")
