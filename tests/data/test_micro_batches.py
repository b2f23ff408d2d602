"""A micro-batch is a pure function of (seed, step, index), also with packing, grouping and streaming."""

import dataclasses

import numpy as np
import pytest
import torch

from lora_dist.data import micro_batches as micro_batches_module
from lora_dist.data.formats import load_tokenizer
from lora_dist.data.micro_batches import MicroBatches, Prefetch, collate
from lora_dist.data.packing import best_fit_decreasing, block_diagonal, join, positions_in_documents
from lora_dist.data.rows import prepare_rows
from lora_dist.data.tasks import IGNORE_INDEX
from lora_dist.parallel.exact_sum import block
from tests.helpers.parity import batch_of, rows_of

ROWS = rows_of([[2, 10 + i] + [5] * (i % 4) for i in range(23)])  # the second token tells which row it is
ORDERS = {"random": {}, "packed": {"pack_to": 9}, "grouped": {"group_by_length": True}}


def micro_batches(**kwargs) -> MicroBatches:
    return MicroBatches(ROWS, **({"pad_token_id": 1, "seed": 3, "sequences": 2, "per_step": 4} | kwargs))


def flat(sequences) -> list[int]:
    return [row for sequence in sequences for row in sequence]


def same(one, other) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in vars(one) if name[-2:] in ("BT", "BL"))


@pytest.fixture
def stream(config, monkeypatch):
    """The held-out embedded quotes as a stream, in windows of 60 rows."""
    monkeypatch.setattr(micro_batches_module, "STREAM_WINDOW", 60)
    settings = {"streaming": True, "dataset_train_split": "test", "eval_fraction": 0.0, "max_length": 200}
    return prepare_rows(dataclasses.replace(config, **settings), load_tokenizer("embedded")).train


@pytest.mark.parametrize("order", [*ORDERS, "stream", "packed stream"])
def test_a_micro_batch_is_a_function_of_seed_step_and_index(order, stream):
    if "stream" in order:
        settings = {"pad_token_id": 1, "sequences": 8, "per_step": 4, "pack_to": 200 if "packed" in order else None}
        new = lambda seed=3: MicroBatches(stream, seed=seed, **settings)  # noqa: E731
    else:
        new = lambda seed=3: micro_batches(seed=seed, **ORDERS[order])  # noqa: E731
    one, other = new(), new()
    keys = [(step, index) for step in range(9) for index in range(4)]
    backwards = {key: other(*key) for key in reversed(keys)}  # made in another order
    assert all(same(one(*key), backwards[key]) for key in keys)
    assert new(seed=4).row_ids(0, 0) != one.row_ids(0, 0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_any_number_of_ranks_sees_the_same_micro_batches(num_ranks, order):
    def seen(ranks):
        batches = [micro_batches(per_step=24, **ORDERS[order]) for _ in range(ranks)]
        return [
            batches[rank](step, index) for step in range(3) for rank in range(ranks) for index in block(24, ranks, rank)
        ]

    assert all(map(same, seen(num_ranks), seen(1)))


@pytest.mark.parametrize("order", ORDERS)
def test_every_row_comes_once_per_epoch(order):
    batches = micro_batches(**ORDERS[order])
    steps = range(-(-4 * batches.sequences_per_epoch // 8))
    stream = [sequence for step in steps for index in range(4) for sequence in batches.row_ids(step, index)]
    starts = range(0, 4 * batches.sequences_per_epoch, batches.sequences_per_epoch)
    epochs = [flat(stream[start : start + batches.sequences_per_epoch]) for start in starts]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("order", ORDERS)
def test_the_last_step_of_the_last_epoch_repeats_and_drops_no_row(order):
    batches = micro_batches(num_epochs=2, **ORDERS[order])
    assert batches.num_steps == -(-2 * batches.sequences_per_epoch // 8)
    steps = range(batches.num_steps)
    rows = flat(sequence for step in steps for index in range(4) for sequence in batches.row_ids(step, index))
    assert sorted(rows) == sorted([*range(23), *range(23)])
    beyond = batches(batches.num_steps, 0)  # after the end of the data: a row that trains nothing
    assert batches.row_ids(batches.num_steps, 0) == [] and beyond.num_trained_tokens == 0
    assert beyond.packed == (order == "packed")


def test_a_part_of_an_epoch():
    batches = micro_batches(num_epochs=0.5)
    assert batches.num_steps == 2  # 12 of 23 rows, 8 per step


def test_a_stream_gives_each_row_once_per_pass(stream):
    batches = MicroBatches(stream, pad_token_id=1, seed=3, sequences=10, per_step=1)
    assert len(list(stream)) == 200
    first, second = (
        sorted(str(batch.input_ids_BT[i][batch.attention_mask_BT[i] > 0].tolist())
        for step in steps for batch in [batches(step, 0)] for i in range(10))
        for steps in (range(20), range(20, 40))
    )  # fmt: skip
    assert first == second == sorted(str(ids) for ids, _ in stream)


def test_a_stream_that_fits_into_a_window_gives_the_same_micro_batches_as_rows(config):
    config = dataclasses.replace(config, max_length=256)
    rows = prepare_rows(config, load_tokenizer("embedded"))
    streamed = prepare_rows(dataclasses.replace(config, streaming=True), load_tokenizer("embedded"))
    settings = {"pad_token_id": 1, "seed": 3, "sequences": 2, "per_step": 2, "pack_to": 256}
    one, other = (MicroBatches(kind.train, **settings) for kind in (rows, streamed))
    assert all(same(one(step, 1), other(step, 1)) for step in range(4))


def test_grouped_rows_of_a_step_are_of_similar_length(config):
    """Padding is nearly as low as for sorted rows, but the steps are not in the order of their lengths."""
    rows = prepare_rows(config, load_tokenizer("embedded")).train

    def padding(**kwargs):
        batches = MicroBatches(rows, pad_token_id=1, seed=0, sequences=4, per_step=4, num_epochs=1, **kwargs)
        made = [batches(step, index) for step in range(batches.num_steps) for index in range(4)]
        lengths = [batch.input_ids_BT.shape[1] for batch in made]
        return 1 - sum(b.num_tokens for b in made) / sum(b.input_ids_BT.numel() for b in made), lengths

    (random, _), (grouped, lengths) = padding(), padding(group_by_length=True)
    assert random > 0.4 and grouped < 0.06
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)


def test_packing_fills_the_rows_of_the_quotes(config):
    rows = prepare_rows(config, load_tokenizer("embedded")).train
    batches = MicroBatches(rows, pad_token_id=1, seed=0, sequences=1, per_step=1, num_epochs=1, pack_to=512)
    made = [batches(step, 0) for step in range(batches.num_steps)]
    assert sum(b.num_tokens for b in made) == rows.lengths.sum()
    assert sum(b.num_tokens for b in made) / (512 * len(made)) >= 0.97
    assert max(b.input_ids_BT.shape[1] for b in made) <= 512
    assert (
        sum(b.num_trained_tokens for b in made) == (rows.lengths - 1).sum()
    )  # as without packing: none is lost between documents


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_decreasing(seed):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 41, 200)
    packed = best_fit_decreasing(lengths, generator.permutation(200).tolist(), 40)
    assert sorted(flat(packed)) == list(range(200))
    used = [lengths[row].sum() for row in packed]
    assert max(used) <= 40
    # Compare with the definition: one document after another looks at every row.
    room = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, left in enumerate(room) if left >= length]
        if fitting:
            room[min(fitting, key=lambda i: room[i])] -= length
        else:
            room.append(40 - length)
    assert sorted(40 - left for left in room) == sorted(used)


def test_join_packs_documents_into_a_row():
    row = join([{"input_ids": [2, 7, 8], "labels": [2, 7, 8]}, {"input_ids": [2, 9], "labels": [IGNORE_INDEX, 9]}])
    batch = collate([row, join([{"input_ids": [2, 7], "labels": [2, 7]}])], pad_token_id=1)
    assert batch.packed and (batch.num_trained_tokens, batch.num_tokens) == (2 + 1 + 1, 7)
    assert batch.input_ids_BT.tolist() == [[2, 7, 8, 2, 9], [2, 7, 1, 1, 1]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]]
    ignored = IGNORE_INDEX
    assert batch.labels_BL.tolist() == [[ignored, 7, 8, ignored, 9], [ignored, 7, ignored, ignored, ignored]]
    assert positions_in_documents(batch.attention_mask_BT).tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    seen = block_diagonal(batch.attention_mask_BT)[0, 0].int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


def test_collate_pads_on_the_right_and_does_not_train_padding():
    batch = batch_of([[2, 7, 8, 9], [2, 7]], pad_token_id=1)
    assert batch.input_ids_BT.tolist() == [[2, 7, 8, 9], [2, 7, 1, 1]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels_BL.tolist() == [[2, 7, 8, 9], [2, 7, IGNORE_INDEX, IGNORE_INDEX]]
    assert (batch.num_trained_tokens, batch.num_tokens) == (4, 6)  # no token predicts the first one of a row
    assert batch.first_row().labels_BL.tolist() == [[2, 7, 8, 9]]


@pytest.mark.parametrize("indices", [[0, 1, 2, 3], [2, 3, 3]])
def test_prefetch_gives_the_same_micro_batches_and_makes_them_ahead(indices):
    made = []

    class Recorded(MicroBatches):
        def __call__(self, step, index):
            made.append((step, index))
            return super().__call__(step, index)

    recorded, plain = Recorded(ROWS, pad_token_id=1, seed=3, sequences=2, per_step=4), micro_batches()
    read = Prefetch(recorded, indices, torch.device("cpu"))
    for step in range(3):
        for position, index in enumerate(indices):
            assert same(read(step, position), plain(step, index))
    read._thread.shutdown()
    in_order = [(step, index) for step in range(5) for index in indices]
    assert made == in_order[: 3 * len(indices) + micro_batches_module.NUM_PREFETCHED]
    resumed = Prefetch(recorded, indices, torch.device("cpu"))
    assert same(resumed(7, 1), plain(7, indices[1]))


def test_an_error_in_the_thread_is_raised():
    class Broken(MicroBatches):
        def __call__(self, step, index):
            raise OSError("disk")

    broken = Broken(ROWS, pad_token_id=1, seed=3, sequences=2, per_step=4)
    with pytest.raises(OSError, match="disk"):
        Prefetch(broken, [0], torch.device("cpu"))(0, 0)


@pytest.mark.parametrize("order", ORDERS)
def test_the_global_random_state_does_not_change(order):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    micro_batches(**ORDERS[order])(3, 2)
    assert torch.equal(torch.get_rng_state(), before)
