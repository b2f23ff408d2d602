"""LoRA on OPT-6.7B in int8, sharded over the GPUs, on English quotes.

    accelerate launch --config_file accelerate_configs/fsdp.yaml recipes/opt_quotes.py

The tutorial that this toolkit grew out of, as a distributed recipe: same base, data, adapter and hyper-parameters.
Without a GPU the same commands train a small OPT that ships with the package, on quotes that ship with it:

    accelerate launch --config_file accelerate_configs/fsdp.yaml recipes/opt_quotes.py --max_steps 20
    torchrun --nproc_per_node 2 recipes/opt_quotes.py        # ddp
    python recipes/opt_quotes.py                             # one process

Expect, with the embedded base on 2 CPU ranks: held-out perplexity from 15.0 to 5.9 in 200 steps. The tutorial's padded
batches are about half padding: `--packing true --per_device_train_batch_size 1` fills the rows instead.
"""

from lora_dist.config import TrainConfig
from lora_dist.entry import run_recipe

GPU = {"model_name_or_path": "facebook/opt-6.7b", "dataset_name": "Abirate/english_quotes"}
EMBEDDED = {"model_name_or_path": "embedded", "dataset_name": "embedded"}  # where there is no GPU
CONFIG = TrainConfig(
    model_name_or_path=None,  # GPU's or EMBEDDED's
    dataset_name=None,
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


def main(config: TrainConfig) -> None:
    from lora_dist import session  # here, so that a mistyped flag is answered before torch is imported
    from lora_dist.data.formats import load_tokenizer
    from lora_dist.data.rows import prepare_rows
    from lora_dist.parallel.strategies import read_launch
    from lora_dist.training.loop import train

    # Where are we?
    launch = read_launch(config)
    config, decision = session.choose_defaults(config, CONFIG, gpu=GPU, embedded=EMBEDDED)

    # Data, and what the base allows: before the ranks meet, so that no collective waits for a tokenizer.
    tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template)
    data = prepare_rows(config, tokenizer)
    plan = session.plan_base(config, launch, tokenizer)

    with session.open_session(config, "opt_quotes", launch, data) as (accelerator, folder):
        say = accelerator.on_main_process(print)
        say(f"{decision}\n{data.table()}")

        # Model
        run = session.prepare_training(config, plan, data, tokenizer, accelerator, folder)
        say(session.banner(run, launch.strategy), flush=True)

        # Train
        with session.metrics_log(run, launch.strategy) as metrics:
            measured = train(run, metrics)

            # Save
            session.finish(run, launch.strategy, measured, metrics)


if __name__ == "__main__":
    run_recipe(main, CONFIG, description=__doc__)
