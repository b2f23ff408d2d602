"""Examples to rows of token ids: tokenized once per machine, checked, and mapped from a cache by every start after it.

It all happens before the ranks meet, under a file lock: no collective waits for a tokenizer, and none can time out.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lora_dist.config import TrainConfig
from lora_dist.data.classes import check_classes, choose_encoder
from lora_dist.data.formats import Encoded, Encoder
from lora_dist.data.sources import Examples, as_examples, load_examples, read_batches, unwritable
from lora_dist.data.tasks import IGNORE_INDEX, TASKS
from lora_dist.errors import UserError, require

VERSION = 1  # of what is in the cache: raise it when the same data would give other rows
SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})
FATES = {"truncate": "cut off", "split": "cut into several rows", "drop": "left out"}


@dataclass
class Counts:
    """What became of the examples of one split."""

    examples: int = 0
    empty: int = 0  # left out
    overlong: int = 0
    untrained: int = 0  # without a token to train on: left out
    repeated: int = 0
    odd: int = 0  # with NUL or replacement characters
    rows: int = 0
    tokens: int = 0
    trained: int = 0

    def warnings(self, split: str, overlong_rows: str, max_length: int) -> list[str]:
        whats = {
            "are empty: left out": self.empty,
            f"are longer than --max_length {max_length}: {FATES[overlong_rows]}": self.overlong,
            "have no token to train on: left out": self.untrained,
            "repeat an earlier one": self.repeated,
            "hold NUL characters, or U+FFFD, which stands for bytes that were not text": self.odd,
        }
        return [f"{count} of {self.examples} {split} examples {what}" for what, count in whats.items() if count]


class Rows:
    """Rows of token ids, mapped from disk: {"input_ids": int64 (T,), "labels": int64 (T,)} each."""

    def __init__(self, table: Dataset):
        self.table = table.with_format("numpy")
        self.lengths = pc.list_value_length(table.data.column("input_ids")).to_numpy()  # tokens of each row

    @classmethod
    def of(cls, rows: list[Encoded]) -> "Rows":
        ids, labels = zip(*rows, strict=True) if rows else ((), ())
        return cls(Dataset(pa.table({"input_ids": ids, "labels": labels}, schema=SCHEMA)))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.table[int(index)]


@dataclass(frozen=True)
class RowStream:
    """Rows of a stream: those of one pass over it, from its beginning each time it is iterated."""

    examples: Examples
    encoder: Encoder
    config: TrainConfig

    def __iter__(self) -> Iterator[Encoded]:
        counts = Counts()
        yield from encode(self.examples.train, self.encoder, self.config, counts, set())
        _require_rows(counts, self.config)


@dataclass(frozen=True)
class PreparedData:
    train: Rows | RowStream
    held_out: Rows
    counts: dict[str, Counts]  # by split
    format: str
    config: TrainConfig
    in_both: int = 0  # held-out examples that are trained on too
    classes: list[str] | None = None  # of SEQ_CLS and TOKEN_CLS, by their number

    def warnings(self) -> list[str]:
        how = self.config.overlong_rows, self.config.max_length
        found = [line for split, counts in self.counts.items() for line in counts.warnings(split, *how)]
        return found + ([f"{self.in_both} held-out examples are trained on too"] if self.in_both else [])

    def fingerprint(self) -> str | None:
        """Of the rows' lengths and of a hundred rows; None of a stream."""
        if isinstance(self.train, RowStream):
            return None
        digest = hashlib.sha256()
        for rows in (self.train, self.held_out):
            digest.update(rows.lengths.tobytes())
            for i in range(0, len(rows), max(1, len(rows) // 100)):
                digest.update(str(rows[i]).encode())
        return digest.hexdigest()

    def first(self, count: int) -> list[dict]:
        """Rows to look at."""
        if isinstance(self.train, RowStream):
            return [{"input_ids": ids, "labels": labels} for ids, labels in islice(self.train, count)]
        return [self.train[i] for i in range(min(count, len(self.train)))]

    def table(self) -> str:
        lines = [f"data: {self.config.dataset_name} ({self.format}), rows of up to {self.config.max_length} tokens"]
        names = ("examples", "rows", "tokens", "trained")
        lines.append(f"{'':10}" + "".join(f"{name:>12}" for name in (*names, "median", "longest")))
        for split, counts in self.counts.items():
            lengths = (self.train if split == "train" else self.held_out).lengths
            figures = [getattr(counts, name) for name in names] + [int(np.median(lengths)), int(lengths.max())]
            lines.append(f"{split:10}" + "".join(f"{figure:>12}" for figure in figures))
        if isinstance(self.train, RowStream):
            lines.append("train: a stream, read and checked while it is trained on")
        return "\n".join(lines + [f"warning: {line}" for line in self.warnings()])


def prepare_rows(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, transform: Callable[[dict], dict] | None = None
) -> PreparedData:
    """The rows to train on and those held out. Raises UserError where the data cannot be trained on.

    `transform` makes an example of one format of another one; not for classes. The first process on a machine
    tokenizes, the others wait for it; a second start reads the cache.
    """
    check_classes(config)
    examples = load_examples(config, transform)
    encoder = choose_encoder(tokenizer, config, examples)
    if config.streaming:
        data = _prepare_stream(examples, encoder, config)
    else:
        folder = _tokenize_once(examples, encoder, config)
        report = json.loads((folder / "report.json").read_text())
        splits = [Rows(Dataset.from_file(str(folder / f"{split}.arrow"))) for split in ("train", "held-out")]
        counts = {split: Counts(**counts) for split, counts in report["counts"].items()}
        classes = getattr(encoder, "classes", None)
        data = PreparedData(*splits, counts, encoder.format, config, report["in_both"], classes)
    if config.strict and data.warnings():
        raise UserError(f"--strict True: the data would be warned of: {'; '.join(data.warnings())}")
    return data


def _prepare_stream(examples: Examples, encoder: Encoder, config: TrainConfig) -> PreparedData:
    held_out, counts = Counts(), {}
    rows = list(encode(examples.held_out, encoder, config, held_out, set())) if examples.held_out else []
    if rows:
        counts["held-out"] = held_out
    stream = RowStream(examples, encoder, config)
    next(iter(stream))  # raises what can be said of the beginning
    return PreparedData(stream, Rows.of(rows), counts, encoder.format, config)


def _tokenize_once(examples: Examples, encoder: Encoder, config: TrainConfig) -> Path:
    """The cache's folder for these examples, tokenizer and settings: written whole, or not there."""
    root = Path(datasets.config.HF_DATASETS_CACHE) / "lora-dist-rows"
    folder = root / _key(examples, encoder, config)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if not folder.exists():
                partial = folder.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
                partial.mkdir()
                _tokenize(examples, encoder, config, partial)
                partial.rename(folder)
    except OSError as error:
        raise unwritable(config.dataset_name, error) from None
    return folder


def _locked(path: Path) -> AbstractContextManager:
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=10)
    except Timeout:
        print(f"waiting for the process that tokenizes: {path}", file=sys.stderr, flush=True)
        return lock.acquire()


def _key(examples: Examples, encoder: Encoder, config: TrainConfig) -> str:
    tokenizer = encoder.tokenizer
    words = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    settings = ("task_type", "dataset_text_field", "train_on_inputs", "max_length", "overlong_rows")
    settings += ("dataset_label_field", "num_labels")
    parts = [VERSION, examples.identity, type(tokenizer).__name__, words, tokenizer.eos_token, tokenizer.chat_template]
    parts += [encoder.format, *(getattr(config, name) for name in settings)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _tokenize(examples: Examples, encoder: Encoder, config: TrainConfig, folder: Path) -> None:
    splits, seen = {"train": examples.train, "held-out": examples.held_out or []}, {}
    counts = {split: Counts() for split in splits}
    for split, rows in splits.items():
        seen[split] = set()
        with pa.OSFile(str(folder / f"{split}.arrow"), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            for block in _blocks(encode(rows, encoder, config, counts[split], seen[split]), 1000):
                ids, labels = zip(*block, strict=True)
                writer.write_batch(pa.record_batch({"input_ids": ids, "labels": labels}, schema=SCHEMA))
        if split == "train":
            _require_rows(counts[split], config)
    report = {
        "counts": {split: asdict(found) for split, found in counts.items() if found.rows},
        "in_both": len(seen["train"] & seen["held-out"]),
    }
    (folder / "report.json").write_text(json.dumps(report))


def _blocks(rows: Iterator[Encoded], size: int) -> Iterator[list[Encoded]]:
    block = []
    for row in rows:
        block.append(row)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


def _require_rows(counts: Counts, config: TrainConfig) -> None:
    found = "; ".join(counts.warnings("train", config.overlong_rows, config.max_length))
    require(counts.rows, "dataset_name", config.dataset_name, f"has no text to train on: {found}")


def encode(
    examples: Dataset | IterableDataset | list, encoder: Encoder, config: TrainConfig, counts: Counts, seen: set[bytes]
) -> Iterator[Encoded]:
    """The rows of the examples, none longer than `--max_length`; fills `counts`, and `seen` with the rows' hashes."""
    if not examples:
        return
    total = None if isinstance(examples, IterableDataset) else len(examples)
    terminal = sys.stderr.isatty()  # a log file hears of it only where it takes long
    wait = {"delay": 1} if terminal else {"delay": 30, "mininterval": 30}
    with tqdm(total=total, desc="tokenizing", unit=" examples", disable=total is None, **wait) as bar:
        for batch in read_batches(examples, config.dataset_name):
            documents = [encoder.read(example, counts.examples + i) for i, example in enumerate(as_examples(batch), 1)]
            counts.examples += len(documents)
            full = [document for document in documents if not document.is_empty]
            counts.empty += len(documents) - len(full)
            counts.odd += sum("\0" in document.text or "\ufffd" in document.text for document in full)
            for row in encoder(full):
                yield from _checked(row, config, counts, seen)
            bar.update(len(documents))


def _checked(row: Encoded, config: TrainConfig, counts: Counts, seen: set[bytes]) -> Iterator[Encoded]:
    task = TASKS[config.task_type]
    pieces = cut(*row, config.max_length, config.overlong_rows, labels_each_token=task.labels_each_token)
    counts.overlong += max(map(len, row)) > config.max_length
    trained = [piece for piece in pieces if task.is_trained(piece[1])]
    counts.untrained += bool(pieces) and not trained
    if trained and not config.streaming:  # of a stream nothing is remembered
        digest = hashlib.blake2b(str(row).encode(), digest_size=8).digest()
        counts.repeated += digest in seen
        seen.add(digest)
    for ids, labels in trained:
        counts.rows += 1
        counts.tokens += len(ids)
        counts.trained += sum(label != IGNORE_INDEX for label in labels[task.first :])
        yield ids, labels


def cut(
    ids: list[int], labels: list[int], max_length: int, overlong_rows: str, *, labels_each_token: bool = True
) -> list[Encoded]:
    """The pieces of a row that fit: one, or as `--overlong_rows` says. The end of a text stays its last piece's end."""
    if len(ids) <= max_length and len(labels) <= max_length:
        return [(ids, labels)]
    starts = {"truncate": [0], "split": range(0, len(ids), max_length), "drop": []}[overlong_rows]
    if not labels_each_token:
        return [(ids[:max_length], labels[:max_length]) for _ in starts]
    return [(ids[start : start + max_length], labels[start : start + max_length]) for start in starts]
