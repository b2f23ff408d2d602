"""Sources of examples: the hub, local files, a saved data set. All are read through the package `datasets`."""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from datasets import Dataset, DatasetDict, IterableDataset

from lora_dist.config import TrainConfig
from lora_dist.embedded import dataset_dir
from lora_dist.errors import UserError, require
from lora_dist.seeds import random_key

LOADER_OF_SUFFIX = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Examples:
    """The records of a data set, before they are tokenized."""

    train: Dataset | IterableDataset
    held_out: Dataset | IterableDataset | None
    columns: list[str]
    identity: str  # hash of their content and of how they were split and changed: equal for equal examples


def load_examples(config: TrainConfig, transform: Callable[[dict], dict] | None = None) -> Examples:
    """The training and held-out examples of `--dataset_name`, with columns renamed and `transform` applied.

    Raises UserError if the data set, a split or a column is not found, or if there are no examples.
    """
    name = config.dataset_name
    splits = _read(name, config)
    train, held_out = _choose_splits(splits, config)
    identity = [_identity(name, train), config.dataset_config, config.dataset_train_split, config.dataset_test_split]
    if held_out is None and config.eval_fraction:
        identity += [config.eval_fraction, config.seed]
        train, held_out = _hold_out(train, config)
    if not config.streaming:
        require(len(train), "dataset_name", name, f"its split {config.dataset_train_split} is empty")
    columns = train.column_names or list(peek(train, name, 1)[0])  # some streams know their columns only when read
    renamed = _renaming(columns, config)
    if renamed:
        train, held_out = train.rename_columns(renamed), held_out and held_out.rename_columns(renamed)
    columns = [renamed.get(column, column) for column in columns]
    if transform:
        train, held_out = (split and _transformed(split, transform, columns, name) for split in (train, held_out))
        columns, renamed = list(peek(train, name, 1)[0]), [renamed, inspect.getsource(transform)]
    digest = hashlib.sha256(json.dumps([identity, renamed]).encode())
    return Examples(train, held_out, columns, digest.hexdigest())


def _choose_splits(
    splits: DatasetDict, config: TrainConfig
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """(split to train on, split to hold out, or None if there is none)."""
    train, test = config.dataset_train_split, config.dataset_test_split
    _require_split(splits, "dataset_train_split", train, config.dataset_name)
    if test not in (None, "none"):
        _require_split(splits, "dataset_test_split", test, config.dataset_name)
        return splits[train], splits[test]
    if test is None and "test" in splits and train != "test":
        return splits[train], splits["test"]
    why = "cannot hold out a fraction of a stream; give --eval_fraction 0, or --dataset_test_split NAME"
    require(not (config.eval_fraction and config.streaming), "streaming", True, why)
    return splits[train], None


def _transformed(split, transform: Callable[[dict], dict], columns: list[str], name: str) -> Dataset | IterableDataset:
    """The split with the function applied to each example when it is read, by the process that tokenizes."""

    def checked(example: dict) -> dict:
        try:
            return transform(example)
        except KeyError as error:
            raise UserError(f"--dataset_name {name}: has no column {error}; it has {', '.join(columns)}") from None

    if isinstance(split, IterableDataset):
        return split.map(checked, remove_columns=columns)
    return split.with_transform(lambda batch: _as_columns([checked(example) for example in as_examples(batch)]))


def as_examples(batch: dict[str, list]) -> list[dict]:
    """A batch of columns as a list of examples."""
    return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]


def _as_columns(examples: list[dict]) -> dict[str, list]:
    return {name: [example[name] for example in examples] for name in examples[0]}


def read_batches(examples: Dataset | IterableDataset, name: str, size: int = 1000) -> Iterator[dict[str, list]]:
    """The examples, `size` at a time, as {column: values}. Raises UserError if a stream turns out to be unreadable."""
    batches = iter(examples.iter(batch_size=size))
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except UserError:
            raise
        except Exception as error:
            raise _unreadable(name, error) from None
        yield batch


def _hold_out(train: Dataset, config: TrainConfig) -> tuple[Dataset, Dataset]:
    """(examples to train on, examples to hold out). `--seed` decides which."""
    num_held_out = int(len(train) * config.eval_fraction)
    generator = torch.Generator().manual_seed(random_key(config.seed, "held out"))
    order = torch.randperm(len(train), generator=generator).tolist()
    return train.select(sorted(order[num_held_out:])), train.select(sorted(order[:num_held_out]))


def _read(name: str, config: TrainConfig) -> DatasetDict:
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error repeats what it would log
    path, streaming = Path(name), config.streaming
    try:
        if embedded := dataset_dir(name):
            files = {split: str(embedded / f"{split}.jsonl") for split in ("train", "test")}
            return datasets.load_dataset("json", data_files=files, streaming=streaming)
        if path.suffix in LOADER_OF_SUFFIX:
            require(path.is_file(), "dataset_name", name, "no such file")
            require(path.stat().st_size, "dataset_name", name, "is an empty file")
            loader = LOADER_OF_SUFFIX[path.suffix]
            return datasets.load_dataset(loader, data_files={"train": str(path)}, streaming=streaming)
        if _is_saved(path):
            require(not streaming, "streaming", True, f"has no effect on {name}, which is mapped from disk")
            saved = datasets.load_from_disk(name)
            return saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
        return datasets.load_dataset(name, config.dataset_config, streaming=streaming)
    except UserError:
        raise
    except Exception as error:  # datasets raises many types; all mean that this name cannot be read
        raise _unreadable(name, error) from None


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _unreadable(name: str, error: Exception) -> UserError:
    """The one-line error for an exception of datasets."""
    while error.__cause__:  # the outer exceptions only say that something went wrong
        error = error.__cause__
    if isinstance(error, OSError) and str(datasets.config.HF_DATASETS_CACHE) in str(error.filename):
        return unwritable_cache(name, error)
    text = str(error).strip()
    if isinstance(error, IndexError) or "corresponds to no data" in text:  # what datasets raises for an empty one
        return UserError(f"--dataset_name {name}: holds no examples")
    reason = _first_bad_line(Path(name)) or (text.splitlines()[0].rstrip(".") if text else type(error).__name__)
    suffixes = " ".join(LOADER_OF_SUFFIX)
    hint = f"give a hub name, a directory, or a file ending in {suffixes}"
    return UserError(f"--dataset_name {name}: cannot be loaded: {reason}; {hint}")


def unwritable_cache(name: str, error: OSError) -> UserError:
    cache, why = datasets.config.HF_DATASETS_CACHE, error.strerror or str(error)
    hint = "set HF_DATASETS_CACHE to another directory"
    return UserError(f"--dataset_name {name}: cannot be cached in {cache}: {why}; {hint}")


def _first_bad_line(path: Path) -> str | None:
    """The number of the first line that cannot be read, and why; None if the file type has no lines or all are fine.

    datasets counts lines from 0 and within blocks, or gives no number.
    """
    if path.suffix not in (".json", ".jsonl", ".csv", ".txt") or not path.is_file():
        return None
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = line[error.start]
                return f"line {number}: byte 0x{byte:02x} is not UTF-8; convert the file to UTF-8"
            if path.suffix == ".jsonl" and text.strip():
                try:
                    row = json.loads(text)
                except ValueError as error:
                    return f"line {number}: {error.msg}, at character {error.pos + 1}"
                if not isinstance(row, dict):
                    return f"line {number}: holds a {type(row).__name__}, not an object whose keys are the columns"
    return None


def _require_split(splits: Iterable[str], setting: str, split: str, name: str) -> None:
    require(split in splits, setting, split, f"no such split: {name} has {', '.join(splits)}")


def _renaming(columns: list[str], config: TrainConfig) -> dict[str, str]:
    """`--rename_columns` as {old: new}. Raises UserError if a column is missing, or if two would get one name."""
    renamed: dict[str, str] = {}
    for pair in config.rename_columns or ():
        old, new = pair.split("=", 1)
        has = f"{config.dataset_name} has {', '.join(columns)}"
        require(old in columns, "rename_columns", pair, f"no column {old}: {has}")
        require(old not in renamed, "rename_columns", pair, f"{old} is renamed to {renamed.get(old)} already")
        renamed[old] = new
    after = [renamed.get(column, column) for column in columns]
    for old, new in renamed.items():
        others = [column for column, name in zip(columns, after, strict=True) if name == new and column != old]
        why = f"column {', '.join(others)} would have the name {new} too; give each column a name of its own"
        require(not others, "rename_columns", f"{old}={new}", why)
    return renamed


def _identity(name: str, train: Dataset | IterableDataset) -> str:
    """Hash of the bytes of a local source; for a hub name, the fingerprint that datasets computes."""
    path = dataset_dir(name) or Path(name)
    if not path.exists():
        return f"{name} {getattr(train, '_fingerprint', '')}"
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as opened:
                digest.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()


def peek(examples: Dataset | IterableDataset, name: str, count: int) -> list[dict]:
    """The first examples, up to `count`. Raises UserError if there are none."""
    batch = next(read_batches(examples, name, count), None)
    require(batch, "dataset_name", name, "holds no examples")
    return as_examples(batch)
