"""LoRA on OPT-6.7B in int8, sharded over the GPUs, on English quotes.

    accelerate launch --config_file accelerate_configs/fsdp.yaml recipes/opt_quotes.py

The tutorial that this toolkit grew out of, as a distributed recipe: same base, data, adapter and hyper-parameters.
Without a GPU the same command trains a small OPT that ships with the package, on quotes that ship with it:

    torchrun --nproc_per_node 2 recipes/opt_quotes.py        # ddp
    python recipes/opt_quotes.py                             # one process

Expect, with the embedded base: held-out perplexity from 15.0 to about 6 in 200 steps. About half of the tutorial's
batches is padding: `--packing true --per_device_train_batch_size 1` fills the rows instead.
"""

import lora_dist

GPU = {"model_name_or_path": "facebook/opt-6.7b", "dataset_name": "Abirate/english_quotes"}
EMBEDDED = {"model_name_or_path": "embedded", "dataset_name": "embedded"}  # without a GPU
CONFIG = lora_dist.TrainConfig(
    dataset_text_field="quote",
    quantization="int8",
    gradient_checkpointing=True,
    lora_r=16,
    lora_alpha=32,
    lora_dropout=0.05,
    lora_target_modules=["q_proj", "v_proj"],
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    max_steps=200,
    learning_rate=2e-4,
    warmup_steps=100,
    logging_steps=1,
    sample_prompt="Two things are infinite: ",
)


def main(config: lora_dist.TrainConfig) -> None:
    with lora_dist.open_run(config, "opt_quotes") as run:
        lora_dist.train(run)
        lora_dist.finish(run)


if __name__ == "__main__":
    lora_dist.run_recipe(main, CONFIG, gpu=GPU, embedded=EMBEDDED, description=__doc__)
