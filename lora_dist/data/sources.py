"""Sources of examples: the hub, local files, a saved data set. All become data sets of the package `datasets`."""

import errno
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.packaged_modules.csv.csv import Csv

from lora_dist.boundary import boundary, one_line
from lora_dist.config import TrainConfig
from lora_dist.data.files.find import all_files, content_of, find_files, is_saved, one_kind, require_same_columns
from lora_dist.data.files.readers import TEXT_KINDS, WHAT_IS_READ, read_records
from lora_dist.data.files.tables import check_tables
from lora_dist.errors import UserError, require
from lora_dist.files import free_bytes
from lora_dist.functions import describe_function
from lora_dist.seeds import random_key
from lora_dist.units import size

MAX_COLUMNS = 1000
ORIGIN = "where the example is from"  # a column that we add, for messages: "line 7", "b.jsonl line 7", "example 7"


@dataclass(frozen=True)
class Examples:
    """The records of a data set, before they are tokenized. Each has the column ORIGIN too, unless it is streamed."""

    train: Dataset | IterableDataset
    held_out: Dataset | IterableDataset | None
    columns: list[str]
    identity: str  # hash of their content and of how they were split and changed: equal for equal examples


def load_examples(config: TrainConfig, transform: Callable[[dict], dict] | None = None) -> Examples:
    """The training and held-out examples of `--dataset_name`, with columns renamed and `transform` applied.

    Raises UserError if the data set, a split or a column is not found, or if there are no examples.
    """
    name = config.dataset_name
    splits, content = _read(name, config)
    train, held_out = _choose_splits(splits, config)
    content = content or f"{name} {getattr(train, '_fingerprint', '')}"
    identity = [content, config.dataset_config, config.dataset_train_split, config.dataset_test_split]
    if not config.streaming:
        require(len(train), "dataset_name", name, f"its split {config.dataset_train_split} is empty")
        train, held_out = _numbered(train), held_out and _numbered(held_out)
    if held_out is None and config.eval_fraction:
        identity += [config.eval_fraction, config.seed]
        train, held_out = _hold_out(train, config)
    columns = _columns(train, name)
    _check_columns(columns, held_out, config)
    renamed = _renaming(columns, config)
    columns = [renamed.get(column, column) for column in columns]
    if renamed:
        train, held_out = train.rename_columns(renamed), held_out and held_out.rename_columns(renamed)
    if transform:
        train, held_out = (split and _transformed(split, transform, columns, name) for split in (train, held_out))
        with boundary(f"the recipe's function {getattr(transform, '__name__', transform)}"):
            columns, renamed = _without_origin(peek(train, name, 1)[0]), [renamed, describe_function(transform)]
    digest = hashlib.sha256(json.dumps([identity, renamed]).encode())
    return Examples(train, held_out, columns, digest.hexdigest())


def _columns(split: Dataset | IterableDataset, name: str) -> list[str]:
    """The columns of the data. Some streams know them only when they are read."""
    return _without_origin(split.column_names or peek(split, name, 1)[0])


def _without_origin(names: Iterable[str]) -> list[str]:
    return [name for name in names if name != ORIGIN]


def _check_columns(columns: list[str], held_out: Dataset | IterableDataset | None, config: TrainConfig) -> None:
    """Raises UserError for a name that cannot be shown or typed, or if the held-out split lacks a column."""
    name = config.dataset_name
    odd = next((column for column in columns if not column.strip() or not column.isprintable()), None)
    why = f"has a column with the name {odd!r}; rename it: a name is text of one line"
    require(odd is None, "dataset_name", name, why)
    if held_out is not None:
        there = _columns(held_out, name)
        lacking = [column for column in columns if column not in there]
        why = f"lacks the column {', '.join(lacking)}, which {config.dataset_train_split} has; add it, or give none"
        require(not lacking, "dataset_test_split", config.dataset_test_split or "test", why)


def _numbered(split: Dataset) -> Dataset:
    """The split with the column ORIGIN; here, for data that has no lines, it holds the example's number from 1."""
    if ORIGIN in split.column_names:
        return split
    numbers = np.arange(1, len(split) + 1)
    return split.add_column(ORIGIN, numbers, new_fingerprint=f"{split._fingerprint}-numbered")


def _choose_splits(
    splits: dict[str, Dataset | IterableDataset], config: TrainConfig
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
        origin = {ORIGIN: example[ORIGIN]} if ORIGIN in example else {}
        try:
            return transform({column: example[column] for column in _without_origin(example)}) | origin
        except KeyError as error:
            raise UserError(f"--dataset_name {name}: has no column {error}; it has {', '.join(columns)}") from None

    if isinstance(split, IterableDataset):
        return split.map(checked, remove_columns=columns)
    as_stored = split.format["format_kwargs"].get("transform", lambda batch: batch)
    return split.with_transform(
        lambda batch: _as_columns([checked(example) for example in as_examples(as_stored(batch))])
    )


def where_from(origin: str | int) -> str:
    """The value of ORIGIN as messages show it."""
    return origin if isinstance(origin, str) else f"example {origin}"


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
        except Exception as error:
            raise _unreadable(name, error) from None
        yield batch


def _hold_out(train: Dataset, config: TrainConfig) -> tuple[Dataset, Dataset]:
    """(examples to train on, examples to hold out). `--seed` decides which."""
    num_held_out = int(len(train) * config.eval_fraction)
    generator = torch.Generator().manual_seed(random_key(config.seed, "held out"))
    order = torch.randperm(len(train), generator=generator).tolist()
    return train.select(sorted(order[num_held_out:])), train.select(sorted(order[:num_held_out]))


def _read(name: str, config: TrainConfig) -> tuple[dict[str, Dataset | IterableDataset], str | None]:
    """(the splits by name, hash of their content; None for the hub)."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error repeats what it would log
    with boundary(f"--dataset_name {name}"):
        files = find_files(name, config)
        path = Path(name).expanduser()
        content = content_of(files or ({"": all_files(path)} if path.is_dir() else {}))
    kind, streaming = one_kind(name, files), config.streaming
    try:
        if kind in TEXT_KINDS:
            return {split: _text_split(paths, streaming) for split, paths in files.items()}, content
        if files:
            check_tables(kind, [path for paths in files.values() for path in paths])
            data_files = {split: [str(path) for path in paths] for split, paths in files.items()}
            return datasets.load_dataset(kind, data_files=data_files, streaming=streaming), content
        if is_saved(path):
            require(not streaming, "streaming", True, f"has no effect on {name}, which is mapped from disk")
            saved = datasets.load_from_disk(str(path))
            return (saved if isinstance(saved, DatasetDict) else {"train": saved}), content
        is_csv = isinstance(datasets.load_dataset_builder(name, config.dataset_config), Csv)
        as_text = {"keep_default_na": False, "na_values": [""]} if is_csv else {}  # a cell NA is the text "NA"
        return datasets.load_dataset(name, config.dataset_config, streaming=streaming, **as_text), content
    except Exception as error:  # datasets raises many types; all mean that this name cannot be read
        raise _unreadable(name, error) from None


def _text_split(paths: list[Path], streaming: bool) -> Dataset | IterableDataset:
    """The records of text files. On disk each cell is JSON, which keeps every value as it was in the file."""
    files = {"paths": tuple(map(str, paths))}  # datasets would take a list for shards
    if streaming:
        return IterableDataset.from_generator(_streamed_records, gen_kwargs=files)
    stored = Dataset.from_generator(_stored_records, gen_kwargs=files, fingerprint=content_of({"": paths})[:32])
    return stored.with_transform(lambda batch: {name: [json.loads(cell) for cell in batch[name]] for name in batch})


def _stored_records(paths: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Reads the files twice: first for the columns, because any record may be the first one that has a key."""
    columns_of = {path: {key: 0 for _, record in read_records(Path(path)) for key in record} for path in paths}
    columns = columns_of[paths[0]]
    for path, found in columns_of.items():
        require(found, "dataset_name", path, "holds no examples")
        require(len(found) <= MAX_COLUMNS, "dataset_name", path, f"has more than {MAX_COLUMNS} columns")
        require_same_columns(path, found, paths[0], columns)
    for path in paths:
        for line, record in read_records(Path(path)):
            record = {ORIGIN: _origin(path, line, paths)} | {column: record.get(column) for column in columns}
            yield {column: json.dumps(value, ensure_ascii=False) for column, value in record.items()}


def _streamed_records(paths: tuple[str, ...]) -> Iterator[dict]:
    columns = None
    for path in paths:
        for line, record in read_records(Path(path)):
            columns = list(record) if columns is None else columns
            for key in record:
                why = f"line {line} has a column {key}, which the first example lacks; a stream needs it there"
                require(key in columns, "dataset_name", path, why)
            yield {ORIGIN: _origin(path, line, paths)} | {column: record.get(column) for column in columns}


def _origin(path: str, line: int, paths: tuple[str, ...]) -> str:
    return f"{Path(path).name} line {line}" if len(paths) > 1 else f"line {line}"


def _unreadable(name: str, error: Exception) -> UserError:
    """The one-line error for an exception of datasets."""
    while error.__cause__ and not isinstance(error, UserError):  # the outer ones only say that something went wrong
        error = error.__cause__
    if isinstance(error, UserError):
        return error
    cannot_write = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    if cannot_write or str(datasets.config.HF_DATASETS_CACHE) in str(getattr(error, "filename", None)):
        return unwritable_cache(name, error)
    if isinstance(error, IndexError) or "corresponds to no data" in str(error):  # datasets raises it for an empty one
        return UserError(f"--dataset_name {name}: holds no examples")
    hint = f"give a hub name, a directory or files; {WHAT_IS_READ}"
    return UserError(f"--dataset_name {name}: cannot be loaded: {one_line(error)}; {hint}")


def unwritable_cache(name: str, error: OSError) -> UserError:
    cache, why = datasets.config.HF_DATASETS_CACHE, error.strerror or str(error)
    hint = f"its disk has {size(free_bytes(Path(cache).absolute()))} free; set HF_DATASETS_CACHE to another directory"
    return UserError(f"--dataset_name {name}: cannot be cached in {cache}: {why}; {hint}")


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
        why = f"there is a column {new} already: {', '.join(others)}; give each column a name of its own"
        require(not others, "rename_columns", f"{old}={new}", why)
    return renamed


def peek(examples: Dataset | IterableDataset, name: str, count: int) -> list[dict]:
    """The first examples, up to `count`. Raises UserError if there are none."""
    batch = next(read_batches(examples, name, count), None)
    require(batch, "dataset_name", name, "holds no examples")
    return as_examples(batch)
