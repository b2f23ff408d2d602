"""DPO on Llama 3.1 8B in int8: LoRA on pairs of a chosen and a rejected answer, with the frozen base as the reference.

    accelerate launch --config_file accelerate_configs/fsdp.yaml recipes/dpo.py
    accelerate launch --config_file accelerate_configs/fsdp.yaml recipes/dpo.py \\
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --dataset_name pairs.jsonl --eval_fraction 0.05

The columns are those of TRL's preference data: `chosen`, `rejected` and, unless both begin with the prompt, `prompt`;
each a text or a list of messages. The reference's log-probabilities are computed once, before the first step, so a step
takes one forward per answer. `--loss_type` selects DPO (sigmoid), hinge, ipo or robust. To go on from an adapter of
supervised fine-tuning, give it twice: `--adapter_name_or_path DIR --reference_adapter DIR`.
Without a GPU the same command trains the small OPT that ships with the package, on replies that ship with it.

Expect, with the embedded base: reward accuracy of the held-out pairs from 0.00 to about 1.00 in 60 steps. It begins at
0 because nothing has gained over the reference yet.
"""

import lora_dist

GPU = {
    "model_name_or_path": "meta-llama/Llama-3.1-8B-Instruct", "dataset_name": "trl-lib/ultrafeedback_binarized",
}  # fmt: skip
EMBEDDED = {  # without a GPU
    "model_name_or_path": "embedded", "dataset_name": "embedded/preferences", "learning_rate": 1e-3, "max_length": 128,
    "num_train_epochs": 6,
}  # fmt: skip
CONFIG = lora_dist.TrainConfig(
    loss_type="sigmoid",
    beta=0.1,
    quantization="int8",
    lora_r=16,
    lora_alpha=32,
    lora_dropout=0.0,
    lora_target_modules=["all-linear"],
    max_length=1024,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    num_train_epochs=1,
    learning_rate=5e-6,
    warmup_steps=10,
    eval_steps=20,
)


def main(config: lora_dist.TrainConfig) -> None:
    with lora_dist.open_run(config, "dpo") as run:
        lora_dist.train(run)
        lora_dist.finish(run)


if __name__ == "__main__":
    lora_dist.run_recipe(main, CONFIG, gpu=GPU, embedded=EMBEDDED, description=__doc__)
