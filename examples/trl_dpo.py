"""TRL's DPOTrainer on an NF4 base that is sharded over the ranks. The reference is the same base without adapters.

    torchrun --nproc_per_node 2 examples/trl_dpo.py MODEL DATA OUTPUT_DIR

MODEL: a hub name or a folder. DATA: a .jsonl file with columns prompt, chosen and rejected.
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from lora_dist import load_base


def main(model_name: str, data: str, output_dir: str) -> None:
    on_gpu = torch.cuda.is_available()
    rows = load_dataset("json", data_files=data, split="train").train_test_split(0.1, seed=0)
    args = DPOConfig(
        output_dir, num_train_epochs=1, per_device_train_batch_size=2, learning_rate=5e-5, logging_steps=1,
        eval_strategy="epoch", save_strategy="epoch", report_to="none", bf16=on_gpu, use_cpu=not on_gpu,
    )  # fmt: skip
    trainer = DPOTrainer(
        load_base(model_name, quantization="nf4"), args=args, train_dataset=rows["train"], eval_dataset=rows["test"],
        processing_class=AutoTokenizer.from_pretrained(model_name),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
