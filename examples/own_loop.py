"""A loop of one's own on an NF4 base that is sharded over the ranks.

    torchrun --nproc_per_node 2 examples/own_loop.py MODEL DATA OUTPUT_DIR

MODEL: a hub name or a folder. DATA: a text file; each line is an example.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from lora_dist import load_base


def main(model_name: str, data: str, output_dir: str) -> None:
    base = load_base(model_name, quantization="nf4")  # joins the ranks, too
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer, tokenizer = torch.optim.AdamW(params, lr=2e-4), AutoTokenizer.from_pretrained(model_name)
    lines, rank, ranks = Path(data).read_text().splitlines(), dist.get_rank(), dist.get_world_size()
    for step in range(len(lines) // ranks):  # equally many on all ranks, because they gather the base together
        ids = tokenizer(lines[step * ranks + rank], return_tensors="pt").input_ids.to(base.device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()  # averages the gradients over the ranks
        optimizer.step()
        optimizer.zero_grad()
        print(f"rank {rank}, step {step + 1}: loss {loss.item():.4f}", flush=True)
    if rank == 0:
        model.save_pretrained(output_dir)


main(*sys.argv[1:])
