"""Micro-batches, made from rows.

A micro-batch is a pure function of (seed, step, index). There is no sampler state. Ranks differ only in the indices
that they compute, so a run is the same on any number of ranks, and can continue from its step number alone.

B: sequences of a micro-batch. T: tokens of its longest sequence. L: labels of a sequence, see `tasks.py`.
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

STREAM_WINDOW = 10_000  # rows of a stream that are shuffled and packed together
GROUPED_STEPS = 50  # steps whose rows `group_by_length` sorts together
NUM_PREFETCHED = 2  # micro-batches that are made ahead of their use


@dataclass(frozen=True)
class MicroBatch:
    input_ids_BT: torch.Tensor  # int64
    attention_mask_BT: torch.Tensor  # int64; 1, or in packed rows the number of the document from 1; 0 on padding
    labels_BL: torch.Tensor  # int64, as the task defines them; IGNORE_INDEX for what is not trained
    packed: bool = False
    task: Task = CAUSAL_LM
    reference_B: torch.Tensor | None = None  # of pairs: the log-probability of each row under the reference, fp32

    @property
    def num_trained_tokens(self) -> int:
        """Number of trained labels; see `Task.num_trained_tokens`."""
        return self.task.num_trained_tokens(self.labels_BL)

    @property
    def loss_weight(self) -> int:
        """Number of terms that the loss is a mean over; see `Task.loss_weight`."""
        return self.task.loss_weight(self.labels_BL)

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return int((self.attention_mask_BT != 0).sum())

    def first_row(self) -> "MicroBatch":
        return self._map(lambda tensor: tensor[:1])

    def pin(self) -> "MicroBatch":
        return self._map(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> "MicroBatch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change) -> "MicroBatch":
        tensors = (self.input_ids_BT, self.attention_mask_BT, self.labels_BL)
        reference_B = None if self.reference_B is None else change(self.reference_B)
        return MicroBatch(*map(change, tensors), self.packed, self.task, reference_B)


def collate(rows: Sequence[dict], pad_token_id: int, task: Task = CAUSAL_LM) -> MicroBatch:
    """Pad rows on the right to the length of the longest one. Each has `input_ids` and `labels`.

    A packed row has an `attention_mask` too, and the row of a pair a `reference`; either all rows have it or none.
    """
    packed = "attention_mask" in rows[0]
    masks = [row["attention_mask"] if packed else [1] * len(row["input_ids"]) for row in rows]
    return MicroBatch(
        _padded([row["input_ids"] for row in rows], pad_token_id),
        _padded(masks, 0),
        _padded([row["labels"] for row in rows], IGNORE_INDEX),
        packed,
        task,
        torch.tensor([row["reference"] for row in rows]) if "reference" in rows[0] else None,
    )


def _padded(rows: Sequence, value: int) -> torch.Tensor:
    padded = torch.full((len(rows), max(map(len, rows))), value)
    for row, out in zip(rows, padded, strict=True):
        out[: len(row)] = torch.as_tensor(row)
    return padded


def model_inputs(model: nn.Module, batch: MicroBatch) -> dict[str, torch.Tensor]:
    """Arguments of the model's forward, without labels."""
    if batch.packed:
        return {"input_ids": batch.input_ids_BT, **packed_inputs(model, batch.attention_mask_BT)}
    inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT}
    if batch.task.name == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch.labels_BL)
    return inputs


# The rows of one window, and the row numbers in each of its sequences.
Window = tuple[Rows | list[dict], list[list[int]]]


class MicroBatches:
    """The run's micro-batches: `batches(step, index)` is micro-batch `index` of optimizer step `step`, on the CPU.

    Each holds `sequences` sequences; a step has `per_step` micro-batches, over all ranks. They are cut from one endless
    list of sequences, which is made window by window. For `Rows`, a window is an epoch: one seeded permutation of all
    rows, so each row comes once per epoch and none is dropped or repeated. For a `RowStream`, a window is its next
    STREAM_WINDOW rows, shuffled. With `num_epochs`, the list ends after that many epochs, and the last step may hold
    fewer sequences.

    A sequence is one row; with `pack_to`, it is as many rows as fit into that many tokens. With `group_by_length`, the
    rows of a step have similar lengths. A sequence of pairs is one pair: its chosen and its rejected row, which are
    rows 2i and 2i + 1.
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
        self.rows, self.pad_token_id, self.seed, self.task = rows, pad_token_id, seed, task
        self.sequences, self.per_step = sequences, per_step
        self.pack_to, self.group_by_length = pack_to, group_by_length
        self._windows: dict[int, Window] = {}  # the newest two, because a micro-batch spans at most two
        self._window_starts = [0]  # of a RowStream: number of the first sequence of each window read so far
        self._window_reader, self._next_read = None, 0  # of a RowStream; the window that the reader gives next
        streamed = isinstance(rows, RowStream)
        self.sequences_per_epoch = None if streamed else len(self._window(0)[1])  # None if not known
        self.total_sequences = math.ceil(num_epochs * self.sequences_per_epoch) if num_epochs else None  # None: endless

    @property
    def num_steps(self) -> int | None:
        """Number of steps until the data ends; None without `num_epochs`."""
        return math.ceil(self.total_sequences / (self.sequences * self.per_step)) if self.total_sequences else None

    def row_ids(self, step: int, index: int) -> list[list[int]]:
        """For each sequence of a micro-batch, the numbers of its rows in `rows`; for a RowStream, in their window."""
        return [self._window(window)[1][position] for window, position in self._locate(step, index)]

    def __call__(self, step: int, index: int) -> MicroBatch:
        """Raises UserError if a RowStream turns out to be unreadable."""
        sequences = []
        for window, position in self._locate(step, index):
            rows, row_ids = self._window(window)
            documents = [rows[i] for i in row_ids[position]]
            sequences += [join(documents)] if self.pack_to else documents
        return collate(sequences or self._untrained_sequence(), self.pad_token_id, self.task)

    def _untrained_sequence(self) -> list[dict]:
        """A sequence that trains nothing, for micro-batches after the end of the data."""
        first = self._window(0)[0][0]
        untrained = [first | {"labels": [IGNORE_INDEX] * len(first["labels"])}] * self.task.rows_per_example
        return [join(untrained)] if self.pack_to else untrained

    def _locate(self, step: int, index: int) -> list[tuple[int, int]]:
        """(number of the window, position in it) of each sequence of a micro-batch; empty after the end of the data."""
        start = (step * self.per_step + index) * self.sequences
        stop = start + self.sequences
        if self.total_sequences is not None:
            stop = min(stop, self.total_sequences)
        return [self._locate_sequence(number) for number in range(start, stop)]

    def _locate_sequence(self, number: int) -> tuple[int, int]:
        if self.sequences_per_epoch:
            return divmod(number, self.sequences_per_epoch)
        starts = self._window_starts
        while starts[-1] <= number:
            starts.append(starts[-1] + len(self._window(len(starts) - 1)[1]))
        window = bisect.bisect(starts, number) - 1
        return window, number - starts[window]

    def _window(self, number: int) -> Window:
        if number not in self._windows:
            rows = self._read_window(number) if isinstance(self.rows, RowStream) else self.rows
            self._windows = {n: window for n, window in self._windows.items() if n == number - 1}
            self._windows[number] = rows, self._arrange(rows, number)
        return self._windows[number]

    def _read_window(self, number: int) -> list[dict]:
        if self._window_reader is None or number < self._next_read:
            self._window_reader, self._next_read = self._read_windows(), 0
        window = next(islice(self._window_reader, number - self._next_read, None))
        self._next_read = number + 1
        return [{"input_ids": ids, "labels": labels} for ids, labels in window]

    def _read_windows(self) -> Iterator[list[Encoded]]:
        """Read the RowStream over and over. A window ends where the stream ends, so it holds no row twice."""
        while True:
            rows = iter(self.rows)
            while window := list(islice(rows, STREAM_WINDOW)):
                yield window

    def _arrange(self, rows: Rows | list[dict], window: int) -> list[list[int]]:
        """The row numbers in each sequence of a window, in their order."""
        generator = torch.Generator().manual_seed(random_key(self.seed, "order", window))
        size = self.task.rows_per_example
        order = torch.randperm(len(rows) // size, generator=generator).tolist()
        examples = [list(range(i * size, (i + 1) * size)) for i in range(len(rows) // size)]
        if not (self.pack_to or self.group_by_length):
            return [examples[i] for i in order]
        lengths = rows.lengths if isinstance(rows, Rows) else [len(row["input_ids"]) for row in rows]
        if self.pack_to:
            packed = best_fit_decreasing(lengths, order, self.pack_to)
            return [packed[i] for i in torch.randperm(len(packed), generator=generator).tolist()]
        longest = [max(lengths[i] for i in rows) for rows in examples]
        rows_per_step = self.sequences * self.per_step
        return [examples[i] for i in group_rows_by_length(longest, order, rows_per_step, generator)]


def group_rows_by_length(
    lengths: Sequence[int], order: list[int], rows_per_step: int, generator: torch.Generator
) -> list[int]:
    """Reorder rows so that those of a step have similar lengths. `order`: a permutation of the row numbers.

    The rows of GROUPED_STEPS steps at a time are sorted, longest first, and cut into steps. The steps are shuffled.
    """
    size = rows_per_step * GROUPED_STEPS
    pools = [sorted(order[i : i + size], key=lambda j: -lengths[j]) for i in range(0, len(order), size)]
    steps = [pool[i : i + rows_per_step] for pool in pools for i in range(0, len(pool), rows_per_step)]
    # A step that is not full comes last: anywhere else it would shift the rows of all steps after it.
    incomplete = [] if len(steps[-1]) == rows_per_step else [steps.pop()]
    shuffled = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]
    return [row for rows_of_step in shuffled + incomplete for row in rows_of_step]


class Prefetch:
    """Makes the micro-batches of this rank in a thread, ahead of their use: `read(step, position)`.

    It does not use worker processes, as torch's DataLoader does: a SIGTERM to all processes of a job ends them, and the
    run with them before it has saved a checkpoint (docs/upstream.md). A thread is fast enough, because a micro-batch
    takes milliseconds, and tokenizers release Python's lock.
    """

    def __init__(self, batches: MicroBatches, indices: Sequence[int], device: torch.device):
        """`indices`: the micro-batches of each step that this rank computes, in order; an index may come twice."""
        self.batches, self.indices, self.device = batches, indices, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._waiting: dict[int, Future] = {}  # by step * len(indices) + position

    def __call__(self, step: int, position: int) -> MicroBatch:
        """Micro-batch `indices[position]` of a step, on the device. Raises what was raised while it was made."""
        number = step * len(self.indices) + position
        wanted = range(number, number + NUM_PREFETCHED + 1)
        self._waiting = {n: self._waiting.get(n) or self._thread.submit(self._make, n) for n in wanted}
        return self._waiting.pop(number).result().to(self.device)

    def row_ids(self, step: int, index: int) -> list[list[int]]:
        """`MicroBatches.row_ids`, called in the thread, because two threads must not read a stream at once."""
        return self._thread.submit(self.batches.row_ids, step, index).result()

    def _make(self, number: int) -> MicroBatch:
        step, position = divmod(number, len(self.indices))
        batch = self.batches(step, self.indices[position])
        if self.device.type != "cuda":
            return batch
        with torch.cuda.device(self.device):
            return batch.pin()
