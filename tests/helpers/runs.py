"""A small training run inside a test: random rows of ragged lengths, steps of G micro-batches."""

import torch
from accelerate import Accelerator

from lora_dist.data.micro_batches import MicroBatches
from lora_dist.model.adapters import add_adapters
from lora_dist.model.load import base_bytes
from lora_dist.training.step import Training
from tests.helpers.parity import rows_of

G, SEQUENCES = 4, 2  # micro-batches a step, rows of each


def make_run(config, model, placement, mixed_precision="no"):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 40, (16,), generator=generator).tolist()
    rows = [torch.randint(3, 127, (length,), generator=generator).tolist() for length in lengths]
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    pack_to = config.max_length if config.packing else None
    batches = MicroBatches(rows_of(rows), pad_token_id=1, seed=0, sequences=SEQUENCES, per_step=G, pack_to=pack_to)
    base = base_bytes(model)
    model = add_adapters(model, config)
    return Training(model, None, config, accelerator, batches, rows_of(rows[:5]), None, base, placement)
