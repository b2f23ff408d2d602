"""Against the outside: transformers.Trainer + PEFT + bitsandbytes on one process, same rows, gives our trajectory."""

import dataclasses

import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from lora_dist.model.adapters import add_adapters, trainable_parameters
from lora_dist.parallel.strategies import Placement
from lora_dist.training.step import train_step
from tests.helpers.families import make_checkpoint
from tests.helpers.parity import batch_of, load_placed, load_unsharded
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import G, make_run

STEPS = 4
# Trainer adds the micro-batches' gradients one after another and we along a tree: fp32's rounding, and AdamW's step,
# which near a zero of the gradient turns a rounding into a part of the learning rate.
BOUND = 2e-6


class InOrder(Trainer):
    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)


def _ours_on_rank(rank, config, path, placement):
    run = make_run(config, load_placed(placement, config.quantization, torch.float32, path), placement)
    run.model.train()
    steps = [train_step(run.training, step) for step in range(STEPS)]
    places = [i for s in range(STEPS) for m in range(G) for (i,) in run.training.micro_batches.row_ids(s, m)]
    rows = [run.training.micro_batches.rows[i]["input_ids"].tolist() for i in places]
    adapter = {name: param.detach().clone() for name, param in trainable_parameters(run.model).items()}
    return [(s.loss, s.grad_norm) for s in steps], adapter, rows


def _trainer_on_rank(rank, config, path, rows, folder):
    model = add_adapters(load_unsharded(config.quantization, torch.float32, path), config)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=G, max_steps=STEPS,
        learning_rate=config.learning_rate, warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.lr_scheduler_type,
        max_grad_norm=config.max_grad_norm, weight_decay=config.weight_decay, optim="adamw_torch", logging_steps=1,
        report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, remove_unused_columns=False, seed=3,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip

    def as_batch(examples):
        batch = batch_of([example["row"] for example in examples])
        return {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT, "labels": batch.labels_BL}

    dataset = [{"row": row} for row in rows]
    trainer = InOrder(model=model, args=arguments, train_dataset=dataset, data_collator=as_batch)
    trainer.train()
    logged = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]
    return logged, {name: param.detach().clone() for name, param in trainable_parameters(trainer.model).items()}


@pytest.mark.parametrize("quantization", ["int8", "nf4", "none"])
def test_trainer_gives_our_trajectory(config, tmp_path, quantization):
    config = dataclasses.replace(
        config, quantization=quantization, max_steps=STEPS, learning_rate=1e-4, warmup_steps=1, lora_dropout=0.0,
        max_grad_norm=0.05, gradient_accumulation_steps=G,
    )  # fmt: skip
    path = make_checkpoint("llama", tmp_path)  # a family without dropout
    (ours, adapter, rows), other = run_ranks(_ours_on_rank, 2, config, path, Placement(2))
    assert other[0] == ours and all(norm > config.max_grad_norm for _, norm in ours)
    ((logged, theirs),) = run_ranks(_trainer_on_rank, 1, config, path, rows, tmp_path)
    assert len(logged) == STEPS and theirs.keys() == adapter.keys()
    for (loss, norm), (their_loss, their_norm) in zip(ours, logged, strict=True):
        assert their_loss == pytest.approx(loss, rel=BOUND) and their_norm == pytest.approx(norm, rel=BOUND)
    for name, param in theirs.items():
        assert param.any() and (param - adapter[name]).abs().max() < 0.005 * config.learning_rate, name
