"""From examples to rows of token ids: read, encoded, cut to length, checked and counted."""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from datasets import Dataset, IterableDataset
from tqdm import tqdm

from lora_dist.boundary import boundary
from lora_dist.config import TrainConfig
from lora_dist.data.formats import Document, Encoded, Encoder
from lora_dist.data.sources import ORIGIN, as_examples, read_batches, where_from
from lora_dist.data.tasks import IGNORE_INDEX, task_of

WHAT_HAPPENS = {"truncate": "cut off", "split": "cut into several rows", "drop": "left out"}  # to overlong rows


MAX_NOTES = 20  # of parts of chats; data can have any number of keys


@dataclass
class Counts:
    """What became of the examples of one split."""

    examples: int = 0
    empty: int = 0  # left out
    overlong: int = 0  # longer than --max_length
    without_trained_tokens: int = 0  # left out
    repeated: int = 0  # the same as an earlier one; not counted for a stream
    with_bad_characters: int = 0  # NUL, or U+FFFD
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    left_out: dict[str, list] = field(default_factory=dict)  # parts of chats: what -> [number of examples, the first]

    def note(self, what: str, where: str) -> None:
        """Count an example of which something is not shown or not trained."""
        if what not in self.left_out and len(self.left_out) >= MAX_NOTES:
            what = "have other parts that are left out"
        self.left_out.setdefault(what, [0, where])[0] += 1

    def warnings(self, split: str, overlong_rows: str, max_length: int) -> list[str]:
        count_of = {
            "are empty: left out": self.empty,
            f"are longer than --max_length {max_length}: {WHAT_HAPPENS[overlong_rows]}": self.overlong,
            "have no token to train on: left out": self.without_trained_tokens,
            "repeat an earlier one": self.repeated,
            "contain NUL characters, or U+FFFD, which replaces bytes that are not text": self.with_bad_characters,
        }
        found = [f"{count} of {self.examples} {split} examples {what}" for what, count in count_of.items() if count]
        noted = self.left_out.items()
        return found + [f"{n} of {self.examples} {split} examples {what}; first: {first}" for what, (n, first) in noted]


def encode(
    examples: Dataset | IterableDataset | list,
    encoder: Encoder,
    config: TrainConfig,
    counts: Counts,
    row_hashes: set[bytes],
) -> Iterator[Encoded]:
    """Rows of (token ids, labels), none longer than `--max_length`. Raises UserError if an example cannot be read.

    Fills `counts`, and, unless the data is streamed, `row_hashes` with the 8-byte hash of each encoded example.
    """
    if not examples:
        return
    total = None if isinstance(examples, IterableDataset) else len(examples)
    # In a log file, the progress bar appears only after 30 s, and then at most every 30 s.
    timing = {"delay": 1} if sys.stderr.isatty() else {"delay": 30, "mininterval": 30}
    with tqdm(total=total, desc="tokenizing", unit=" examples", disable=total is None, **timing) as bar:
        for batch in read_batches(examples, config.dataset_name):
            documents = [
                _read(example, encoder, config, counts.examples + i) for i, example in enumerate(as_examples(batch), 1)
            ]
            counts.examples += len(documents)
            filled = [document for document in documents if not document.is_empty]
            counts.empty += len(documents) - len(filled)
            counts.with_bad_characters += sum("\0" in doc.text or "\ufffd" in doc.text for doc in filled)
            rows = encoder(filled)
            for what, where in dict.fromkeys(encoder.take_left_out()):
                counts.note(what, where.removeprefix(f"--dataset_name {config.dataset_name}: "))
            for of_example in zip(*[iter(rows)] * task_of(config).rows_per_example, strict=True):
                yield from _cut_and_count(of_example, config, counts, row_hashes)
            bar.update(len(documents))


def _read(example: dict, encoder: Encoder, config: TrainConfig, number: int) -> Document:
    """The example's columns, read by the encoder. `number`: of the example in its split, from 1. Raises UserError."""
    origin = example.pop(ORIGIN, number)
    if isinstance(origin, str):  # a line of a text file, whose values are as they stand there
        return encoder.read(example, origin)
    where = where_from(origin)
    with boundary(f"--dataset_name {config.dataset_name}: {where}"):  # it may be nested too deep
        example = {column: _without_added_nulls(value) for column, value in example.items()}
    return encoder.read(example, where)


def _without_added_nulls(value):
    """Without the keys that are null: Arrow adds them wherever another row has that key."""
    if isinstance(value, dict):
        return {key: _without_added_nulls(item) for key, item in value.items() if item is not None}
    return [_without_added_nulls(item) for item in value] if isinstance(value, list) else value


def _cut_and_count(
    rows: tuple[Encoded, ...], config: TrainConfig, counts: Counts, row_hashes: set[bytes]
) -> Iterator[Encoded]:
    """`rows`: of one example; the two of a pair are kept or left out together. Equal ones would train nothing."""
    task = task_of(config)
    settings = {"overlong_rows": config.overlong_rows, "labels_each_token": task.labels_each_token}
    parts = list(zip(*(cut(*row, config.max_length, **settings) for row in rows), strict=False))
    counts.overlong += max(len(part) for row in rows for part in row) > config.max_length
    differ = [group for group in parts if len(group) == 1 or group[0] != group[1]]
    kept = [group for group in differ if all(task.has_trained_tokens(labels) for _, labels in group)]
    counts.without_trained_tokens += bool(parts) and not kept
    if kept and not config.streaming:  # the hashes of a stream would fill the memory
        digest = hashlib.blake2b(str(rows).encode(), digest_size=8).digest()
        counts.repeated += digest in row_hashes
        row_hashes.add(digest)
    for ids, labels in (row for group in kept for row in group):
        counts.rows += 1
        counts.tokens += len(ids)
        counts.trained_tokens += sum(label != IGNORE_INDEX for label in labels[task.first_predicted :])
        yield ids, labels


def cut(
    ids: list[int], labels: list[int], max_length: int, overlong_rows: str, *, labels_each_token: bool = True
) -> list[Encoded]:
    """Cut a row to parts of up to `max_length` tokens, as `--overlong_rows` asks. A row that fits is one part.

    Only the last part has the end of the text, and with it the eos token. `labels_each_token`: label t belongs to
    token t, so both are cut at the same position.
    """
    if len(ids) <= max_length and len(labels) <= max_length:
        return [(ids, labels)]
    starts = {"truncate": [0], "split": range(0, len(ids), max_length), "drop": []}[overlong_rows]
    if not labels_each_token:
        return [(ids[:max_length], labels[:max_length]) for _ in starts]
    return [(ids[start : start + max_length], labels[start : start + max_length]) for start in starts]
