"""Supervised fine-tuning of any causal language model, on texts, prompts with completions, instructions or chats.

    accelerate launch --config_file accelerate_configs/fsdp.yaml recipes/sft.py --config recipes/configs/llama3_8b.yaml
    accelerate launch --config_file accelerate_configs/fsdp.yaml recipes/sft.py \\
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --dataset_name chats.jsonl --max_length 2048

The columns of the data tell the format; `lora-dist doctor --data chats.jsonl` shows which tokens will be trained. Of
chats these are the assistant's turns, of prompts the completions. Documents are packed into rows of `--max_length`.
Without a GPU the same commands without a model train the small OPT that ships with the package, on its quotes:

    accelerate launch --config_file accelerate_configs/fsdp.yaml recipes/sft.py --max_steps 20

Expect that to bring the held-out perplexity of the quotes from 15.0 to 11.6 on 2 CPU ranks.
"""

from lora_dist.config import TrainConfig
from lora_dist.entry import run_recipe

GPU = {
    "model_name_or_path": "meta-llama/Llama-3.1-8B-Instruct", "dataset_name": "HuggingFaceH4/ultrachat_200k",
    "dataset_train_split": "train_sft", "dataset_test_split": "test_sft",
}  # fmt: skip
EMBEDDED = {  # where there is no GPU
    "model_name_or_path": "embedded", "max_length": 512, "dataset_name": "embedded", "dataset_text_field": "quote",
}  # fmt: skip
CONFIG = TrainConfig(
    model_name_or_path=None,  # GPU's or EMBEDDED's
    dataset_name=None,
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

    with session.open_session(config, "sft", launch, data) as (accelerator, folder):
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
