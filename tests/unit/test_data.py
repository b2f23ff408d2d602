import dataclasses

import pytest
import torch

from lora_dist.config import UserError
from lora_dist.data import IGNORE_INDEX, MicroBatches, collate, load_texts, load_tokenizer, tokenize
from lora_dist.reduction import block

ROWS = [[2, 10 + i] + [5] * (i % 4) for i in range(23)]  # token 1 names the row


def micro_batches(**kwargs) -> MicroBatches:
    return MicroBatches(ROWS, **({"pad_token_id": 1, "seed": 3, "sequences": 2, "per_step": 4} | kwargs))


def test_a_micro_batch_is_a_function_of_seed_step_and_index():
    one, other = micro_batches(), micro_batches()
    backwards = [(step, index) for step in range(9) for index in range(4)][::-1]
    rows = {key: other.row_ids(*key) for key in backwards}  # asked in another order
    assert all(one.row_ids(*key) == rows[key] for key in reversed(backwards))
    assert micro_batches(seed=4).row_ids(0, 0) != one.row_ids(0, 0)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_any_number_of_ranks_sees_the_same_micro_batches(num_ranks):
    def seen(ranks):
        batches = [micro_batches(per_step=24) for _ in range(ranks)]
        return [
            batches[rank].row_ids(step, index)
            for step in range(3)
            for rank in range(ranks)
            for index in block(24, ranks, rank)
        ]

    assert seen(num_ranks) == seen(1)


def test_every_row_comes_once_an_epoch():
    batches = micro_batches()
    stream = [row for step in range(12) for index in range(4) for row in batches.row_ids(step, index)]
    epochs = [stream[start : start + 23] for start in range(0, 92, 23)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_the_last_step_of_the_last_epoch_neither_repeats_nor_drops():
    batches = micro_batches(num_epochs=2)
    assert batches.num_steps == 6  # 46 rows, 8 a step
    stream = [row for step in range(6) for index in range(4) for row in batches.row_ids(step, index)]
    assert sorted(stream) == sorted([*range(23), *range(23)])
    last = batches(5, 3)  # 6 of the 8 places are filled: nothing is left for the last micro-batch
    assert batches.row_ids(5, 3) == [] and last.num_trained_tokens == 0


def test_collate_pads_right_and_trains_no_padding():
    batch = collate([[2, 7, 8, 9], [2, 7]], pad_token_id=1)
    assert batch.input_ids_BT.tolist() == [[2, 7, 8, 9], [2, 7, 1, 1]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels_BT.tolist() == [[2, 7, 8, 9], [2, 7, IGNORE_INDEX, IGNORE_INDEX]]
    assert (batch.num_trained_tokens, batch.num_tokens) == (4, 6)  # the first token of a row is predicted by none


def test_rows_are_closed_by_eos_and_cut():
    tokenizer = load_tokenizer("embedded")
    short, long = tokenize(["“Hope.”", "word " * 100], tokenizer, max_length=16)
    assert short[0] == tokenizer.bos_token_id and short[-1] == tokenizer.eos_token_id
    assert len(long) == 16 and long[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(short, skip_special_tokens=True) == "“Hope.”"


def test_rows_are_held_out_of_data_without_a_test_split(config, tmp_path):
    file = tmp_path / "quotes.csv"
    file.write_text("quote\n" + "\n".join(f"row {i}" for i in range(40)) + "\n")
    config = dataclasses.replace(config, dataset_name=str(file), eval_fraction=0.25)
    train, held_out = load_texts(config)
    assert len(held_out) == 10 and sorted(train + held_out) == sorted(f"row {i}" for i in range(40))
    assert load_texts(config) == (train, held_out)
    assert load_texts(dataclasses.replace(config, seed=1)) != (train, held_out)
    assert load_texts(dataclasses.replace(config, eval_fraction=0.0))[1] == []


def test_data_without_text_is_refused(config, tmp_path):
    file = tmp_path / "quotes.jsonl"
    file.write_text('{"quote": ""}\n{"quote": null}\n')
    with pytest.raises(UserError, match="no text to train on"):
        load_texts(dataclasses.replace(config, dataset_name=str(file)))


def test_the_ambient_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    micro_batches()(3, 2)
    assert torch.equal(torch.get_rng_state(), before)
