"""Keeping only the norms in fp32, compared with PEFT's `prepare_model_for_kbit_training`.

PEFT's function converts all weights that are not quantized to fp32.

    python benchmarks/kbit.py > benchmarks/kbit_cpu_DATE.md

One process, the embedded OPT in int8 under bf16 autocast, the same adapters and micro-batches.
"""

import dataclasses
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import header, mb, table
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, OPTConfig

from lora_dist.config import TrainConfig
from lora_dist.data.formats import load_tokenizer
from lora_dist.data.micro_batches import MicroBatches
from lora_dist.data.rows import prepare_rows
from lora_dist.data.tasks import CAUSAL_LM
from lora_dist.embedded import BASE_DIR
from lora_dist.library import load_base
from lora_dist.model.adapters import add_adapters, trainable_parameters
from lora_dist.model.quantize_model import keep_norms_in_fp32
from lora_dist.seeds import random_key

CPU, BF16, STEPS, PER_STEP = torch.device("cpu"), torch.bfloat16, 60, 4
CONFIG = TrainConfig(
    model_name_or_path="embedded",
    dataset_name="embedded",
    dataset_text_field="quote",
    lora_dropout=0.0,
    max_steps=STEPS,
)


def ours():
    return load_base("embedded", quantization="int8", dtype=BF16, device=CPU, shard_ranks=1)


def theirs():
    model = AutoModelForCausalLM.from_pretrained(
        BASE_DIR,
        dtype=BF16,
        device_map={"": CPU},
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        trust_remote_code=False,
    )
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def train(base):
    """(loss of each step, bytes of the parameters that are not quantized)"""
    plain = sum(p.nbytes for p in base.parameters() if p.is_floating_point())
    config = dataclasses.replace(CONFIG, gradient_checkpointing=False)
    model = add_adapters(base, config)
    for index, param in enumerate(trainable_parameters(model).values()):
        if index % 2 == 0:
            param.data.normal_(std=0.05, generator=torch.Generator().manual_seed(index))
    tokenizer = load_tokenizer("embedded")
    rows = prepare_rows(dataclasses.replace(config, max_length=96), tokenizer).train
    batches = MicroBatches(rows, pad_token_id=tokenizer.pad_token_id, seed=1, sequences=4, per_step=PER_STEP)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=2e-3)
    model.train()
    losses = []
    for step in range(STEPS):
        total, trained = 0.0, 0
        for index in range(PER_STEP):
            batch = batches(step, index)
            torch.manual_seed(random_key(step, index) % 2**32)
            with torch.autocast("cpu", BF16):
                logits = model(
                    input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False
                ).logits
            loss = CAUSAL_LM.summed_loss(logits, batch.labels_BL)
            loss.backward()
            total, trained = total + loss.item(), trained + batch.num_trained_tokens
        for param in trainable_parameters(model).values():
            param.grad /= trained
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / trained)
    return losses, plain


def opt_6_7b_bytes() -> tuple[int, int]:
    """Bytes of OPT-6.7B that are not quantized, without the linears' biases: (norms in fp32, all in fp32)."""
    config = OPTConfig(
        hidden_size=4096, word_embed_proj_dim=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=BF16, trust_remote_code=False)
    keep_norms_in_fp32(model)
    linears = {id(p) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
               for p in m.parameters()}  # fmt: skip
    rest = [p for p in model.parameters() if id(p) not in linears]
    return sum(p.nbytes for p in rest), sum(4 * p.numel() for p in rest)


def main():
    rows, losses = [], {}
    for name, load in (("norms in fp32 (ours)", ours), ("prepare_model_for_kbit_training", theirs)):
        losses[name], plain = train(load())
        rows.append([name, mb(plain), f"{losses[name][0]:.4f}", f"{losses[name][-1]:.4f}"])
    first, second = losses.values()
    differences = [abs(a - b) / b for a, b in zip(first, second, strict=True)]
    small, large = opt_6_7b_bytes()
    what = __doc__.split("\n\n")[-1].strip() + f" {STEPS} steps of {PER_STEP} x 4 rows, adapters without dropout."
    print(header("Parameters kept in fp32", "python benchmarks/kbit.py", what))
    print(table(["", "not quantized MB", "loss of step 1", f"loss of step {STEPS}"], rows))
    print(f"Relative difference of the loss: mean {sum(differences) / STEPS:.2e}, maximum {max(differences):.2e}.")
    print(f"Computed for OPT-6.7B, if a rank holds all of it: {mb(small)} MB, or {mb(large)} MB with all in fp32.")


if __name__ == "__main__":
    main()
