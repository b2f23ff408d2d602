"""Runs inside a test, without a launcher, a run folder's lock or a watchdog."""

import torch
from accelerate import Accelerator

from lora_dist.data.micro_batches import MicroBatches
from lora_dist.data.rows import Rows
from lora_dist.model.adapters import add_adapters
from lora_dist.parallel.strategies import Placement
from lora_dist.training.run import Run
from lora_dist.training.step import build_training
from tests.helpers.parity import rows_of

G, SEQUENCES = 4, 2  # micro-batches a step, rows of each


def start_run(
    model, config, batches, *, held_out=None, placement=None, accelerator=None, tokenizer=None, folder=None
) -> Run:
    """A run on a base with adapters: what steps and evaluations need. It has no metrics and no summary."""
    accelerator = accelerator or Accelerator(cpu=True)
    training = build_training(model, config, accelerator, batches, placement or Placement())
    held_out = Rows.of([]) if held_out is None else held_out
    return Run(config, None, accelerator, folder, tokenizer, held_out, None, training, None)


def make_run(config, model, placement, mixed_precision="no") -> Run:
    """A run on random rows of ragged lengths, with new adapters; steps of G micro-batches."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 40, (16,), generator=generator).tolist()
    rows = [torch.randint(3, 127, (length,), generator=generator).tolist() for length in lengths]
    pack_to = config.max_length if config.packing else None
    batches = MicroBatches(rows_of(rows), pad_token_id=1, seed=0, sequences=SEQUENCES, per_step=G, pack_to=pack_to)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    model = add_adapters(model, config)
    return start_run(model, config, batches, held_out=rows_of(rows[:5]), placement=placement, accelerator=accelerator)
