"""Rows of token ids: tokenized once per machine, checked, and read from a cache by every later start.

All this happens before the ranks meet, under a file lock. So no collective waits for a tokenizer, and none can time out
because of one.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lora_dist.config import TrainConfig
from lora_dist.data.classes import check_task_settings, choose_encoder
from lora_dist.data.encode import Counts, encode
from lora_dist.data.formats import Encoded, Encoder
from lora_dist.data.sources import Examples, load_examples, unwritable_cache
from lora_dist.data.tasks import TASKS
from lora_dist.errors import UserError, require
from lora_dist.files import MANIFEST, is_complete, locked, made_whole, write_manifest

# Version of the cache's files. Raise it if the same data would give other rows, or if the files change.
CACHE_VERSION = 5
ROW_FILES = ("train.arrow", "held-out.arrow", "report.json", f"{MANIFEST}*")
SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})


class Rows:
    """Rows of token ids, mapped from disk. Each is {"input_ids": int64 (T,), "labels": int64 (L,)}.

    Pairs have two adjacent rows each, and with `reference` set each row has its "reference" too.
    """

    reference: np.ndarray | None = None  # of pairs: the log-probability of each row under the reference, float32

    def __init__(self, table: Dataset):
        self.table = table.with_format("numpy")
        self.lengths = pc.list_value_length(table.data.column("input_ids")).to_numpy()  # tokens of each row
        self.label_lengths = pc.list_value_length(table.data.column("labels")).to_numpy()

    @classmethod
    def of(cls, rows: list[Encoded]) -> "Rows":
        """Rows in memory."""
        ids, labels = zip(*rows, strict=True) if rows else ((), ())
        return cls(Dataset(pa.table({"input_ids": ids, "labels": labels}, schema=SCHEMA)))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = self.table[int(index)]
        return row if self.reference is None else row | {"reference": float(self.reference[index])}

    def digest(self) -> str:
        """Hash of all tokens and labels."""
        digest = hashlib.sha256(self.lengths.tobytes() + self.label_lengths.tobytes())
        for name in SCHEMA.names:
            for chunk in self.table.data.column(name).chunks:
                digest.update(chunk.flatten().to_numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class RowStream:
    """The rows of `--streaming true`: iterating gives (token ids, labels) of one pass, from the beginning each time.

    Raises UserError while it is iterated, if the data cannot be read.
    """

    examples: Examples
    encoder: Encoder
    config: TrainConfig

    def __iter__(self) -> Iterator[Encoded]:
        counts = Counts()
        yield from encode(self.examples.train, self.encoder, self.config, counts, set())
        _require_rows(counts, self.config)


@dataclass(frozen=True)
class PreparedData:
    """The data of a run, and what was found in it."""

    train: Rows | RowStream
    held_out: Rows
    counts: dict[str, Counts]  # by split, "train" and "held-out"; without a stream and without empty splits
    format: str
    config: TrainConfig
    num_held_out_in_train: int = 0  # held-out examples that are training examples too
    classes: list[str] | None = None  # names of a classifier's classes, by class number
    unread: tuple[str, ...] = ()  # columns of the data set that its format does not read

    def warnings(self) -> list[str]:
        settings = self.config.overlong_rows, self.config.max_length
        found = [line for split, counts in self.counts.items() for line in counts.warnings(split, *settings)]
        in_both = self.num_held_out_in_train
        return found + ([f"{in_both} held-out examples are also training examples"] if in_both else [])

    def fingerprint(self) -> str | None:
        """Hash of the lengths of all rows and of the tokens of about 100 rows per split; None for a stream."""
        if isinstance(self.train, RowStream):
            return None
        digest = hashlib.sha256()
        for rows in (self.train, self.held_out):
            digest.update(rows.lengths.tobytes())
            for i in range(0, len(rows), max(1, len(rows) // 100)):
                digest.update(str(rows[i]).encode())
        return digest.hexdigest()

    def first_rows(self, count: int) -> list[dict]:
        """Up to `count` training rows, as {"input_ids", "labels"}, to look at."""
        if isinstance(self.train, RowStream):
            return [{"input_ids": ids, "labels": labels} for ids, labels in islice(self.train, count)]
        return [self.train[i] for i in range(min(count, len(self.train)))]

    def table(self) -> str:
        """The counts of each split, with median and longest row in tokens, and the warnings. Several lines."""
        lines = [f"data: {self.config.dataset_name} ({self.format}), rows of up to {self.config.max_length} tokens"]
        names = ("examples", "rows", "tokens", "trained", "median", "longest")
        lines += [f"columns that are not read: {', '.join(self.unread)}"] if self.unread else []
        lines.append(f"{'':10}" + "".join(f"{name:>12}" for name in names))
        for split, counts in self.counts.items():
            lengths = (self.train if split == "train" else self.held_out).lengths
            figures = [counts.examples, counts.rows, counts.tokens, counts.trained_tokens]
            figures += [int(np.median(lengths)), int(lengths.max())]
            lines.append(f"{split:10}" + "".join(f"{figure:>12}" for figure in figures))
        if isinstance(self.train, RowStream):
            lines.append("train: a stream, which is read and checked during training")
        return "\n".join(lines + [f"warning: {line}" for line in self.warnings()])


def prepare_rows(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, transform: Callable[[dict], dict] | None = None
) -> PreparedData:
    """The training rows and the held-out rows. Raises UserError if the data cannot be trained on.

    `transform` maps an example to the columns of a format; it is not supported for classifiers. The first process on a
    machine tokenizes and the others wait for it; later starts read the cache.
    """
    check_task_settings(config)
    why = "is not supported by this recipe, which makes prompts and completions; use recipes/quotes_tags.py"
    require(not (transform and TASKS[config.task_type].has_classes), "task_type", config.task_type, why)
    examples = load_examples(config, transform)
    encoder = choose_encoder(tokenizer, config, examples)
    prepare = _prepare_stream if config.streaming else _prepare_cached
    data = prepare(examples, encoder, config)
    if config.strict and data.warnings():
        raise UserError(f"--strict True: the data causes warnings: {'; '.join(data.warnings())}")
    return data


def _prepare_stream(examples: Examples, encoder: Encoder, config: TrainConfig) -> PreparedData:
    held_out, counts = Counts(), {}
    rows = list(encode(examples.held_out, encoder, config, held_out, set())) if examples.held_out else []
    if rows:
        counts["held-out"] = held_out
    stream = RowStream(examples, encoder, config)
    next(iter(stream))  # so that an unreadable stream is refused here, before a model is loaded
    return PreparedData(stream, Rows.of(rows), counts, encoder.format, config, unread=tuple(encoder.unread))


def _prepare_cached(examples: Examples, encoder: Encoder, config: TrainConfig) -> PreparedData:
    folder = _tokenize_once(examples, encoder, config)
    report = json.loads((folder / "report.json").read_text())
    train, held_out = (Rows(Dataset.from_file(str(folder / f"{split}.arrow"))) for split in ("train", "held-out"))
    counts = {split: Counts(**counts) for split, counts in report["counts"].items()}
    classes = getattr(encoder, "classes", None)
    in_both, unread = report["num_held_out_in_train"], tuple(report["unread"])
    return PreparedData(train, held_out, counts, encoder.format, config, in_both, classes, unread)


def _tokenize_once(examples: Examples, encoder: Encoder, config: TrainConfig) -> Path:
    """The cache's folder for these examples, tokenizer and settings. It exists under this name only when complete."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lora-dist-rows" / _cache_key(examples, encoder, config)
    try:
        if not is_complete(folder):
            with locked(folder.with_suffix(".lock"), "waiting for the process that tokenizes this data"):
                if not is_complete(folder):
                    with made_whole(folder, lambda _: ROW_FILES) as new:
                        _tokenize(examples, encoder, config, new)
                        write_manifest(new)
    except OSError as error:
        raise unwritable_cache(config.dataset_name, error) from None
    return folder


def _cache_key(examples: Examples, encoder: Encoder, config: TrainConfig) -> str:
    tokenizer = encoder.tokenizer
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    settings = ("task_type", "dataset_text_field", "train_on_inputs", "max_length", "overlong_rows")
    settings += ("dataset_label_field", "num_labels")
    parts = [CACHE_VERSION, examples.identity, type(tokenizer).__name__, vocabulary]
    parts += [version(package) for package in ("transformers", "tokenizers", "jinja2")]
    parts += [tokenizer.eos_token, tokenizer.chat_template, encoder.format]
    parts += [getattr(config, name) for name in settings]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _tokenize(examples: Examples, encoder: Encoder, config: TrainConfig, folder: Path) -> None:
    """Write train.arrow, held-out.arrow and report.json into the folder."""
    splits, hashes = {"train": examples.train, "held-out": examples.held_out or []}, {}
    counts = {split: Counts() for split in splits}
    for split, split_examples in splits.items():
        hashes[split] = set()
        with pa.OSFile(str(folder / f"{split}.arrow"), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            for block in _blocks(encode(split_examples, encoder, config, counts[split], hashes[split]), 1000):
                ids, labels = zip(*block, strict=True)
                writer.write_batch(pa.record_batch({"input_ids": ids, "labels": labels}, schema=SCHEMA))
        if split == "train":
            _require_rows(counts[split], config)
        elif counts[split].examples:
            found = "; ".join(counts[split].warnings(split, config.overlong_rows, config.max_length))
            why = f"its {counts[split].examples} held-out examples give no row to evaluate on: {found}"
            require(counts[split].rows, "dataset_name", config.dataset_name, why)
    report = {
        "counts": {split: asdict(found) for split, found in counts.items() if found.rows},
        "num_held_out_in_train": len(hashes["train"] & hashes["held-out"]),
        "unread": encoder.unread,
    }
    (folder / "report.json").write_text(json.dumps(report))


def _blocks(rows: Iterator[Encoded], size: int) -> Iterator[list[Encoded]]:
    while block := list(islice(rows, size)):
        yield block


def _require_rows(counts: Counts, config: TrainConfig) -> None:
    found = "; ".join(counts.warnings("train", config.overlong_rows, config.max_length))
    require(counts.rows, "dataset_name", config.dataset_name, f"has no text to train on: {found}")
