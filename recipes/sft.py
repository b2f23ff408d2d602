"""Supervised fine-tuning of any causal language model, on texts, prompts with completions, instructions or chats.

    accelerate launch --config_file accelerate_configs/fsdp.yaml recipes/sft.py --config recipes/configs/llama3_8b.yaml
    accelerate launch --config_file accelerate_configs/fsdp.yaml recipes/sft.py \\
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --dataset_name chats.jsonl --max_length 2048

The columns of the data decide its format; `lora-dist doctor --data chats.jsonl` shows which tokens will be trained: the
assistant's turns of a chat, the completion of a prompt. Documents are packed into rows of `--max_length` tokens.
Without a GPU and without a model, the small OPT that ships with the package is trained on its quotes:

    accelerate launch --config_file accelerate_configs/fsdp.yaml recipes/sft.py --max_steps 20

Expect that to bring the held-out perplexity of the quotes from 15.0 to about 11.6 on 2 ranks.
"""

import lora_dist

GPU = {
    "model_name_or_path": "meta-llama/Llama-3.1-8B-Instruct", "dataset_name": "HuggingFaceH4/ultrachat_200k",
    "dataset_train_split": "train_sft", "dataset_test_split": "test_sft",
}  # fmt: skip
EMBEDDED = {  # without a GPU
    "model_name_or_path": "embedded", "max_length": 512, "dataset_name": "embedded", "dataset_text_field": "quote",
}  # fmt: skip
CONFIG = lora_dist.TrainConfig(
    quantization="int8",
    lora_r=16,
    lora_alpha=32,
    lora_target_modules=["all-linear"],
    max_length=2048,
    packing=True,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=4,
    num_train_epochs=1,
    learning_rate=2e-4,
    warmup_steps=20,
    num_eval_samples=2,
)


def main(config: lora_dist.TrainConfig) -> None:
    with lora_dist.open_run(config, "sft") as run:
        lora_dist.train(run)
        lora_dist.finish(run)


if __name__ == "__main__":
    lora_dist.run_recipe(main, CONFIG, gpu=GPU, embedded=EMBEDDED, description=__doc__)
