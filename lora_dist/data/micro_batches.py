"""Rows to micro-batches.

A micro-batch is a pure function of (seed, step, index): no sampler state, no dependence on the number of ranks, which
differ only in the indices they run. This is what makes a run the same on any number of ranks, and resumable from its
step alone.

B: sequences of a micro-batch. T: tokens of its longest sequence.
"""

import bisect
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from lora_dist.data.formats import Encoded
from lora_dist.data.packing import best_fit_decreasing, join, packed_inputs
from lora_dist.data.rows import Rows, RowStream
from lora_dist.data.tasks import CAUSAL_LM, IGNORE_INDEX, Task
from lora_dist.seeds import random_key

STREAM_WINDOW = 10_000  # rows of a stream that are shuffled, and packed, together
GROUPED_STEPS = 50  # steps whose rows are sorted by length together
AHEAD = 2  # micro-batches that wait to be used


@dataclass(frozen=True)
class MicroBatch:
    input_ids_BT: torch.Tensor  # int64
    attention_mask_BT: torch.Tensor  # int64, 0 on padding; in packed rows the number of the document, from 1
    labels_BL: torch.Tensor  # int64, as its task says; IGNORE_INDEX where nothing is trained
    packed: bool = False
    task: Task = CAUSAL_LM

    @property
    def num_trained(self) -> int:
        """Tokens, or of SEQ_CLS rows or classes, that the loss is a mean over."""
        return self.task.num_trained(self.labels_BL)

    @property
    def num_tokens(self) -> int:
        return int((self.attention_mask_BT != 0).sum())

    def first(self) -> "MicroBatch":
        """Its first row alone."""
        return self._map(lambda tensor: tensor[:1])

    def pin(self) -> "MicroBatch":
        return self._map(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> "MicroBatch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change) -> "MicroBatch":
        tensors = (self.input_ids_BT, self.attention_mask_BT, self.labels_BL)
        return MicroBatch(*map(change, tensors), self.packed, self.task)


def collate(rows: Sequence[dict], pad_token_id: int, task: Task = CAUSAL_LM) -> MicroBatch:
    """Rows padded on the right to the longest of them."""
    packed = "attention_mask" in rows[0]
    masks = [row["attention_mask"] if packed else [1] * len(row["input_ids"]) for row in rows]
    return MicroBatch(
        _padded([row["input_ids"] for row in rows], pad_token_id),
        _padded(masks, 0),
        _padded([row["labels"] for row in rows], IGNORE_INDEX),
        packed,
        task,
    )


def _padded(rows: Sequence, value: int) -> torch.Tensor:
    padded = torch.full((len(rows), max(map(len, rows))), value)
    for row, out in zip(rows, padded, strict=True):
        out[: len(row)] = torch.as_tensor(row)
    return padded


def model_inputs(model: nn.Module, batch: MicroBatch) -> dict[str, torch.Tensor]:
    """The arguments of a model's forward."""
    if batch.packed:
        return {"input_ids": batch.input_ids_BT, **packed_inputs(model, batch.attention_mask_BT)}
    inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT}
    if batch.task.name == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch.labels_BL)
    return inputs


class MicroBatches:
    """The run's data: micro-batch `index` of optimizer step `step`, the same whoever asks.

    Sequences are read from an endless stream of windows. A window is an epoch: one seeded permutation of the rows, so
    that each comes once an epoch and none is dropped or repeated at its end; of a RowStream it is its next rows. With
    `num_epochs` the stream ends, and the last step may hold fewer sequences.

    A sequence is one row, or with `pack_to` as many as fit into so many tokens. With `group_by_length` the rows of a
    step are of similar length.
    """

    def __init__(
        self,
        rows: Rows | RowStream,
        *,
        pad_token_id: int,
        seed: int,
        sequences: int,
        per_step: int,
        num_epochs: float | None = None,
        pack_to: int | None = None,
        group_by_length: bool = False,
        task: Task = CAUSAL_LM,
    ):
        self.rows, self.pad_token_id, self.seed = rows, pad_token_id, seed
        self.sequences, self.per_step = sequences, per_step  # of a micro-batch, micro-batches of a step
        self.pack_to, self.group_by_length, self.task = pack_to, group_by_length, task
        self._windows: dict[int, tuple[Rows | list, list[list[int]]]] = {}  # the last two: a micro-batch spans no more
        self._starts, self._stream = [0], None  # of a stream's windows, as far as they are known
        streamed = isinstance(rows, RowStream)
        self.per_epoch = None if streamed else len(self._window(0)[1])  # sequences
        self.end = math.ceil(num_epochs * self.per_epoch) if num_epochs else None

    @property
    def num_steps(self) -> int | None:
        """Steps until the stream ends; None where it does not."""
        return math.ceil(self.end / (self.sequences * self.per_step)) if self.end else None

    def row_ids(self, step: int, index: int) -> list[list[int]]:
        """The rows in each sequence of a micro-batch, by their number in the data, of a stream in their window."""
        return [self._window(window)[1][offset] for window, offset in self._places(step, index)]

    def __call__(self, step: int, index: int) -> MicroBatch:
        sequences = []
        for window, offset in self._places(step, index):
            rows, order = self._window(window)
            documents = [rows[i] for i in order[offset]]
            sequences.append(join(documents) if self.pack_to else documents[0])
        if sequences:
            return collate(sequences, self.pad_token_id, self.task)
        first = self._window(0)[0][0]  # past the end of the data: a row that trains nothing
        nothing = {"input_ids": first["input_ids"], "labels": [IGNORE_INDEX] * len(first["labels"])}
        return collate([join([nothing]) if self.pack_to else nothing], self.pad_token_id, self.task)

    def _places(self, step: int, index: int) -> list[tuple[int, int]]:
        """(window, position in it) of each sequence of a micro-batch."""
        start = (step * self.per_step + index) * self.sequences
        stop = start + self.sequences if self.end is None else min(start + self.sequences, self.end)
        return [self._place(position) for position in range(start, stop)]

    def _place(self, position: int) -> tuple[int, int]:
        if self.per_epoch:
            return divmod(position, self.per_epoch)
        while self._starts[-1] <= position:
            self._starts.append(self._starts[-1] + len(self._window(len(self._starts) - 1)[1]))
        window = bisect.bisect(self._starts, position) - 1
        return window, position - self._starts[window]

    def _window(self, number: int) -> tuple[Rows | list, list[list[int]]]:
        """(rows, the rows of each sequence in their order) of an epoch, or of a part of a stream."""
        if number not in self._windows:
            rows = self._read_window(number) if isinstance(self.rows, RowStream) else self.rows
            self._windows = {n: window for n, window in self._windows.items() if n == number - 1}
            self._windows[number] = rows, self._arrange(rows, number)
        return self._windows[number]

    def _read_window(self, number: int) -> list[dict]:
        if self._stream is None or number < self._next_read:
            self._stream, self._next_read = self._read_windows(), 0  # from its beginning
        window = next(islice(self._stream, number - self._next_read, None))
        self._next_read = number + 1
        return [{"input_ids": ids, "labels": labels} for ids, labels in window]

    def _read_windows(self) -> Iterator[list[Encoded]]:
        """The stream from its beginning, and again when it ends: a window holds no row twice."""
        while True:
            rows = iter(self.rows)
            while window := list(islice(rows, STREAM_WINDOW)):
                yield window

    def _arrange(self, rows: Rows | list, window: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(random_key(self.seed, "order", window))
        order = torch.randperm(len(rows), generator=generator).tolist()
        if not (self.pack_to or self.group_by_length):
            return [[i] for i in order]
        lengths = rows.lengths if isinstance(rows, Rows) else [len(row["input_ids"]) for row in rows]
        if self.pack_to:
            packed = best_fit_decreasing(lengths, order, self.pack_to)
            return [packed[i] for i in torch.randperm(len(packed), generator=generator).tolist()]
        step = self.sequences * self.per_step
        size = step * GROUPED_STEPS
        pools = [sorted(order[i : i + size], key=lambda j: -lengths[j]) for i in range(0, len(order), size)]
        steps = [pool[i : i + step] for pool in pools for i in range(0, len(pool), step)]
        uneven = [] if len(steps[-1]) == step else [steps.pop()]  # last, so that the others stay together
        shuffled = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]
        return [[i] for rows_of_step in shuffled + uneven for i in rows_of_step]


class Prefetch:
    """Makes the micro-batches of this rank in a thread, ahead of their use.

    Not in torch's worker processes: a SIGTERM to all processes of a job ends those, and with them a run that would have
    saved itself (docs/log.md). Making one takes milliseconds, and a tokenizer leaves Python's lock to others.
    """

    def __init__(self, batches: MicroBatches, turns: Sequence[int], device: torch.device):
        self.batches, self.turns, self.device = batches, turns, device  # turns: the indices of a step in their order
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._waiting: dict[int, Future] = {}  # by step * turns of a step + turn

    def __call__(self, step: int, turn: int) -> MicroBatch:
        """On the device. Raises what making it raised."""
        number = step * len(self.turns) + turn
        wanted = range(number, number + AHEAD + 1)
        self._waiting = {n: self._waiting.get(n) or self._thread.submit(self._make, n) for n in wanted}
        return self._waiting.pop(number).result().to(self.device)

    def row_ids(self, step: int, index: int) -> list[list[int]]:
        """As of MicroBatches, which only the thread may ask: it reads streams."""
        return self._thread.submit(self.batches.row_ids, step, index).result()

    def _make(self, number: int) -> MicroBatch:
        step, turn = divmod(number, len(self.turns))
        batch = self.batches(step, self.turns[turn])
        if self.device.type != "cuda":
            return batch
        with torch.cuda.device(self.device):
            return batch.pin()
