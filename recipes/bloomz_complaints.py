"""LoRA on bloomz-7b1 in int8: is a tweet a complaint? The answer is text, "complaint" or "no complaint".

    accelerate launch --config_file accelerate_configs/fsdp.yaml recipes/bloomz_complaints.py

Classification as text to text: the label is the completion of a prompt, and only it is trained. A row counts as right
if greedy decoding would write exactly its label. The data are RAFT's 50 labelled tweets; a fifth of them is held out.
Without a GPU the same command trains the small OPT that ships with the package, on tweets that ship with it.

Expect, with the embedded base: accuracy from 0.00 to 1.00 in 150 steps.
"""

import lora_dist

GPU = {
    "model_name_or_path": "bigscience/bloomz-7b1", "dataset_name": "ought/raft",
    "dataset_config": "twitter_complaints", "dataset_test_split": "none",  # its rows have no labels
}  # fmt: skip
EMBEDDED = {  # without a GPU
    "model_name_or_path": "embedded", "lora_target_modules": ["q_proj", "v_proj"], "learning_rate": 3e-3,
    "dataset_name": "embedded/complaints",
}  # fmt: skip
LABELS = ("Unlabeled", "complaint", "no complaint")  # RAFT numbers them
CONFIG = lora_dist.TrainConfig(
    eval_fraction=0.2,
    quantization="int8",
    lora_r=16,
    lora_alpha=32,
    lora_target_modules=["query_key_value"],
    max_length=256,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    max_steps=150,
    learning_rate=2e-4,
    warmup_steps=15,
)


def as_prompt(example: dict) -> dict:
    label = example["Label"]
    label = label if isinstance(label, str) else LABELS[label]
    return {"prompt": f"Tweet text : {example['Tweet text']} Label :", "completion": f" {label}"}


def accuracy(run) -> dict[str, float]:
    return {"accuracy": lora_dist.predict(run).mean().item()}


def main(config: lora_dist.TrainConfig) -> None:
    with lora_dist.open_run(config, "bloomz_complaints", transform=as_prompt, score=accuracy) as run:
        lora_dist.train(run)
        lora_dist.finish(run)


if __name__ == "__main__":
    lora_dist.run_recipe(main, CONFIG, gpu=GPU, embedded=EMBEDDED, description=__doc__)
