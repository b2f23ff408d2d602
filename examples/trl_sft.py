"""TRL's SFTTrainer on an int8 base that is sharded over the ranks.

    torchrun --nproc_per_node 2 examples/trl_sft.py MODEL DATA OUTPUT_DIR

MODEL: a hub name or a folder. DATA: a .jsonl file with a column text, or messages.
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from lora_dist import load_base


def main(model_name: str, data: str, output_dir: str) -> None:
    on_gpu = torch.cuda.is_available()
    rows = load_dataset("json", data_files=data, split="train").train_test_split(0.1, seed=0)
    args = SFTConfig(
        output_dir, num_train_epochs=1, per_device_train_batch_size=4, learning_rate=2e-4, logging_steps=1,
        eval_strategy="epoch", save_strategy="epoch", report_to="none", bf16=on_gpu, use_cpu=not on_gpu,
    )  # fmt: skip
    trainer = SFTTrainer(
        load_base(model_name, quantization="int8"), args=args, train_dataset=rows["train"], eval_dataset=rows["test"],
        processing_class=AutoTokenizer.from_pretrained(model_name),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
