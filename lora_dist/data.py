"""Text to rows of token ids, and rows to micro-batches.

A micro-batch is a pure function of (seed, step, index): no sampler state, no dependence on the number of ranks, which
differ only in the indices they run. This is what makes a run the same on any number of ranks, and resumable from its
step alone.

B: sequences of a micro-batch. T: tokens of its longest sequence.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_dist.config import TrainConfig, UserError, require
from lora_dist.embedded import EMBEDDED, QUOTES_DIR, model_path

LOADER_OF_SUFFIX = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
IGNORE_INDEX = -100  # cross_entropy's default


def random_key(*what) -> int:
    """A 63-bit seed made from e.g. (seed, step, index): the only source of randomness of a run."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "little") >> 1


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path(name))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model_name_or_path {name}: its tokenizer cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model_name_or_path {name}: its tokenizer has no eos token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked in attention and loss: any id will do
    return tokenizer


def load_texts(config: TrainConfig) -> tuple[list[str], list[str]]:
    """The training and held-out texts of `--dataset_name`. Raises UserError where the data or the column is missing."""
    name, column = config.dataset_name, config.dataset_text_field
    splits = _load_splits(name)
    train = splits["train"]
    require(
        column in train.column_names,
        "dataset_text_field",
        column,
        f"no such column in {name}; it has {', '.join(train.column_names)}",
    )
    if "test" in splits:
        train_texts, eval_texts = train[column], splits["test"][column]
    else:
        num_eval = int(len(train) * config.eval_fraction)
        order = torch.randperm(
            len(train), generator=torch.Generator().manual_seed(random_key(config.seed, "held out"))
        ).tolist()
        eval_texts = train.select(sorted(order[:num_eval]))[column]
        train_texts = train.select(sorted(order[num_eval:]))[column]
    train_texts, eval_texts = [t for t in train_texts if t], [t for t in eval_texts if t]
    require(
        all(isinstance(t, str) for t in train_texts),
        "dataset_text_field",
        column,
        f"does not hold text in {name}",
    )
    require(train_texts, "dataset_name", name, "has no text to train on")
    return train_texts, eval_texts


def _load_splits(name: str) -> datasets.DatasetDict:
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is in the error
    if name == EMBEDDED:
        return datasets.load_dataset(
            "json", data_files={split: str(QUOTES_DIR / f"{split}.jsonl") for split in ("train", "test")}
        )
    path = Path(name)
    try:
        if path.suffix in LOADER_OF_SUFFIX:
            require(path.is_file(), "dataset_name", name, "no such file")
            splits = datasets.load_dataset(LOADER_OF_SUFFIX[path.suffix], data_files={"train": str(path)})
        else:
            splits = datasets.load_dataset(name)
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds; all mean that this name cannot be read
        while error.__cause__:  # the outer ones only say that something went wrong
            error = error.__cause__
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        suffixes = " ".join(LOADER_OF_SUFFIX)
        raise UserError(
            f"--dataset_name {name}: cannot be loaded: {reason}. Give a hub name or a file ending in {suffixes}"
        ) from None
    require("train" in splits, "dataset_name", name, f"has no train split; it has {', '.join(splits)}")
    return splits


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Token ids of each text, closed by eos so that the model learns where a text ends, cut to `max_length`."""
    ids = tokenizer(texts, truncation=True, max_length=max_length - 1)["input_ids"]
    return [row + [tokenizer.eos_token_id] for row in ids]


@dataclass(frozen=True)
class MicroBatch:
    input_ids_BT: torch.Tensor  # int64
    attention_mask_BT: torch.Tensor  # int64, 0 on padding
    labels_BT: torch.Tensor  # int64, IGNORE_INDEX where nothing is trained

    @property
    def num_trained_tokens(self) -> int:
        return int((self.labels_BT[:, 1:] != IGNORE_INDEX).sum())  # position t predicts token t + 1

    @property
    def num_tokens(self) -> int:
        return int(self.attention_mask_BT.sum())

    def to(self, device: torch.device) -> "MicroBatch":
        return MicroBatch(*(t.to(device) for t in (self.input_ids_BT, self.attention_mask_BT, self.labels_BT)))


def collate(rows: list[list[int]], pad_token_id: int) -> MicroBatch:
    """Rows padded on the right to the longest of them."""
    longest = max(map(len, rows))
    input_ids = torch.tensor([row + [pad_token_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return MicroBatch(input_ids, mask, input_ids.masked_fill(mask == 0, IGNORE_INDEX))


class MicroBatches:
    """The run's data: micro-batch `index` of optimizer step `step`, the same whoever asks.

    Rows are read from an endless stream, one seeded permutation per epoch, so that every row comes once an epoch and
    none is dropped or repeated at its end. With `num_epochs` the stream ends, and the last step may hold fewer rows.
    """

    def __init__(
        self,
        rows: list[list[int]],
        *,
        pad_token_id: int,
        seed: int,
        sequences: int,
        per_step: int,
        num_epochs: float | None = None,
    ):
        self.rows, self.pad_token_id, self.seed = rows, pad_token_id, seed
        self.sequences, self.per_step = sequences, per_step  # rows of a micro-batch, micro-batches of a step
        self.end = math.ceil(num_epochs * len(rows)) if num_epochs else None
        self._orders: dict[int, list[int]] = {}

    @property
    def num_steps(self) -> int | None:
        """Steps until the stream ends; None where it does not."""
        return math.ceil(self.end / (self.sequences * self.per_step)) if self.end else None

    def row_ids(self, step: int, index: int) -> list[int]:
        start = (step * self.per_step + index) * self.sequences
        stop = start + self.sequences if self.end is None else min(start + self.sequences, self.end)
        return [self._order(position // len(self.rows))[position % len(self.rows)] for position in range(start, stop)]

    def __call__(self, step: int, index: int) -> MicroBatch:
        ids = self.row_ids(step, index)
        if ids:
            return collate([self.rows[i] for i in ids], self.pad_token_id)
        empty = collate([self.rows[0][:2]], self.pad_token_id)  # past the end of the data: a row that trains nothing
        return MicroBatch(empty.input_ids_BT, empty.attention_mask_BT, torch.full_like(empty.labels_BT, IGNORE_INDEX))

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}  # a micro-batch spans two at most
            generator = torch.Generator().manual_seed(random_key(self.seed, "order", epoch))
            self._orders[epoch] = torch.randperm(len(self.rows), generator=generator).tolist()
        return self._orders[epoch]
