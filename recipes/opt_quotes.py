"""LoRA on OPT-6.7B in int8, sharded over the GPUs, on English quotes.

    accelerate launch --config_file accelerate_configs/fsdp.yaml recipes/opt_quotes.py

The tutorial that this toolkit grew out of, as a distributed recipe: same base, data, adapter and hyper-parameters.
Without a GPU the same commands train a small OPT that ships with the package, on quotes that ship with it:

    accelerate launch --config_file accelerate_configs/fsdp.yaml recipes/opt_quotes.py --max_steps 20
    torchrun --nproc_per_node 2 recipes/opt_quotes.py        # ddp
    python recipes/opt_quotes.py                             # one process

Expect, with the embedded base on 2 CPU ranks: held-out perplexity from 15.0 to 5.9 in 200 steps.
"""

import time
from functools import partial

from lora_dist.config import TrainConfig, run_recipe

GPU_MODEL, GPU_DATASET = "facebook/opt-6.7b", "Abirate/english_quotes"
CONFIG = TrainConfig(
    model_name_or_path=None,  # GPU_MODEL on a GPU, the embedded OPT without
    dataset_name=None,  # GPU_DATASET on a GPU, the embedded quotes without
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
    from lora_dist.adapters import add_adapters, check_identical, check_targets, is_trained
    from lora_dist.base_model import base_bytes, meta_model
    from lora_dist.data import MicroBatches, load_texts, load_tokenizer, tokenize
    from lora_dist.metrics import MetricsLog
    from lora_dist.placement import agree, choose_placement
    from lora_dist.quantized_cache import load_cached_base
    from lora_dist.strategies import read_launch, world_size
    from lora_dist.train import Training, complete, train

    # Where are we, and can this be trained at all?
    launch = read_launch(config)
    config, decision = session.choose_defaults(
        config, gpu_model="facebook/opt-6.7b", gpu_dataset="Abirate/english_quotes"
    )
    dtype, num_ranks = session.base_dtype(launch.mixed_precision), world_size()
    skeleton = meta_model(config.model_name_or_path, config.quantization, dtype)
    check_targets(skeleton, config)
    placement = choose_placement(launch, config, skeleton, num_ranks=num_ranks, dtype=dtype)

    # Data: before the ranks meet, so that a slow disk is never a collective's time-out.
    tokenizer = load_tokenizer(config.model_name_or_path)
    train_rows, eval_rows = (tokenize(texts, tokenizer, config.max_length) for texts in load_texts(config))

    with session.open_session(config, "opt_quotes", launch) as (accelerator, folder):
        say = accelerator.on_main_process(print)
        say(decision)

        # Model: each rank reads and quantizes its own rows; the adapters come after, whole on every rank.
        placement, started = agree(placement), time.perf_counter()
        model = load_cached_base(
            config.model_name_or_path, quantization=config.quantization, dtype=dtype, device=accelerator.device,
            placement=placement, is_trained=partial(is_trained, config),
            cache=config.quantized_cache,
        )  # fmt: skip
        base, load_s = base_bytes(model), time.perf_counter() - started
        model = add_adapters(model, config)
        check_identical(model, accelerator.device)

        # Train
        micro_batches = MicroBatches(
            train_rows, pad_token_id=tokenizer.pad_token_id, seed=config.seed, num_epochs=config.num_train_epochs,
            sequences=config.per_device_train_batch_size, per_step=config.gradient_accumulation_steps * num_ranks,
        )  # fmt: skip
        run = Training(model, tokenizer, config, accelerator, micro_batches, eval_rows, folder, base, placement)
        say(session.banner(run, launch.strategy), flush=True)
        samples = {"before": complete(run, config.sample_prompt)}
        with MetricsLog(
            folder, accelerator, config, session.wandb_config(config, launch.strategy, accelerator)
        ) as metrics:
            measured = train(run, metrics)
        if measured["steps"] == run.num_steps:  # else preempted: leave soon
            samples["after"] = complete(run, config.sample_prompt)

        # Save
        session.finish(run, launch.strategy, {**measured, "samples": samples, "load_s": load_s})


if __name__ == "__main__":
    run_recipe(main, CONFIG, description=__doc__)
