"""LoRA on bloomz-7b1 in int8: tweets as text, "complaint" or "no complaint" as the text to go on with.

    accelerate launch --config_file accelerate_configs/fsdp.yaml recipes/bloomz_complaints.py

Classification as text to text: the label is the completion of a prompt, trained alone, and a row counts as right where
greedy decoding would write exactly its label. The data are RAFT's 50 labelled tweets; a fifth of them is held out.
Without a GPU the same command trains the small OPT that ships with the package, on tweets that ship with it.

Expect, with the embedded base on 2 CPU ranks: accuracy from 0.00 to 1.00 in 150 steps.
"""

from lora_dist.config import TrainConfig
from lora_dist.entry import run_recipe

GPU = {
    "model_name_or_path": "bigscience/bloomz-7b1", "dataset_name": "ought/raft",
    "dataset_config": "twitter_complaints", "dataset_test_split": "none",  # its rows have no labels
}  # fmt: skip
EMBEDDED = {  # where there is no GPU
    "model_name_or_path": "embedded", "lora_target_modules": ["q_proj", "v_proj"], "learning_rate": 3e-3,
    "dataset_name": "embedded/complaints",
}  # fmt: skip
LABELS = ("Unlabeled", "complaint", "no complaint")  # RAFT numbers them
CONFIG = TrainConfig(
    model_name_or_path=None,  # GPU's or EMBEDDED's
    dataset_name=None,
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


def main(config: TrainConfig) -> None:
    from lora_dist import session  # here, so that a mistyped flag is answered before torch is imported
    from lora_dist.data.formats import load_tokenizer
    from lora_dist.data.rows import prepare_rows
    from lora_dist.parallel.strategies import read_launch
    from lora_dist.training.evaluation import predict
    from lora_dist.training.loop import train

    # Where are we?
    launch = read_launch(config)
    config, decision = session.choose_defaults(config, CONFIG, gpu=GPU, embedded=EMBEDDED)

    # Data, and what the base allows: before the ranks meet, so that no collective waits for a tokenizer.
    tokenizer = load_tokenizer(config.model_name_or_path)
    data = prepare_rows(config, tokenizer, as_prompt)
    plan = session.plan_base(config, launch, tokenizer)

    with session.open_session(config, "bloomz_complaints", launch, data) as (accelerator, folder):
        say = accelerator.on_main_process(print)
        say(f"{decision}\n{data.table()}")

        # Model
        run = session.prepare_training(config, plan, data, tokenizer, accelerator, folder)
        say(session.banner(run, launch.strategy), flush=True)

        # Train
        with session.metrics_log(run, launch.strategy) as metrics:
            scores = {"accuracy_base": predict(run).mean().item()}
            measured = train(run, metrics)
            if measured["steps"] == run.num_steps:  # else preempted: leave soon
                scores["accuracy"] = predict(run).mean().item()
                metrics.log({"eval/accuracy": scores["accuracy"]}, measured["steps"])
                say(f"accuracy: {scores['accuracy_base']:.2f} base, {scores['accuracy']:.2f} base + adapter")

            # Save
            session.finish(run, launch.strategy, {**measured, **scores}, metrics)


if __name__ == "__main__":
    run_recipe(main, CONFIG, description=__doc__)
